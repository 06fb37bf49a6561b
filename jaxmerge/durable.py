"""Files that no instant can tear, and the lock that gives a directory to one process."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from jaxmerge.errors import JaxmergeError, at, way_out

LOCK = ".lock"  # begins the names of locks, and of the files that stand for one

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


@contextlib.contextmanager
def replacing(path: Path, writer: str = "") -> Iterator[Path]:
    """A temporary file to write; takes the place of `path`, durably, when the block ends.

    Args:
        path: of the file.
        writer: part of the temporary name, where several processes may write the file at once.

    Raises:
        JaxmergeError: it can't be written.
    """
    temporary = path.with_name(f"{path.name}{writer}.tmp")
    with at(path):
        yield temporary
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        _sync(path.parent)


@contextlib.contextmanager
def making(target: Path, what: str) -> Iterator[Path]:
    """A directory under a temporary name, for `appear`; nothing is left of one that has not.

    Nor of those of processes that were killed meanwhile: whoever makes the target has its lock.

    Args:
        target: what it will be called.
        what: is written, for the message where it can't be.

    Raises:
        JaxmergeError: it can't be written.
    """
    new = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        for left in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
            process = left.name.split(".")[-2]
            if process.isdecimal() and not _runs(int(process)):
                shutil.rmtree(left)
        new.mkdir(parents=True)
        yield new
    except OSError as error:
        raise JaxmergeError(
            f"{what} can't be written",
            where=str(target),
            expected=way_out(error),
            found=error.strerror or str(error),
        ) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def appear(new: Path, target: Path) -> None:
    """Gives a directory its name when all that is in it is on disk: it appears whole."""
    for path in [*new.rglob("*"), new]:
        _sync(path)
    new.rename(target)
    _sync(target.parent)


def sync(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def read_json(path: Path) -> Any:
    """What a JSON file says; raises `JaxmergeError` when it is none."""
    with at(path):
        text = path.read_bytes()
    return parsed(text, str(path))


def there(path: Path) -> bool:
    """Whether there is something at a path; raises `JaxmergeError` where a parent is a file."""
    with at(path):
        try:
            path.stat()
        except FileNotFoundError:
            return False
    return True


def as_json(value: Any, indent: int | None = None) -> bytes:
    """In UTF-8; names of files that are none, and other lone surrogates, are escaped."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    try:
        return text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent).encode()


def parsed(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise JaxmergeError(
            "can't be read as JSON",
            where=where,
            expected="the file as it was written; or another directory, for a new run",
            found=str(error),
        ) from error


class Lock:
    """Keeps other processes out of a directory for as long as it is open.

    The system lets go of it with the process. Some file systems have no such locks (Lustre without
    its option, some of NFS and FUSE): there a file beside it, of its name and `-holder`, names the
    process that has the directory, which keeps out those of the same machine.

    Attributes:
        missing: why other machines are not kept out; "": they are.

    Raises:
        JaxmergeError: another process has it.
        OSError: the file can't be written.
    """

    def __init__(self, path: Path):
        self.missing, self._holder = "", path.with_name(f"{path.name}-holder")
        self._stream = path.open("ab")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._stream.close()
            raise JaxmergeError(
                "another process is running in this directory",
                where=str(path.parent),
                expected="that one to end, or another directory",
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                self._stream.close()
                raise
            self.missing = error.strerror or str(error)
            try:
                self._hold()
            except BaseException:
                self._stream.close()
                raise

    def _hold(self) -> None:
        own = f"{socket.gethostname()} {os.getpid()}"
        try:
            descriptor = os.open(self._holder, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            os.write(descriptor, own.encode())
            os.close(descriptor)
        except FileExistsError:
            host, _, process = self._holder.read_text(errors="replace").strip().rpartition(" ")
            if host == socket.gethostname() and process.isdecimal() and _runs(int(process)):
                raise JaxmergeError(
                    f"process {process} of this machine is running in this directory",
                    where=str(self._holder.parent),
                    expected=f"that one to end; if it is no jaxmerge, remove {self._holder}",
                ) from None
            self._holder.write_text(own)

    def close(self) -> None:
        if self.missing:
            self._holder.unlink(missing_ok=True)
        self._stream.close()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _runs(process: int) -> bool:
    """Whether there is another process of this number on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()


def open_or_create(file: Path) -> IO[bytes]:
    """A file to be written into, in the middle too; it is made if it is missing."""
    try:
        return open(file, "r+b")
    except FileNotFoundError:
        file.parent.mkdir(parents=True, exist_ok=True)
        return open(file, "w+b")


def whole_lines(log: Path) -> bytes:
    """All complete lines; what a kill left of the last one is cut off."""
    with at(log):
        data = log.read_bytes()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            with open(log, "r+b") as stream:
                stream.truncate(end)
                sync(stream)
    return data[:end]
