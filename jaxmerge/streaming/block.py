"""The merge of one block: the same stretch of a tensor of every checkpoint, in reused memory."""

from __future__ import annotations

import functools
import math
import mmap
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from jaxmerge.checkpoints import digest
from jaxmerge.merge.linear import weighted_sum

_PAGE = mmap.PAGESIZE


class Kind(NamedTuple):
    """What blocks must have in common to go through one compiled program.

    Attributes:
        stored: dtype of the tensor in each checkpoint.
        merged: dtype that the values are cast to first, and that the sum is rounded to.
        written: dtype of the result, cast from `merged`.
    """

    stored: tuple[np.dtype, ...]
    merged: np.dtype
    written: np.dtype

    def bits(self, dtype: np.dtype) -> np.dtype:
        """What rows of a dtype are for the merge: words, if all values have as many bytes."""
        alike = len({each.itemsize for each in (*self.stored, self.written)}) == 1
        return np.dtype(np.uint32) if alike else _unsigned(dtype)

    def memory(self, outputs: int, size: int) -> int:
        """Bytes that a block of so many values takes, positions and results included."""
        stored = sum(dtype.itemsize for dtype in self.stored)
        results = 2 * outputs * self.written.itemsize  # the end of a tensor is copied
        dtypes = len({*self.stored, self.written})
        return size * (stored + 4 * dtypes + results) + 2 * dtypes * _PAGE


class Merged(NamedTuple):
    """What a block gives.

    Attributes:
        values_PxC: the results. The next block takes their memory, if they are let go before;
            otherwise it needs new memory, which has to be faulted in page by page.
        lanes_Rx2: what the block adds to the digests of the checkpoints and then of the results.
        finite_R: whether there is no NaN and nothing infinite in them.
    """

    values_PxC: Sequence[np.ndarray]
    lanes_Rx2: UInt32[np.ndarray, "R 2"]
    finite_R: np.ndarray


class _Rows(NamedTuple):
    """Rows of values of one dtype, and their bits as words, four bytes each."""

    values: np.ndarray
    words: Array | np.ndarray


