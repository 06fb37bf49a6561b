"""The files of weights that several merges write at once, each sent to the disk as it grows."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from jaxmerge.checkpoints.huggingface import WeightsFile
from jaxmerge.checkpoints.safetensors import write_at

_FLUSH = 2**25  # bytes that are written before the disk is asked to take them
_SYNC = getattr(os, "fdatasync", os.fsync)  # macOS has the latter alone


class Writing:
    """One file of weights in each of several directories.

    While it grows, a thread of its own has the system put on disk what has been written: so the
    disk works while later blocks are merged, and little is left to wait for in the end.

    Args:
        directories: of the merges; made if they are missing.
        file: what is to be written.
    """

    def __init__(self, directories: Sequence[Path], file: WeightsFile):
        self._file, self._descriptors = file, []
        self._waiting, self._closing, self._growing = 0, False, threading.Condition()
        self._failed: OSError | None = None
        try:
            for directory in directories:
                directory.mkdir(parents=True, exist_ok=True)
                flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
                descriptor = os.open(directory / file.name, flags, 0o666)
                self._descriptors.append(descriptor)
                _allocate(descriptor, file.size)
                write_at(descriptor, 0, np.frombuffer(file.header, np.uint8))
        except OSError:
            self._close()
            raise
        self._flusher = threading.Thread(target=self._flush, daemon=True)
        self._flusher.start()

    def write(self, output: int, tensor: str, first: int, values: np.ndarray) -> None:
        """Writes values of a tensor, from `first` on, to the file of one of the merges."""
        start = self._file.starts[tensor] + first * values.dtype.itemsize
        write_at(self._descriptors[output], start, values)
        with self._growing:
            self._waiting += values.nbytes
            if self._waiting >= _FLUSH:
                self._growing.notify()

    def __enter__(self) -> Writing:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Waits until all is on disk."""
        with self._growing:
            self._closing = True
            self._growing.notify()
        self._flusher.join()
        try:
            if error is None:
                if self._failed:
                    raise self._failed
                for descriptor in self._descriptors:
                    os.fsync(descriptor)
        finally:
            self._close()

    def _flush(self) -> None:
        while True:
            with self._growing:
                self._growing.wait_for(lambda: self._closing or self._waiting >= _FLUSH)
                if self._closing:
                    return
                self._waiting = 0
            try:
                for descriptor in self._descriptors:
                    _SYNC(descriptor)
            except OSError as error:
                self._failed = error  # the system tells of it once
                return

    def _close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)


def _allocate(descriptor: int, size: int) -> None:
    """Sets the size of a file; a full disk is found now, but on macOS, which can't tell."""
    allocate = getattr(os, "posix_fallocate", None)
    if allocate:
        allocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)
