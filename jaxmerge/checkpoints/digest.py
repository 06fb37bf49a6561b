"""A checksum of arrays that does not depend on how they are sharded.

Orbax loads a flipped bit without a word, and the bytes of a sharded array lie on many hosts. So the
checksum is a sum over the elements, computed where they are: each shard adds its own and only the
sums travel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
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


def start(leaf: Array) -> Computing:
    """Begins to digest a leaf, where it is, and returns at once."""
    return Computing(*_leaf_digest(leaf))


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


@jax.jit
def _leaf_digest(leaf: Array) -> tuple[UInt32[Array, " 2"], Bool[Array, ""]]:
    """Sums over the words of mix(word ^ position), plain and weighted by position; and all finite.

    `mix` is a bijection: any change of a single word changes the first sum; other changes go unseen
    with a chance of about 2^-64, exchanged words of 2^-32.
    """
    words = _words(leaf)
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        # Far apart: seeds next to each other would give [1, 1] and [2, 0] the same position.
        seed = jnp.uint32(0x9E3779B9 * (axis + 1) % 2**32)
        hashed = _mix(jnp.arange(size, dtype=jnp.uint32) + seed)
        others = [other for other in range(words.ndim) if other != axis]
        position += jnp.expand_dims(hashed, others)
    mixed = _mix(words ^ position)
    # One reduction for both sums: two would keep `mixed`, as large as the leaf, in between.
    lanes = jax.lax.reduce(
        (mixed, mixed * (position | 1)),
        (jnp.uint32(0), jnp.uint32(0)),
        lambda one, other: (one[0] + other[0], one[1] + other[1]),
        tuple(range(words.ndim)),
    )
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    # 0 * x is NaN for NaN and infinity; a sum needs no memory and, unlike a maximum, passes NaN on
    # from one device to the others.
    zero = jnp.sum(0 * leaf.astype(jnp.float32)) if floating else jnp.zeros(())
    return jnp.stack(lanes), jnp.isfinite(zero)


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


def _mix(x: Array) -> Array:
    """A bijection of uint32 in which every input bit moves about half of the output bits.

    The shifts and constants are those of the public-domain MurmurHash3 finaliser.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
