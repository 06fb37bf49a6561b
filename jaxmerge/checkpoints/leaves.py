"""Leaves out of rows of tensors, each shard read by itself straight into its place."""

from __future__ import annotations

import bisect
import itertools
import math
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmerge.models.layout import Layout
from jaxmerge.trees import PyTree, map_named, named_leaves

# values(tensor, first, out) sets out[:] to the values of a tensor in C order, from `first` on.
Values = Callable[[str, int, np.ndarray], None]
# keep(name, leaf) is called as soon as a leaf is there; what it returns takes the leaf's place.
Keep = Callable[[str, jax.Array], Any]

_THREADS = min(os.cpu_count() or 1, 8)
_CHUNK = 2**23  # bytes that a thread reads at once
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_SHORT = 2**16  # bytes below which a read costs more than its bytes


def as_read(name: str, leaf: jax.Array) -> jax.Array:
    """Keeps a leaf as it is."""
    return leaf


def restore_leaves(abstract: PyTree, layout: Layout, values: Values, keep: Keep) -> PyTree:
    """Reads leaf after leaf into its shards, the largest first.

    Args:
        abstract: tree of `ShapeDtypeStruct`, with shardings or without.
        layout: what the leaves are made of.
        values: reads tensors; called from several threads.
        keep: see `Keep`. Meanwhile the next leaf is read, and no other.
    """
    wanted = named_leaves(abstract)
    order = sorted(wanted, key=lambda name: -wanted[name].size)
    kept = {}
    with ThreadPoolExecutor(_THREADS) as threads, ThreadPoolExecutor(1) as ahead:

        def coming(name: str) -> Future[jax.Array]:
            return ahead.submit(_restore_leaf, name, wanted[name], layout, values, threads)

        following = coming(order[0]) if order else None
        for i, name in enumerate(order):
            assert following
            leaf = following.result()
            following = coming(order[i + 1]) if i + 1 < len(order) else None
            kept[name] = keep(name, leaf)
    return map_named(lambda name, _: kept[name], abstract)


def _restore_leaf(
    name: str, leaf: jax.ShapeDtypeStruct, layout: Layout, values: Values, threads: Executor
) -> jax.Array:
    read = _LeafReader(layout, name, values)
    done: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        ranges = tuple(each.indices(size)[:2] for each, size in zip(index, leaf.shape))
        if ranges not in done:  # devices that hold the same shard share it
            out = _fresh(tuple(stop - start for start, stop in ranges), leaf.dtype)
            blocks = _blocks(leaf.shape, ranges, leaf.dtype.itemsize)
            for _ in threads.map(lambda block: _fill(block, leaf.shape, ranges, out, read), blocks):
                pass
            done[ranges] = out
        return done[ranges]

    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    array = jax.make_array_from_callback(leaf.shape, sharding, shard, dtype=leaf.dtype)
    return array.block_until_ready()  # the host's copy, where there is one, goes before the next


class _Block(NamedTuple):
    """Values that lie next to each other in a leaf: entries [start, stop) of an axis, whole."""

    outer: tuple[int, ...]  # the place on each axis before it
    start: int
    stop: int


def _blocks(
    shape: Sequence[int], ranges: Sequence[tuple[int, int]], itemsize: int
) -> Iterator[_Block]:
    """What to read for a shard: whole rows of the leaf, even where the shard has parts of them."""
    if not shape:
        yield _Block((), 0, 1)
        return
    cut = [axis for axis, size in enumerate(shape) if ranges[axis] != (0, size)]
    axis = max(cut, default=0)

    def entry() -> int:
        return max(math.prod(shape[axis + 1 :]) * itemsize, 1)

    while axis and (ranges[axis][1] - ranges[axis][0]) * entry() < _SHORT:
        axis -= 1
    start, stop = ranges[axis]
    step = max(_CHUNK // entry(), 1)
    for outer in itertools.product(*(range(*each) for each in ranges[:axis])):
        for first in range(start, stop, step):
            yield _Block(outer, first, min(first + step, stop))


def _fill(
    block: _Block,
    shape: tuple[int, ...],
    ranges: Sequence[tuple[int, int]],
    out: np.ndarray,
    read: _LeafReader,
) -> None:
    """Reads a block, and takes what the shard has of it."""
    if not shape:
        return read(0, out.reshape(1))
    axis = len(block.outer)
    inner = shape[axis + 1 :]
    place = out[tuple(i - start for i, (start, _) in zip(block.outer, ranges))]
    place = place[block.start - ranges[axis][0] : block.stop - ranges[axis][0]]
    at = 0
    for i, size in zip((*block.outer, block.start), shape):
        at = at * size + i
    at *= math.prod(inner)
    if place.shape[1:] == inner:
        return read(at, place.reshape(-1))
    whole = np.empty((block.stop - block.start, *inner), out.dtype)
    read(at, whole.reshape(-1))
    place[...] = whole[(slice(None), *(slice(*each) for each in ranges[axis + 1 :]))]
    return None


class _LeafReader:
    """Reads the values of a leaf from the tensors that it is made of."""

    def __init__(self, layout: Layout, name: str, values: Values):
        self._values, self._parts = values, layout.leaves[name]
        self._row = [math.prod(layout.tensors[part.tensor][1:]) for part in self._parts]
        sizes = [(part.stop - part.start) * row for part, row in zip(self._parts, self._row)]
        self._begin = [0, *itertools.accumulate(sizes)]

    def __call__(self, start: int, out: np.ndarray) -> None:
        """Sets out[:] to the leaf's values in C order, from `start` on."""
        done = 0
        i = bisect.bisect_right(self._begin, start) - 1
        while done < out.size:
            within = start + done - self._begin[i]
            count = min(self._begin[i + 1] - self._begin[i] - within, out.size - done)
            first = self._parts[i].start * self._row[i] + within
            self._values(self._parts[i].tensor, first, out[done : done + count])
            done += count
            i += 1


def _fresh(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Memory of its own, in pages: on the CPU, JAX takes it over instead of copying it."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    # The threads that read take the page faults, side by side. np.empty would ask for huge pages,
    # which come slowly where the system has none at hand (docs/decisions/loading.md).
    memory = np.frombuffer(mmap.mmap(-1, max(size, 1), flags=_FLAGS), np.uint8)
    return memory[:size].view(dtype).reshape(shape)
