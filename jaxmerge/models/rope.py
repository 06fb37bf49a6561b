"""Rotary position embedding (RoPE, arXiv 2104.09864), with the scalings for long contexts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Rope:
    """Which pairs of a head's values turn, and how fast."""

    theta: float = 10_000.0  # base of the frequencies
    width: int = 0  # the first values of a head, which turn; 0: all
    interleaved: bool = False  # pairs are (2c, 2c + 1) rather than (c, c + width/2)

    @staticmethod
    def from_plain(fields: Mapping[str, Any]) -> Rope:
        return Rope(**fields)


def turns(
    rope: Rope | None, positions_BxT: Int[Array, "B T"], pairs: int
) -> tuple[Float[Array, "B T W"], Float[Array, "B T W"]]:
    """Cosine and sine of each pair's angle, position * theta^(-w / W), in float32.

    Args:
        rope: None: all angles are 0.
        positions_BxT: of the tokens.
        pairs: W, how many pairs of a head turn.
    """
    positions = positions_BxT[:, :, None].astype(jnp.float32)
    if rope is None:
        angles = jnp.zeros((*positions_BxT.shape, pairs))
    else:
        frequency_W = rope.theta ** (-jnp.arange(pairs, dtype=jnp.float32) / pairs)
        angles = positions * frequency_W[None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x_BxTxHxC: Float[Array, "B T H C"],
    cos_BxTxW: Float[Array, "B T W"],
    sin_BxTxW: Float[Array, "B T W"],
    interleaved: bool = False,
) -> Float[Array, "B T H C"]:
    """Turns the pairs of the first 2W values of each head; the rest stays."""
    cos, sin = cos_BxTxW[:, :, None], sin_BxTxW[:, :, None]
    width = 2 * cos_BxTxW.shape[-1]
    x, rest = x_BxTxHxC[..., :width].astype(jnp.float32), x_BxTxHxC[..., width:]
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)
    else:
        a, b = jnp.split(x, 2, axis=-1)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return jnp.concatenate([turned.astype(x_BxTxHxC.dtype), rest], axis=-1)
