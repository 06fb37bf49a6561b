"""A checksum of arrays that does not depend on how they are sharded.

Orbax loads a flipped bit without a word, and the bytes of a sharded array lie on many hosts. So the
checksum is a sum over the elements, computed where they are: each shard adds its own and only the
sums travel.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, UInt32

from jaxmerge.checkpoints.source import Source
from jaxmerge.errors import JaxmergeError
from jaxmerge.trees import PyTree, named_leaves


class LeafDigest(NamedTuple):
    """What one pass over a leaf finds."""

    checksum: str  # 16 hexadecimal digits
    finite: bool  # no value is NaN or infinite


class Computing(NamedTuple):
    """A digest on its way: of arrays that may not be there yet."""

    lanes: UInt32[Array, " 2"]
    finite: Bool[Array, ""]


def start(leaf: Array | np.ndarray) -> Computing:
    """Begins to digest a leaf, where it is, and returns at once."""
    return Computing(*_leaf_digest(leaf, _hashes(leaf.shape, leaf.dtype)))


def finish(computing: Mapping[str, Computing]) -> dict[str, LeafDigest]:
    """Waits for the digests that were begun."""
    return {
        name: LeafDigest(checksum(lanes), bool(finite))
        for name, (lanes, finite) in jax.device_get(dict(computing)).items()
    }


def checksum(lanes: UInt32[np.ndarray, " 2"]) -> str:
    """The lanes of a leaf as 16 hexadecimal digits."""
    return f"{int(lanes[0]):08x}{int(lanes[1]):08x}"


def digests(tree: PyTree) -> dict[str, LeafDigest]:
    """The digest of each leaf, by leaf name; the arrays are read once and stay where they are."""
    return finish({name: start(leaf) for name, leaf in named_leaves(tree).items()})


def fingerprint(tree: PyTree, leaf_digests: dict[str, LeafDigest]) -> str:
    """One checksum of a tree: names, shapes, dtypes and values; 16 hexadecimal digits."""
    lines = [
        f"{name} {leaf.dtype} {tuple(leaf.shape)} {leaf_digests[name].checksum}"
        for name, leaf in sorted(named_leaves(tree).items())
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def check_digests(source: Source, found: Mapping[str, LeafDigest]) -> None:
    """Raises `JaxmergeError` unless the leaves are those that were saved, as far as is known."""
    wrong = [
        name for name, checksum in source.checksums.items() if found[name].checksum != checksum
    ]
    if wrong:
        raise JaxmergeError(
            f"the data are not those that were saved, in leaf {', '.join(wrong)}",
            where=source.path,
            expected=f"checksum {source.checksums[wrong[0]]}",
            found=found[wrong[0]].checksum,
        )


def words(values: np.ndarray, per_word: int) -> UInt32[np.ndarray, " *W"]:
    """The bits of values in C order as the words that are digested.

    Args:
        values: their number along the last axis is a multiple of `per_word`.
        per_word: see `values_per_word`.
    """
    if per_word > 1 or values.dtype.itemsize == 4:
        return values.view(np.uint32)
    if values.dtype == np.bool_:
        return values.astype(np.uint32)
    return values.view({1: np.uint8, 2: np.uint16}[values.dtype.itemsize]).astype(np.uint32)


def values_per_word(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """How many neighbours share a word: as many as fit, where they fill all words of a row."""
    fitting = 4 // dtype.itemsize
    return fitting if dtype != np.bool_ and shape and shape[-1] % fitting == 0 else 1


def positions(
    shape: tuple[int, ...], dtype: np.dtype, first: int, out: UInt32[np.ndarray, " W"]
) -> None:
    """Sets out[:] to the positions of a leaf's words in C order, from word `first` on."""
    *axes, last = _hashes(shape, dtype) or (np.zeros(1, np.uint32),)
    width = len(last)
    start = first // width
    of_row = _of_rows(axes, start, -(-(first + out.size) // width))
    begin = first - start * width
    head = min(-first % width, out.size)
    tail = head + (out.size - head) // width * width
    middle = out[head:tail].reshape(-1, width)
    np.add(of_row[bool(head) :][: len(middle), None], last, out=middle)
    if head:
        np.add(last[begin : begin + head], of_row[0], out=out[:head])
    if tail < out.size:
        np.add(last[: out.size - tail], of_row[-1], out=out[tail:])


def _of_rows(axes: Sequence[np.ndarray], start: int, stop: int) -> UInt32[np.ndarray, " _"]:
    """The sums of the hashes of places [start, stop) of some axes, in C order."""
    if len(axes) == 1:
        return axes[0][start:stop]
    of_row = np.zeros(stop - start, np.uint32)
    if axes:
        places = np.unravel_index(np.arange(start, stop), [len(axis) for axis in axes])
        for hashed, place in zip(axes, places):
            of_row += hashed[place]
    return of_row


@functools.cache
def _hashes(shape: tuple[int, ...], dtype: Any) -> tuple[np.ndarray, ...]:
    """A hash of each place on each axis of a leaf's words; a word's position is their sum."""
    of_leaf = jax.eval_shape(_words, jax.ShapeDtypeStruct(shape, dtype))
    # Seeds far apart: next to each other, they would give [1, 1] and [2, 0] the same position.
    return tuple(
        _mix(np.arange(size, dtype=np.uint32) + np.uint32(0x9E3779B9 * (axis + 1) % 2**32))
        for axis, size in enumerate(of_leaf.shape)
    )


@jax.jit
def _leaf_digest(
    leaf: Array, hashes: tuple[UInt32[Array, " _"], ...]
) -> tuple[UInt32[Array, " 2"], Bool[Array, ""]]:
    """Sums over the words of mix(word ^ position), plain and weighted by position; and all finite.

    `mix` is a bijection: any change of a single word changes the first sum; other changes go unseen
    with a chance of about 2^-64, exchanged words of 2^-32.
    """
    words = _words(leaf)
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis, hashed in enumerate(hashes):
        others = [other for other in range(words.ndim) if other != axis]
        position += jnp.expand_dims(hashed, others)
    lanes, not_finite = _sums(words, position, leaf.dtype, tuple(range(words.ndim)))
    return lanes, not_finite == 0


# All of the register: XLA takes half of it unless told, and is a third slower here. On CPUs alone.
@functools.partial(
    jax.jit, static_argnames="dtype", compiler_options={"xla_cpu_prefer_vector_width": 512}
)
def block_sums(
    words_RxW: UInt32[Array, "R W"], position_W: UInt32[Array, " W"], dtype: Any
) -> UInt32[Array, "R 3"]:
    """What a block of words adds to the digests of R leaves that are alike.

    The lanes of a leaf are the sums of those of its blocks, modulo 2^32. Words and positions that
    are 0 add nothing, so that a short block can be filled up with them.

    Args:
        words_RxW: the bits of R leaves, see `words`.
        position_W: see `positions`.
        dtype: of the leaves.

    Returns:
        The two lanes of each leaf, and a word that is not 0 where a value is NaN or infinite.
    """
    position = jnp.broadcast_to(position_W[None], words_RxW.shape)
    lanes, not_finite = _sums(words_RxW, position, dtype, (1,))
    return jnp.stack([*lanes, not_finite], axis=1)


def _sums(words: Array, position: Array, dtype: Any, axes: tuple[int, ...]) -> tuple[Array, Array]:
    mixed = _mix(words ^ position)
    carried, signs = _not_finite(words, dtype)
    # One reduction for all: several would keep `mixed`, as large as the leaf, in between.
    *lanes, carried = jax.lax.reduce(
        (mixed, mixed * (position | 1), carried),
        (jnp.uint32(0),) * 3,
        lambda one, other: (one[0] + other[0], one[1] + other[1], one[2] | other[2]),
        axes,
    )
    return jnp.stack(lanes), carried & signs


# The bits of a value that are all ones where it is NaN or infinite, and in no other value.
_EXPONENT = {
    "float32": 0x7F800000,
    "bfloat16": 0x7F80,
    "float16": 0x7C00,
    "float8_e4m3fn": 0x7F,  # has NaN and no infinity
    "float8_e5m2": 0x7C,
}


def _not_finite(words: Array, dtype: jnp.dtype) -> tuple[Array, np.uint32]:
    """Words, and the bits of them that are not 0 where one of the values is NaN or infinite."""
    if not jnp.issubdtype(dtype, jnp.floating):
        return jnp.zeros_like(words), np.uint32(0)
    if dtype.name not in _EXPONENT:
        raise JaxmergeError(
            "the dtype is not known", expected=", ".join(_EXPONENT), found=dtype.name
        )
    exponent = _EXPONENT[dtype.name]
    lowest, sign = exponent & -exponent, 1 << (8 * dtype.itemsize - 1)
    exponents, lowests, signs = (
        np.uint32(sum(bits << shift for shift in range(0, 32, 8 * dtype.itemsize)))
        for bits in (exponent, lowest, sign)
    )
    # Added to all ones, the lowest bit carries into the place of the sign.
    return (words & exponents) + lowests, signs


def _words(leaf: Array) -> Array:
    """The bits of a leaf as uint32: neighbours along the last axis share a word where they fit."""
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    per_word = values_per_word(leaf.shape, leaf.dtype)
    if per_word > 1:
        leaf = leaf.reshape(*leaf.shape[:-1], leaf.shape[-1] // per_word, per_word)
    elif leaf.dtype.itemsize < 4:
        unsigned = {1: jnp.uint8, 2: jnp.uint16}[leaf.dtype.itemsize]
        return jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(leaf, jnp.uint32)


def _mix(x: Any) -> Any:
    """A bijection of uint32 in which every input bit moves about half of the output bits.

    The shifts and constants are those of the public-domain MurmurHash3 finaliser.
    """
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
