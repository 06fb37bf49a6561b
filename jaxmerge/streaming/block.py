"""The merge of one block: the same stretch of a tensor of every checkpoint, in reused memory."""

from __future__ import annotations

import functools
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
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32}  # by bytes


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

    def rows(self, outputs: int) -> Counter[np.dtype]:
        """How many rows of each dtype a block has: one for each checkpoint and each result."""
        return Counter(self.stored) + Counter({self.written: outputs})

    def memory(self, outputs: int, size: int) -> int:
        """Bytes that a block of so many values takes, positions and results included."""
        rows = self.rows(outputs)
        held = sum(dtype.itemsize * count for dtype, count in rows.items())
        result = outputs * self.written.itemsize
        return size * (held + 4 * len(rows) + result) + 2 * len(rows) * _PAGE


class Digested(NamedTuple):
    """What a block adds to the digests of the checkpoints and the results, in this order."""

    lanes_Rx2: UInt32[np.ndarray, "R 2"]
    finite_R: np.ndarray


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
        self._kind, self._weights, self.size = kind, jnp.asarray(weights_PxK, jnp.float32), size
        outputs = len(weights_PxK)
        dense = len(kind.stored) > 1 and bool(np.all(weights_PxK != 0))
        self._rows: dict[str, np.ndarray] = {}
        self._positions: dict[str, np.ndarray] = {}
        at = 0
        for dtype, count in kind.rows(outputs).items():
            for held, shape, of in (
                (self._rows, (count, self.size), dtype),
                (self._positions, (self.size,), np.dtype(np.uint32)),
            ):
                stop = at + int(np.prod(shape)) * of.itemsize
                held[dtype.name] = memory[at:stop].view(of).reshape(shape)
                at = -(-stop // _PAGE) * _PAGE
        placed: Counter[str] = Counter()
        self._places: list[tuple[str, int]] = []  # of each checkpoint, then of each result
        for dtype in (*kind.stored, *[kind.written] * outputs):
            self._places.append((dtype.name, placed[dtype.name]))
            placed[dtype.name] += 1
        # Where the values of each checkpoint belong, and then those of each result are.
        self.rows = [self._rows[name][row] for name, row in self._places]
        stored = len(kind.stored)
        self._program = program(kind, tuple(self._places[:stored]), dense)
        self._on_device = {name: shared(bits(rows)) for name, rows in self._rows.items()}
        self._words = {name: _Words(self._rows[name], self._positions[name]) for name in self._rows}

    def merge(self, count: int) -> None:
        """Sets the rows of the results to the merges of the first `count` values of the others."""
        stored = len(self._kind.stored)
        if count < self.size:
            for row in self.rows:
                row[count:] = 0
        merged_PxB = np.asarray(self._program(self._on_device, self._weights))
        for row, merged in zip(self.rows[stored:], merged_PxB):
            row[:count] = merged[:count]

    def digest(self, shape: tuple[int, ...], first: int, count: int) -> Digested:
        """Digests all rows, as values [first, first + count) of leaves of this shape."""
        lanes, bad = {}, {}
        for name, words in self._words.items():
            lanes[name], bad[name] = words.sums(shape, first, count)
        return Digested(
            np.stack([lanes[name][:, row] for name, row in self._places]),
            np.array([bad[name][row] == 0 for name, row in self._places]),
        )


class _Words:
    """The rows of one dtype as what is digested, and memory for the positions of their words."""

    def __init__(self, rows: np.ndarray, positions: np.ndarray):
        self._rows, self._positions = rows, positions
        self._on_device: dict[int, tuple[Array, Array]] = {}  # by values in a word

    def sums(self, shape: tuple[int, ...], first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """See `digest.block_sums`, of values [first, first + count) of leaves of this shape."""
        dtype = self._rows.dtype
        per_word = digest.values_per_word(shape, dtype)
        words, used = self._rows.shape[1] // per_word, -(-count // per_word)
        positions = self._positions[:words]
        digest.positions(shape, dtype, first // per_word, positions[:used])
        positions[used:] = 0
        if per_word == 1 and dtype.itemsize < 4:  # words that are made anew, wider than the values
            lanes, bad = digest.block_sums(digest.words(self._rows, 1), positions, dtype)
        else:
            if per_word not in self._on_device:
                of_rows = digest.words(self._rows, per_word)
                self._on_device[per_word] = shared(of_rows), shared(positions)
            lanes, bad = digest.block_sums(*self._on_device[per_word], dtype)
        return np.asarray(lanes), np.asarray(bad)


def shared(values: np.ndarray) -> Array:
    """An array of JAX on the host in the very memory of values in `pages`.

    It may be given to programs again and again while the values change, as long as each program has
    ended before they do: to hand the values over anew takes longer than to merge them.
    """
    return jax.dlpack.from_dlpack(values, copy=False)


def bits(values: np.ndarray) -> np.ndarray:
    """The same memory as unsigned integers, which every exchange of arrays knows."""
    return values.view(_BITS[values.dtype.itemsize])


def pages(size: int) -> np.ndarray:
    """Bytes in pages of their own, so that JAX on the CPU takes them as they are."""
    return np.frombuffer(mmap.mmap(-1, -(-size // _PAGE) * _PAGE), np.uint8)


Program = Callable[[dict[str, Array], Array], Array]


@functools.cache
def program(kind: Kind, places: tuple[tuple[str, int], ...], dense: bool) -> Program:
    """The compiled merge of rows: `(their bits by dtype, weights_PxK) -> merged_PxB`.

    Args:
        kind: of the block.
        places: name of the dtype, and row, of each checkpoint.
        dense: see `weighted_sum`.
    """

    def merge(rows: dict[str, Array], weights_PxK: Array) -> Array:
        leaves = [
            _cast(_values(rows[name][row], dtype), kind.merged)
            for (name, row), dtype in zip(places, kind.stored)
        ]

        def one(weights_K: Array) -> Array:
            return weighted_sum(leaves, weights_K, dense=dense)

        return jax.vmap(one)(weights_PxK).astype(kind.written)

    # XLA may pass over a rounding to fewer bits that is followed by a widening.
    return jax.jit(merge, compiler_options={"xla_allow_excess_precision": False})


def _values(row: Array, dtype: np.dtype) -> Array:
    """Values from their bits."""
    if dtype == np.bool_:
        return row != 0
    return jax.lax.bitcast_convert_type(row, dtype)


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