class Block:
    """Memory for blocks of one kind, and the merge of what is in it.

    Args:
        kind: of the tensors.
        weights_PxK: one row of weights for each result.
        memory: see `pages`; at least `kind.memory` bytes.
        size: values of a block, a multiple of 4.
    """

    def __init__(
        self, kind: Kind, weights_PxK: Float[np.ndarray, "P K"], memory: np.ndarray, size: int
    ):
        self.kind, self.size = kind, size
        self._weights = [jnp.asarray(weights_K, jnp.float32) for weights_K in weights_PxK]
        dense = self._dense = len(kind.stored) > 1 and bool(np.all(weights_PxK != 0))
        counts, at = Counter(kind.stored), 0

        def take(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
            nonlocal at
            begin, stop = at, at + math.prod(shape) * dtype.itemsize
            at = -(-stop // _PAGE) * _PAGE
            return memory[begin:stop].view(dtype).reshape(shape)

        stored = {dtype: take((count, size), dtype) for dtype, count in counts.items()}
        self._stored = {
            dtype: _Rows(rows, shared(rows.view(np.uint32))) for dtype, rows in stored.items()
        }
        self._positions = {
            dtype: _Positions(take((size,), np.dtype(np.uint32)), dtype)
            for dtype in {*counts, kind.written}
        }
        places = [(dtype, kind.stored[:k].count(dtype)) for k, dtype in enumerate(kind.stored)]
        # Where the values of each checkpoint belong.
        self.rows = [stored[dtype][row] for dtype, row in places]
        self._program = program(kind, tuple((dtype.name, row) for dtype, row in places), dense)
        # Of the digests, which come dtype by dtype, and then those of the results.
        by_dtype = [(dtype, row) for dtype, count in counts.items() for row in range(count)]
        self._order = np.array([by_dtype.index(place) for place in places])
        self._inputs = {
            dtype.name: shared(rows.view(kind.bits(dtype))) for dtype, rows in stored.items()
        }
        bits = kind.bits(kind.written)
        self._results = [
            jnp.zeros((1, size * kind.written.itemsize // bits.itemsize), bits) for _ in weights_PxK
        ]

    def merge(self, shape: tuple[int, ...], first: int, count: int) -> Merged:
        """Merges and digests what is in the rows.

        Args:
            shape: of the tensor.
            first: place of the first value in the tensor, in C order.
            count: of the values.
        """
        if count < self.size:
            for row in self.rows:
                _clear(row[count:])
        positions = {dtype: at.set(shape, first, count) for dtype, at in self._positions.items()}
        # Of what is not finite nothing finite is made if all weights count: then the results tell.
        sums = [
            _row_sums(rows, shape, positions[dtype], look=not self._dense)
            for dtype, rows in self._stored.items()
        ]
        of_stored = np.concatenate(sums)[self._order]
        merged, of_results = [], []
        for result, weights_K in enumerate(self._weights):
            bits = self._program(self._inputs, weights_K, self._results[result])
            self._results[result] = bits
            values = np.asarray(bits).view(self.kind.written)
            if count < self.size:  # what follows may be -0, and must be +0 for digests
                values = values.copy()
                _clear(values[0, count:])
            as_made = count == self.size and bits.dtype == np.uint32
            rows = _Rows(values, bits if as_made else values.view(np.uint32))
            of_results.append(_row_sums(rows, shape, positions[self.kind.written], look=True))
            merged.append(values[0, :count])
        sums_Rx3 = np.concatenate([of_stored, *of_results])
        finite_R = sums_Rx3[:, 2] == 0
        if self._dense and not finite_R.all():
            finite_R[: len(self.rows)] = [_finite(row) for row in self.rows]
        return Merged(merged, sums_Rx3[:, :2], finite_R)


def _clear(values: np.ndarray) -> None:
    """Sets contiguous values to 0, as bytes: NumPy sets values of bfloat16 one by one."""
    values.view(np.uint8)[:] = 0


def _finite(row: np.ndarray) -> bool:
    return not jnp.issubdtype(row.dtype, jnp.floating) or bool(np.isfinite(row).all())


def _row_sums(
    rows: _Rows, shape: tuple[int, ...], positions: Array, *, look: bool
) -> UInt32[np.ndarray, "R 3"]:
    """See `digest.block_sums`; `look` for values that are not finite."""
    dtype = rows.values.dtype
    per_word = digest.values_per_word(shape, dtype)
    whole = per_word * dtype.itemsize == 4
    words = rows.words if whole else digest.words(rows.values, per_word)
    return np.asarray(digest.block_sums(words, positions, dtype if look else np.dtype(np.uint32)))


class _Positions:
    """The positions of the words of rows of one dtype, in memory that is used again."""

    def __init__(self, memory: np.ndarray, dtype: np.dtype):
        self._memory, self._dtype = memory, dtype
        self._on_device: dict[int, Array] = {}  # by values in a word

    def set(self, shape: tuple[int, ...], first: int, count: int) -> Array:
        """Those of values [first, first + count) of leaves of this shape, and then 0."""
        per_word = digest.values_per_word(shape, self._dtype)
        used, size = -(-count // per_word), self._memory.size // per_word
        digest.positions(shape, self._dtype, first // per_word, self._memory[:used])
        if used < size:
            self._memory[used:size] = 0
        if per_word not in self._on_device:
            self._on_device[per_word] = shared(self._memory[:size])
        return self._on_device[per_word]


def shared(values: np.ndarray) -> Array:
    """An array of JAX on the host in the very memory of values in `pages`.

    It may be given to programs again and again while the values change, as long as each program has
    ended before they do: to hand the values over anew takes longer than to merge them.
    """
    return jax.dlpack.from_dlpack(values, copy=False)


def pages(size: int) -> np.ndarray:
    """Bytes in pages of their own, so that JAX on the CPU takes them as they are."""
    return np.frombuffer(mmap.mmap(-1, -(-size // _PAGE) * _PAGE), np.uint8)


Program = Callable[[dict[str, Array], Array, Array], Array]


@functools.cache
def program(kind: Kind, places: tuple[tuple[str, int], ...], dense: bool) -> Program:
    """The compiled merge of rows: `(their bits by dtype, weights_K, old_1xW) -> bits_1xW`.

    The third argument is a result that is not needed any more: the new one takes its memory.

    Args:
        kind: of the block.
        places: name of the dtype, and row, of each checkpoint.
        dense: see `weighted_sum`.
    """

    def merge(rows: dict[str, Array], weights_K: Array, old_1xW: Array) -> Array:
        leaves = [
            [_cast(part, kind.merged) for part in _parts(rows[name][row], dtype)]
            for (name, row), dtype in zip(places, kind.stored)
        ]
        merged = [weighted_sum(parts, weights_K, dense=dense) for parts in zip(*leaves)]
        return _joined([part.astype(kind.written) for part in merged])[None]

    # XLA may pass over a rounding to fewer bits that is followed by a widening. And it takes half
    # of the register unless told, see `digest.block_sums`.
    options = {"xla_allow_excess_precision": False, "xla_cpu_prefer_vector_width": 512}
    return jax.jit(merge, donate_argnums=2, keep_unused=True, compiler_options=options)


def _parts(bits: Array, dtype: np.dtype) -> list[Array]:
    """The first values of all words, the second ones, and so on.

    Values that share a word are merged apart: to widen half a register and to narrow it again
    takes longer than their merge.
    """
    unsigned, width = _unsigned(dtype), 8 * dtype.itemsize
    parts = [(bits >> at).astype(unsigned) for at in range(0, 8 * bits.dtype.itemsize, width)]
    if dtype == np.bool_:
        return [part != 0 for part in parts]
    return [jax.lax.bitcast_convert_type(part, dtype) for part in parts]


def _joined(parts: Sequence[Array]) -> Array:
    """The words of what `_parts` gives."""
    unsigned = _unsigned(parts[0].dtype)
    if parts[0].dtype == jnp.bool_:
        bits = [part.astype(unsigned) for part in parts]
    else:
        bits = [jax.lax.bitcast_convert_type(part, unsigned) for part in parts]
    if len(bits) == 1:
        return bits[0]
    width = 32 // len(bits)
    shifted = (part.astype(jnp.uint32) << (i * width) for i, part in enumerate(bits))
    return functools.reduce(jnp.bitwise_or, shifted)


def _unsigned(dtype: np.dtype) -> np.dtype:
    """Integers of as many bytes."""
    return np.dtype(f"uint{8 * dtype.itemsize}")


def _cast(leaf: Array, dtype: np.dtype) -> Array:
    return leaf.astype(dtype) if jnp.issubdtype(dtype, jnp.floating) else leaf


def kinds(stored: Sequence[Sequence[np.dtype]], merged: str, written: str) -> list[Kind]:
    """The kind of each tensor.

    Args:
        stored: for each tensor its dtype in each checkpoint.
        merged: dtype that floating-point values are cast to; "" keeps that of the first checkpoint.
        written: dtype of floating-point results; "" keeps that.
    """
    found = []
    for dtypes in stored:
        first = np.dtype(dtypes[0])
        floating = jnp.issubdtype(first, jnp.floating)
        inner = jnp.dtype(merged) if merged and floating else first
        outer = jnp.dtype(written) if written and floating else inner
        found.append(Kind(tuple(map(np.dtype, dtypes)), np.dtype(inner), np.dtype(outer)))
    return found
