"""Blocks of tensors through reading, merging and writing, several at a time."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from jaxmerge.checkpoints import digest
from jaxmerge.checkpoints.digest import LeafDigest
from jaxmerge.checkpoints.leaves import Values
from jaxmerge.errors import JaxmergeError
from jaxmerge.streaming.block import Block, Kind, pages

# write(output, tensor, first, values) takes a stretch of a merged tensor.
Write = Callable[[int, str, int, np.ndarray], None]


def _cores() -> int:
    """Cores that this process may use; all of the machine on macOS, which does not say."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


WORKERS = min(_cores(), 16)
_MOST = (
    2**18
)  # values of a block at most: the fastest of 2^16 to 2^19, with 8 checkpoints in bfloat16
_MEMORY = 2**23  # bytes of a block at most, whatever the number of checkpoints and merges
_LEAST = 2**12  # below it, the calls cost more than the work


class Part(NamedTuple):
    """A tensor to be merged."""

    name: str
    shape: tuple[int, ...]
    kind: Kind

    def bytes_read(self) -> int:
        """Bytes of the tensor in all checkpoints."""
        return math.prod(self.shape) * sum(dtype.itemsize for dtype in self.kind.stored)


class Stretch(NamedTuple):
    """Values [first, first + count) of a tensor, in C order: what a block holds."""

    part: Part
    first: int
    count: int


class Pipeline:
    """Merges tensors block by block: each worker reads a block, merges it and writes it.

    The workers are threads, each with memory for one block. Reading, merging and writing run
    without Python's lock, so that they overlap. All is done on the host: the values come from files
    and go to files, and to send them to an accelerator takes longer than to add them up.

    Args:
        reads: reads the tensors of each checkpoint; called from several threads.
        names: of the checkpoints, for messages.
        memory_bytes: of all blocks at a time.
        progress: called with the bytes that have been read since; by one thread at a time.
    """

    def __init__(
        self,
        reads: Sequence[Values],
        names: Sequence[str],
        *,
        memory_bytes: int,
        progress: Callable[[int], object] = lambda count: None,
    ):
        self._reads, self._names, self.progress = reads, names, progress
        self._memory_bytes = memory_bytes // WORKERS
        self._memory = [pages(1)] * WORKERS
        self._lock, self._device = threading.Lock(), jax.local_devices(backend="cpu")[0]

    def merge(
        self, parts: Sequence[Part], weights_PxK: Float[np.ndarray, "P K"], write: Write
    ) -> dict[str, list[LeafDigest]]:
        """Merges tensors with each row of weights, in the order in which they are given.

        Returns:
            For each tensor the digests of what was read, and then of what was written.

        Raises:
            JaxmergeError: a file can't be read; a value is NaN or infinite; the memory does not
                suffice for the smallest blocks.
        """
        P, K = weights_PxK.shape
        kinds = {part.kind for part in parts}
        self._check_memory(max((kind.memory(P, _LEAST) for kind in kinds), default=0))
        sizes = {kind: self._size(kind, P) for kind in kinds}
        self._reserve(max((kind.memory(P, size) for kind, size in sizes.items()), default=0))
        lanes = {part.name: np.zeros((K + P, 2), np.uint32) for part in parts}
        stretches = _Shared(_stretches(parts, sizes))

        def merge_stretch(block: Block, part: Part, first: int, count: int) -> None:
            for read, row in zip(self._reads, block.rows):
                read(part.name, first, row[:count])
            merged = block.merge(part.shape, first, count)
            self._check_finite(part, K, merged.finite_R)
            for output, values in enumerate(merged.values_PxC):
                write(output, part.name, first, values)
            with self._lock:
                lanes[part.name] += merged.lanes_Rx2
                self.progress(count * sum(dtype.itemsize for dtype in part.kind.stored))

        def work(memory: np.ndarray) -> None:
            block: Block | None = None
            with stretches, jax.default_device(self._device):
                for part, first, count in stretches:
                    if block is None or block.kind != part.kind:
                        del block  # one at a time: its results are memory too
                        block = Block(part.kind, weights_PxK, memory, sizes[part.kind])
                    merge_stretch(block, part, first, count)

        with ThreadPoolExecutor(WORKERS) as workers:
            working = [workers.submit(work, each) for each in self._memory]
            for each in working:
                each.result()
        return {
            name: [LeafDigest(digest.checksum(row), True) for row in rows]
            for name, rows in lanes.items()
        }

    def _check_memory(self, least: int) -> None:
        if least > self._memory_bytes:
            raise JaxmergeError(
                "the memory does not suffice for the smallest blocks",
                where="merge.memory_bytes",
                expected=f"at least {least * WORKERS}",
                found=str(self._memory_bytes * WORKERS),
            )

    def _size(self, kind: Kind, outputs: int) -> int:
        """Values of a block of this kind: as many as the memory allows, up to `_MOST`."""
        size = _MOST
        memory = min(self._memory_bytes, _MEMORY)
        while size > _LEAST and kind.memory(outputs, size) > memory:
            size //= 2
        return size

    def _reserve(self, size: int) -> None:
        if self._memory[0].size < size:
            self._memory = [pages(size) for _ in range(WORKERS)]

    def _check_finite(self, part: Part, K: int, finite_R: np.ndarray) -> None:
        """Raises unless the rows of a block are finite."""
        if finite_R.all():
            return
        row = int(np.flatnonzero(~finite_R)[0])
        if row < K:
            raise JaxmergeError(
                f"the checkpoint holds NaN or infinite values, in leaf {part.name}",
                where=self._names[row],
                expected="finite values; take an earlier checkpoint, or leave this one out",
            )
        raise JaxmergeError(
            f"leaf {part.name} has values that are too large for {part.kind.written}",
            where="export.dtype",
            expected="bfloat16 or float32",
        )


class _Shared:
    """An iterator that several threads take from; it ends for all when one of them fails."""

    def __init__(self, items: Iterator[Stretch]):
        self._items, self._lock = items, threading.Lock()

    def __iter__(self) -> Iterator[Stretch]:
        return self

    def __next__(self) -> Stretch:
        with self._lock:
            return next(self._items)

    def __enter__(self) -> _Shared:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._lock:
            self._items = iter(())


def _stretches(parts: Sequence[Part], sizes: Mapping[Kind, int]) -> Iterator[Stretch]:
    for part in parts:
        total, step = math.prod(part.shape), sizes[part.kind]
        for first in range(0, total, step):
            yield Stretch(part, first, min(step, total - first))
