"""The one exception of jaxmerge: what a user can get wrong, said in one message."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

# What code raises that is given a text for a number, a list for an object, a number beyond float64,
# and so on.
OF_OTHER_KIND = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


_FOUND = 4000  # characters of what was found that a message has; of more, the ends


class JaxmergeError(Exception):
    """A mistake in the input, told so that the reader can mend it.

    Attributes:
        what: one sentence that says what is wrong.
        where: the file, config field or leaf that is at fault, if there is one.
        expected: what would have been right.
        found: what was there instead.
    """

    def __init__(self, what: str, *, where: str = "", expected: str = "", found: str = ""):
        self.what, self.where, self.expected, self.found = what, where, expected, found
        lines = [f"{where}: {what}" if where else what]
        if expected:
            lines.append(f"  expected: {expected}")
        if len(found) > _FOUND:
            half = _FOUND // 2
            found = f"{found[:half]} ... {len(found):,} characters in all ... {found[-half:]}"
        if found:
            lines.append(f"  found:    {found}")
        super().__init__("\n".join(lines))


def check_choice(where: str, value: str, choices: Sequence[str]) -> None:
    """Raises `JaxmergeError`, which names the field, unless the value is one of the choices."""
    if value not in choices:
        raise JaxmergeError(
            "unknown choice", where=where, expected=", ".join(choices), found=str(value)
        )


def check_least(where: str, value: int, least: int) -> None:
    """Raises `JaxmergeError`, which names the field, for a value below the least there can be."""
    if value < least:
        raise JaxmergeError(
            "the number is too small", where=where, expected=f"at least {least}", found=str(value)
        )


def check_finite(where: str, numbers: Sequence[float]) -> None:
    """Raises `JaxmergeError`, which names the place, unless all numbers are finite."""
    if not all(map(math.isfinite, numbers)):
        raise JaxmergeError(
            "this is not finite", where=where, expected="finite numbers", found=str(numbers)
        )


def check_text(where: str, *texts: str) -> None:
    """Raises `JaxmergeError` for a text with half of a surrogate pair, which no tokenizer reads."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise JaxmergeError(
                "a text has half of a surrogate pair, which is no character",
                where=where,
                expected=r"whole characters, such as \ud83d\ude00 in JSON",
                found=ascii(text[max(error.start - 20, 0) : error.start + 20]),
            ) from error


# What a system says no to, and what helps. The rest of its errors would be ours.
_WAYS_OUT = {
    errno.ENOSPC: "room on that disk; the same command goes on from what is finished",
    errno.EDQUOT: "room in the quota there; the same command goes on from what is finished",
    errno.EROFS: "a place that can be written to",
    errno.EACCES: "a place that this user may read and write",
    errno.EPERM: "a place that this user may read and write",
    errno.ENOTDIR: "a directory; one of its parents is a file",
    errno.EISDIR: "a file; there is a directory",
    errno.EEXIST: "another path; there is something here, which is no directory",
    errno.ENOENT: "the file or directory, which is missing or was taken away meanwhile",
    errno.ENOTEMPTY: "another path; there is something in this directory",
    errno.ENAMETOOLONG: "a shorter path",
    errno.ELOOP: "a path whose links lead somewhere",
    errno.EFBIG: "a file system, or a limit (ulimit -f), that takes files of this size",
    errno.EMFILE: "a higher limit of open files (ulimit -n)",
    errno.ENFILE: "fewer open files on this machine",
    errno.ENOMEM: "more memory",
    errno.EIO: "a disk that works; the same command goes on from what is finished",
    errno.ESTALE: "the file system, which was mounted anew; the same command goes on",
    errno.ETIMEDOUT: "the file system to answer; the same command goes on",
    errno.ENOTCONN: "the file system to be mounted; the same command goes on",
    errno.EXDEV: "two paths on one file system",
    errno.ETXTBSY: "a file that nobody runs",
    errno.EBUSY: "a file that nobody else uses",
}


def way_out(error: OSError) -> str:
    """What helps where the system says no; "" where nothing does that is known."""
    return _WAYS_OUT.get(error.errno or 0, "")


def of_system(error: OSError, where: str = "") -> JaxmergeError:
    """What the system refused, as a mistake that can be mended.

    Args:
        error: as it was raised.
        where: the path, where the error does not say it.
    """
    path = os.fspath(error.filename) if isinstance(error.filename, str | bytes) else where
    return JaxmergeError(
        "the system refuses to read or write this",
        where=os.fsdecode(path),
        expected=way_out(error),
        found=error.strerror or str(error),
    )


@contextlib.contextmanager
def at(path: str | os.PathLike[str]) -> Iterator[None]:
    """What the system refuses inside is told as a `JaxmergeError` about this path."""
    try:
        yield
    except OSError as error:
        raise of_system(error, os.fspath(path)) from error


@contextlib.contextmanager
def as_written(
    where: str,
    what: str = "a value in this file is not of the kind that a run writes",
    expected: str = "the file as the run wrote it; or another directory, for a new run",
) -> Iterator[None]:
    """Values of another kind than the code inside takes are told as a `JaxmergeError`.

    Args:
        where: the file that they are from.
        what: that is wrong, in a sentence.
        expected: what would be right.
    """
    try:
        yield
    except OF_OTHER_KIND as error:
        *_, last = traceback.extract_tb(error.__traceback__)
        raise JaxmergeError(
            what,
            where=where,
            expected=expected,
            found=f"{type(error).__name__} ({Path(last.filename).name}, line {last.lineno}): "
            f"{str(error)[:200]}",
        ) from error


def told(error: BaseException) -> JaxmergeError | None:
    """A foreseen error that is no mistake in the input; None where nobody foresaw it.

    Paths that the system refuses, and memory that there is not enough of, on the host or a device.
    """
    if isinstance(error, OSError) and error.errno in _WAYS_OUT and error.errno != errno.ENOENT:
        return of_system(error)
    on_device = type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error)
    if isinstance(error, MemoryError) or on_device:
        return JaxmergeError(
            f"there is not enough memory on {'a device' if on_device else 'this machine'}",
            expected="smaller evaluate.candidates_per_step or evaluate.batch_tokens, another "
            "pool.residency, or a larger mesh; `jaxmerge plan` says what a run takes",
            found=(str(error).strip().splitlines() or ["MemoryError"])[0][:300],
        )
    return None
