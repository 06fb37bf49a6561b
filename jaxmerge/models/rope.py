"""Rotary position embedding (RoPE, arXiv 2104.09864), with the scalings for long contexts."""

from __future__ import annotations

import dataclasses
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmerge.errors import JaxmergeError

Parameter = bool | float | tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Rope:
    """Which pairs of a head's values turn, and how fast.

    Raises:
        JaxmergeError: a scaling that is not in `SCALINGS`, or parameters that it does not take.
    """

    theta: float = 10_000.0  # base of the frequencies
    width: int = 0  # the first values of a head, which turn; 0: all
    interleaved: bool = False  # pairs are (2c, 2c + 1) rather than (c, c + width/2)
    scaling: str = "default"  # a name in SCALINGS
    parameters: tuple[tuple[str, Parameter], ...] = ()  # of the scaling, by name

    def __post_init__(self):
        if self.scaling not in SCALINGS:
            raise JaxmergeError(
                "unknown scaling of rotary positions",
                where="rope",
                expected=", ".join(SCALINGS),
                found=self.scaling,
            )
        try:
            inspect.signature(SCALINGS[self.scaling]).bind(None, None, **dict(self.parameters))
        except TypeError as error:
            raise JaxmergeError(
                f"parameters that the scaling {self.scaling!r} does not take: {error}",
                where="rope",
                expected=", ".join(list(inspect.signature(SCALINGS[self.scaling]).parameters)[2:])
                or "none",
                found=str(dict(self.parameters)),
            ) from None
        given = {"theta": self.theta, **dict(self.parameters)}
        if not all(map(_is_sound, given.values())) or not given["theta"] * given.get("factor", 1.0):
            raise JaxmergeError(
                "a parameter of rotary positions is no finite number, negative, or 0",
                where="rope",
                expected="numbers above 0, or lists of them",
                found=str(given)[:300],
            )

    @staticmethod
    def from_plain(fields: Mapping[str, Any]) -> Rope:
        values = dict(fields)
        values["parameters"] = tuple(
            (name, tuple(value) if isinstance(value, list) else value)
            for name, value in fields.get("parameters", ())
        )
        return Rope(**values)


def _is_sound(value: Any) -> bool:
    numbers = value if isinstance(value, tuple) else (value,)
    return all(
        isinstance(number, int | float) and 0 <= number <= sys.float_info.max for number in numbers
    )


def turns(
    rope: Rope | None,
    positions_BxT: Int[Array, "B T"],
    pairs: int,
) -> tuple[Float[Array, "B T W"], Float[Array, "B T W"]]:
    """Cosine and sine of each pair's angle, position * theta^(-w / W), in float32.

    The scalings `dynamic` and `longrope` depend on the length of the text. Each row's is its last
    position + 1: in `apply` all T tokens, in prefill the prompt without its padding, in decode the
    text so far; keys in a cache stay as they were turned. So does transformers for a row that is
    alone in its batch, but for Phi-3, which starts anew with all tokens when a text outgrows the
    trained length while it is generated.

    Args:
        rope: None: all angles are 0.
        positions_BxT: of the tokens.
        pairs: W, how many pairs of a head turn.
    """
    length_B = jnp.max(positions_BxT, axis=1) + 1
    if rope is None:
        ones = jnp.ones((*positions_BxT.shape, pairs))
        return ones, jnp.zeros_like(ones)
    exponent_W = np.arange(pairs, dtype=np.float32) / np.float32(pairs)
    spaced = _Spaced(rope.theta, exponent_W)
    frequency, magnitude = SCALINGS[rope.scaling](spaced, length_B, **dict(rope.parameters))
    frequency_RxW = jnp.atleast_2d(jnp.asarray(frequency))  # R is 1, or B where rows differ
    angles = positions_BxT[:, :, None].astype(jnp.float32) * frequency_RxW[:, None, :]
    return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude


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


