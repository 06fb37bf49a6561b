"""A checksum of arrays that does not depend on how they are sharded.

Orbax loads a flipped bit without a word, and the bytes of a sharded array lie on many hosts. So the
checksum is a sum over the elements, computed where they are: each shard adds its own and only the
sums travel.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
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
        name: LeafDigest(f"{int(lanes[0]):08x}{int(lanes[1]):08x}", bool(finite))
        for name, (lanes, finite) in jax.device_get(dict(computing)).items()
    }


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


@functools.cache
def _hashes(shape: tuple[int, ...], dtype: Any) -> tuple[np.ndarray, ...]:
    """A hash of each place on each axis of a leaf's words; a word's position is their sum."""
    words = jax.eval_shape(_words, jax.ShapeDtypeStruct(shape, dtype))
    # Seeds far apart: next to each other, they would give [1, 1] and [2, 0] the same position.
    return tuple(
        _mix(np.arange(size, dtype=np.uint32) + np.uint32(0x9E3779B9 * (axis + 1) % 2**32))
        for axis, size in enumerate(words.shape)
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
    mixed = _mix(words ^ position)
    # One reduction for all: several would keep `mixed`, as large as the leaf, in between.
    *lanes, not_finite = jax.lax.reduce(
        (mixed, mixed * (position | 1), _not_finite(words, leaf.dtype)),
        (jnp.uint32(0),) * 3,
        lambda one, other: (one[0] + other[0], one[1] + other[1], one[2] | other[2]),
        tuple(range(words.ndim)),
    )
    return jnp.stack(lanes), not_finite == 0


# The bits of a value that are all ones where it is NaN or infinite, and in no other value.
_EXPONENT = {
    "float32": 0x7F800000,
    "bfloat16": 0x7F80,
    "float16": 0x7C00,
    "float8_e4m3fn": 0x7F,  # has NaN and no infinity
    "float8_e5m2": 0x7C,
}


def _not_finite(words: Array, dtype: jnp.dtype) -> Array:
    """Words that are not 0 where one of their values is NaN or infinite."""
    if not jnp.issubdtype(dtype, jnp.floating):
        return jnp.zeros_like(words)
    if dtype.name not in _EXPONENT:
        raise JaxmergeError(
            "the dtype is not known", expected=", ".join(_EXPONENT), found=dtype.name
        )
    exponent = _EXPONENT[dtype.name]
    lowest, sign = exponent & -exponent, 1 << (8 * dtype.itemsize - 1)
    exponents, lowests, signs = (
        jnp.uint32(sum(bits << shift for shift in range(0, 32, 8 * dtype.itemsize)))
        for bits in (exponent, lowest, sign)
    )
    # Added to all ones, the lowest bit carries into the place of the sign.
    return ((words & exponents) + lowests) & signs


def _words(leaf: Array) -> Array:
    """The bits of a leaf as uint32: neighbours along the last axis share a word where they fit."""
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    per_word = 4 // leaf.dtype.itemsize
    if per_word > 1 and leaf.ndim and leaf.shape[-1] % per_word == 0:
        leaf = leaf.reshape(*leaf.shape[:-1], leaf.shape[-1] // per_word, per_word)
    elif per_word > 1:
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
