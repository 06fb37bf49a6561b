"""Runs of tools/chaos.py in one process, one after the other: JAX has begun, programs are compiled.

So a run costs a part of what it does in a process of its own, and the same calls of it can fail.
What differs: nothing ends with the run, neither its threads nor its locks. Whatever is wrong here
is to be tried again in processes of their own.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

from tools.chaos_runs import PATIENCE, Ended, Job, Place, command, ended, fork, nothing, wait

RUNS = 150  # of a process: what it compiles, it keeps


class WarmPlace:
    """Runs in the directories of a place, all in one process."""

    def __init__(self, place: Place):
        self.top, self.workdir = place.top, place.workdir
        self._pid, self._done = 0, RUNS

    def run(self, job: Job, workdir: Path, prepare: Callable[[Path], object] = nothing) -> Ended:
        """As `Place.run`; `prepare` can be pickled."""
        if self._done == RUNS:
            self._begin()
        self._done += 1
        workdir.parent.mkdir(exist_ok=True)
        said = workdir.with_suffix(".said")
        self._pipe.send((job.module, job.typed(self.top, workdir), prepare, said))
        if not self._pipe.poll(PATIENCE):
            raise AssertionError(f"a run hangs: {workdir}")
        try:
            return ended(self._pipe.recv(), said)
        except EOFError:  # the run has ended the process
            self._done, pid, self._pid = RUNS, self._pid, 0
            return ended(wait(pid, PATIENCE), said)

    def _begin(self) -> None:
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            wait(self._pid, PATIENCE)
        self._pipe, asked = Pipe()

        def serve() -> int:
            self._pipe.close()  # so that the other end of it closes when this process is gone
            _serve(asked)
            return 0

        self._pid, self._done = fork(serve, self.top / "warm.said"), 0
        asked.close()


def _serve(asked: Connection) -> None:
    """Carries out runs, until nobody asks for one any more."""
    with contextlib.suppress(EOFError):
        while True:
            module, flags, prepare, said = asked.recv()
            with _printed_into(said), _flags_of_one_run():
                code = _carried_out(module, flags, prepare)
            if code:
                gc.collect()  # the locks and the files that the trace of the error has held
            asked.send(code)


class _End(BaseException):
    """Of a run, in place of its process."""


def _carried_out(module: str, flags: list[str], prepare: Callable[[Path], object]) -> int:
    """The exit code of a run; an error ends it with `os._exit`."""

    def end(code: int) -> NoReturn:
        raise _End(code)

    exits, os._exit = os._exit, end
    try:
        return command(module, flags, prepare)
    except _End as instead:
        return instead.args[0]
    finally:
        os._exit = exits
        ctypes.CDLL(None).fault_arm(b"", ctypes.c_long(0), 0)


@contextlib.contextmanager
def _printed_into(said: Path) -> Iterator[None]:
    """Streams of one run: one that a fault has broken keeps what it could not write."""
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()


@contextlib.contextmanager
def _flags_of_one_run() -> Iterator[None]:
    """A command defines its flags, which a process can do once."""
    from absl import flags

    before = set(flags.FLAGS)
    try:
        yield
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
