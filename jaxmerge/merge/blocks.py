"""Tensors in the memory of the host, in blocks: a program serves tensors of all shapes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Array, Shaped

from jaxmerge.merge import selection
from jaxmerge.trees import PyTree

SIZE = 2**18  # values: some tensors' fit into the cache of a core, and calls cost little beside
_ALIGNED = 64  # bytes; what lies so, JAX on the CPU takes as it is


def fit(arrays: PyTree) -> bool:
    """Whether arrays are in the memory of the host, and programs run there."""
    return jax.default_backend() == "cpu" and selection.on_host(arrays)


def cut(
    tensors: Sequence[Shaped[Array, "*S"]], base: Shaped[Array, "*S"] | None
) -> Iterator[tuple[tuple[np.ndarray, ...], np.ndarray | None]]:
    """The values in C order, block by block, where they lie; the last is filled up with zeros."""
    each = zip(*map(_cut, tensors))
    return zip(each, _cut(base)) if base is not None else ((blocks, None) for blocks in each)


def _cut(tensor: Array) -> Iterator[np.ndarray]:
    values = np.asarray(tensor).reshape(-1)
    for first in range(0, values.size, SIZE):
        block = values[first : first + SIZE]
        missing = SIZE - block.size
        yield np.concatenate([block, np.zeros(missing, block.dtype)]) if missing else block


def joined(blocks: Iterable[Shaped[Array, " B"]], like: Shaped[Array, "*S"]) -> Array:
    """The tensor of the shape and dtype of another, of its blocks in their order."""
    memory = np.empty(like.nbytes + _ALIGNED, np.uint8)
    begin = -memory.ctypes.data % _ALIGNED
    values = memory[begin : begin + like.nbytes].view(like.dtype)
    for first, block in zip(range(0, values.size, SIZE), blocks):
        part = values[first : first + SIZE]
        part[:] = np.asarray(block)[: part.size]
    device = like.device if like.committed else None
    return jax.device_put(values.reshape(like.shape), device)
