"""Random bits for each value of a tensor, the same on any mesh, in any order, at once or in parts.

The bits of a value are Threefry-2x32 with 20 rounds (Salmon et al., "Parallel random numbers: as
easy as 1, 2, 3", SC 2011) of its place in the tensor, under a key that is made of the seed, the
tensor's name and the number of the checkpoint. There is no state that draws could share.
"""

from __future__ import annotations

import zlib

import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry2x32_p
from jaxtyping import Array, Bool, Float, UInt32

from jaxmerge.merge.selection import places


def key(seed: int, name: str) -> UInt32[np.ndarray, " words"]:
    """What stands for the seed, of which 64 bits count, and the name of a tensor."""
    words = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, zlib.crc32(name.encode())
    return np.array(words, np.uint32)


def drawn(
    probability: Float[Array, "*P"],
    key: UInt32[Array, " words"],
    checkpoint: Array,
    shape: tuple[int, ...],
) -> Bool[Array, "*S"]:
    """True for each value with its own probability, in steps of 2^-24.

    0 is never drawn and 1 always. The same places are drawn for a greater probability, and more.

    Args:
        probability: of each value, or of all.
        key: see `key`.
        checkpoint: its number, uint32.
        shape: of the tensor.
    """
    low, high, name = key
    first, second = threefry2x32_p.bind(low, name, jnp.asarray(checkpoint, jnp.uint32), high)
    place = places(shape)
    random, _ = threefry2x32_p.bind(
        jnp.broadcast_to(first, shape),
        jnp.broadcast_to(second, shape),
        place,
        jnp.zeros_like(place),
    )
    # 24 bits are as many as float32 tells apart.
    return (random >> 8).astype(jnp.float32) < probability * 2.0**24
