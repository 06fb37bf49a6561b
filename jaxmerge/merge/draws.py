"""Random bits for each value of a tensor, the same on any mesh, in any order, at once or in parts.

The bits of a value are Threefry-2x32 with 20 rounds (Salmon et al., "Parallel random numbers: as
easy as 1, 2, 3", SC 2011) of its place in the tensor, under a key that is made of the seed, the
tensor's name and the number of the checkpoint. There is no state that draws could share.
"""

from __future__ import annotations

import zlib

import jax.numpy as jnp
import numpy as np
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
    first, second = _threefry(low, name, jnp.asarray(checkpoint, jnp.uint32), high)
    place = places(shape)
    random, _ = _threefry(first, second, place, jnp.zeros_like(place))
    # 24 bits are as many as float32 tells apart.
    return (random >> 8).astype(jnp.float32) < probability * 2.0**24


_TURNS = (13, 15, 26, 6, 17, 29, 16, 24)  # of Threefry-2x32


def _threefry(key0: Array, key1: Array, x0: Array, x1: Array) -> tuple[Array, Array]:
    """Written out, so that it is computed value by value; JAX's own writes each round to memory."""
    keys = key0, key1, key0 ^ key1 ^ np.uint32(0x1BD11BDA)
    x0, x1 = x0 + keys[0], x1 + keys[1]
    for round in range(20):
        turn = _TURNS[round % 8]
        x0 = x0 + x1
        x1 = ((x1 << turn) | (x1 >> (32 - turn))) ^ x0
        if round % 4 == 3:
            i = round // 4 + 1
            x0 = x0 + keys[i % 3]
            x1 = x1 + keys[(i + 1) % 3] + np.uint32(i)
    return x0, x1