@dataclasses.dataclass(frozen=True)
class _Spaced:
    """Frequencies theta^(-w / W), from 1 turn in 2 pi positions downwards."""

    theta: float
    exponent_W: np.ndarray  # w / W

    @property
    def pairs(self) -> int:
        return len(self.exponent_W)

    @property
    def frequency_W(self) -> np.ndarray:
        return np.float32(1) / np.float32(self.theta) ** self.exponent_W

    def pair_of(self, turns: float, length: float) -> float:
        """The pair, as a fraction, that turns this often within the length."""
        return self.pairs * math.log(length / (turns * 2 * math.pi)) / math.log(self.theta)


# A scaling is a function of the unscaled frequencies, the length of each row and its parameters,
# which bear the names that Hugging Face gives them. It returns the frequencies, [W] or [B, W], and
# what cosine and sine are multiplied by.


def _default(spaced: _Spaced, length_B):
    return spaced.frequency_W, 1.0


def _linear(spaced: _Spaced, length_B, *, factor: float):
    """Positions divided by the factor (arXiv 2306.15595)."""
    return spaced.frequency_W / np.float32(factor), 1.0


def _dynamic(spaced: _Spaced, length_B, *, factor: float, max_position_embeddings: float):
    """A base that grows with the length once it exceeds the trained one (arXiv 2309.00071, B.2)."""
    excess_B = jnp.maximum(length_B.astype(jnp.float32) / max_position_embeddings, 1.0)
    growth_B = (factor * excess_B - (factor - 1)) ** (spaced.pairs / (spaced.pairs - 1))
    theta_Bx1 = (spaced.theta * growth_B)[:, None]
    return 1.0 / theta_Bx1 ** jnp.asarray(spaced.exponent_W)[None, :], 1.0


def _yarn(
    spaced: _Spaced,
    length_B,
    *,
    factor: float,
    original_max_position_embeddings: float,
    attention_factor: float | None = None,
    beta_fast: float | None = None,
    beta_slow: float | None = None,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
    truncate: bool = True,
):
    """Fast pairs stay, slow ones are divided by the factor, a ramp between (arXiv 2309.00071)."""
    low = spaced.pair_of(beta_fast or 32.0, original_max_position_embeddings)
    high = spaced.pair_of(beta_slow or 1.0, original_max_position_embeddings)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * spaced.pairs - 1)
    span = high - low or 0.001
    slow_W = np.clip((np.arange(spaced.pairs, dtype=np.float32) - low) / span, 0, 1)
    scaled_W = spaced.frequency_W / factor * slow_W + spaced.frequency_W * (1 - slow_W)
    if attention_factor is None:
        scale, scale_all = (mscale, mscale_all_dim) if mscale and mscale_all_dim else (1.0, 0.0)
        attention_factor = _yarn_magnitude(factor, scale) / _yarn_magnitude(factor, scale_all)
    return scaled_W.astype(np.float32), attention_factor


def _yarn_magnitude(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0


def _longrope(
    spaced: _Spaced,
    length_B,
    *,
    short_factor: tuple[float, ...],
    long_factor: tuple[float, ...],
    original_max_position_embeddings: float,
    factor: float,
    attention_factor: float | None = None,
):
    """Divisors for texts up to the trained length, and others beyond it (arXiv 2402.13753)."""
    short_W, long_W = (
        np.float32(1) / (np.asarray(each, np.float32) / spaced.frequency_W)
        for each in (short_factor, long_factor)
    )
    is_long_Bx1 = (length_B > original_max_position_embeddings)[:, None]
    if attention_factor is None:
        over = math.log(factor) / math.log(original_max_position_embeddings) if factor > 1 else 0
        attention_factor = math.sqrt(1 + over)
    return jnp.where(is_long_Bx1, jnp.asarray(long_W)[None], short_W[None]), attention_factor


def _llama3(
    spaced: _Spaced,
    length_B,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: float,
):
    """As YaRN, with a ramp over turns within the trained length (Llama 3.1, arXiv 2407.21783)."""
    turns_W = original_max_position_embeddings * spaced.frequency_W / np.float32(2 * math.pi)
    fast_W = np.clip((turns_W - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    scaled_W = spaced.frequency_W * ((1 - fast_W) / factor + fast_W)
    return scaled_W.astype(np.float32), 1.0


SCALINGS: dict[str, Callable[..., tuple[Any, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}
