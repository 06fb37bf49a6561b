"""One program and its tests to a verdict."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import select
import time
from pathlib import Path
from typing import BinaryIO, NamedTuple

from jaxmerge.errors import JaxmergeError
from jaxmerge.sandbox.container import container, in_memory

_START_SECONDS = 60.0  # for Python to start in both sandboxes, on a machine that is busy
_INSIDE = Path(__file__).with_name("inside.py").read_text()


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        wall_seconds: for the program and all of its tests together.
        cpu_seconds: of each process.
        memory_bytes: address space of each process. All of them together can have no more than
            `processes` times as much, and `file_bytes`.
        processes: that exist at a time, threads among them.
        file_bytes: the size of /tmp, and of each file.
        reply_bytes: of one value that the program returns, as JSON.
    """

    wall_seconds: float = 10.0
    cpu_seconds: int = 3
    memory_bytes: int = 2**29
    processes: int = 4
    file_bytes: int = 2**24
    reply_bytes: int = 2**20


class Verdict(NamedTuple):
    """Whether a program passed its tests.

    Attributes:
        passed: no test failed, and nothing else went wrong.
        what: what failed; "" for a program that passed. It may hold text that the program wrote,
            without control characters.
    """

    passed: bool
    what: str


def check_program(
    program: str, tests: str, entry_point: str, *, limits: Limits | None = None
) -> Verdict:
    """Runs tests on a program that nobody trusts.

    The program is executed once. The tests are Python text too, run elsewhere, where `candidate` is
    the program's entry point; they pass when they end without an exception. Arguments go to the
    program by value: what it does to them does not reach the tests. Arguments and results are plain
    data (None, bool, int, float, complex, str, bytes, list, tuple, set, dict, range); a program
    that returns anything else fails. Exceptions arrive as the built-in kind that they are, or as
    RuntimeError.

    It can be called from several threads. It takes a tenth of a second and two processors; at the
    end no process, file or mount is left.

    Args:
        program: the text under test.
        tests: trusted text, such as `assert candidate(2) == 4`.
        entry_point: the name in the program that is called.
        limits: what the program may use.

    Raises:
        JaxmergeError: bubblewrap is missing, or the sandbox does not start.
    """
    limits = limits or Limits()
    with contextlib.ExitStack() as stack:
        orders, orders_in = _pipe(stack)
        answers, answers_in = _pipe(stack)
        verdict, verdict_in = _pipe(stack)
        said = stack.enter_context(in_memory(b""))
        worker = container(
            f"{_INSIDE}\nwork()",
            stdin=orders.fileno(),
            stdout=answers_in.fileno(),
            stderr=said.fileno(),
            tmp_bytes=limits.file_bytes,
        )
        job = {
            "program": program,
            "tests": tests,
            "entry_point": entry_point,
            "limits": dataclasses.asdict(limits),
            "from_worker": answers.fileno(),
            "to_worker": orders_in.fileno(),
        }
        judge = container(
            f"{_INSIDE}\njudge()",
            stdin=stack.enter_context(in_memory(json.dumps(job).encode())).fileno(),
            stdout=verdict_in.fileno(),
            stderr=said.fileno(),
            descriptors=(answers.fileno(), orders_in.fileno()),
            tmp_bytes=limits.file_bytes,
        )
        stack.enter_context(worker)
        stack.enter_context(judge)
        for theirs in (orders, orders_in, answers, answers_in, verdict_in):
            theirs.close()
        if _line(verdict, _START_SECONDS) != b"\n":
            said.seek(0)
            raise JaxmergeError(
                "the sandbox does not start",
                where="bubblewrap",
                expected="a machine or container that lets this user make namespaces",
                found=_printable(said.read()),
            )
        return _verdict(_line(verdict, limits.wall_seconds), limits)


def require(where: str = "") -> None:
    """Makes sure that programs can be judged here.

    Args:
        where: what needs it, for the message.

    Raises:
        JaxmergeError: bubblewrap is missing or does not work, as in containers that forbid
            namespaces.
    """
    try:
        _works()
    except JaxmergeError as error:
        raise JaxmergeError(
            error.what, where=where or error.where, expected=error.expected, found=error.found
        ) from error


@functools.cache
def _works() -> None:
    right = check_program("def one():\n    return 1", "assert candidate() == 1", "one")
    wrong = check_program("def one():\n    return 2", "assert candidate() == 1", "one")
    if not right.passed or wrong.passed:
        raise JaxmergeError(
            "the sandbox judges wrongly",
            where="bubblewrap",
            expected="bubblewrap that starts Python as it is here; please report it",
            found=f"{right}, {wrong}",
        )


def _pipe(stack: contextlib.ExitStack) -> tuple[BinaryIO, BinaryIO]:
    """The end to read from and the end to write to."""
    source, sink = os.pipe()
    return (
        stack.enter_context(open(source, "rb", buffering=0)),
        stack.enter_context(open(sink, "wb", buffering=0)),
    )


def _line(source: BinaryIO, seconds: float) -> bytes | None:
    """The next line; what there is at the end of the file; None when time is over."""
    deadline, line, ready = time.monotonic() + seconds, b"", select.poll()
    ready.register(source, select.POLLIN)
    while not line.endswith(b"\n"):
        if not ready.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return None
        byte = source.read(1)
        if not byte:
            break
        line += byte
    return line


def _verdict(line: bytes | None, limits: Limits) -> Verdict:
    if line is None:
        return Verdict(False, f"took longer than {limits.wall_seconds:g} seconds")
    if not line.endswith(b"\n"):  # such as tests that came to the limit of their memory
        return Verdict(False, "the tests ended without a verdict")
    said = json.loads(line)
    return Verdict(said["passed"], _printable(said["what"].encode(errors="replace")))


def _printable(text: bytes) -> str:
    line = " ".join(text.decode(errors="replace").split())
    return "".join(letter if letter.isprintable() else "?" for letter in line)[:500]
