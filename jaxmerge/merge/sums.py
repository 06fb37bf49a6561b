"""Sums over a tensor that are the same in any order: on any mesh, at once or in parts.

Float32 sums depend on the order of their terms, and thresholds, norms and angles that come from
them would depend on the mesh. Here every term is a whole number of units: 2^-48 of a power of two
that no term reaches. Integers add up alike in any order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

_BITS = 12  # of a digit
_DIGITS = 4  # of a term
NOT_FINITE = 129
_MOST = 2**18  # terms whose digits can be added in 32 bits


def total(values: Float[Array, "*S"], axes: Sequence[int] | None = None) -> Float[Array, "*T"]:
    """sum_p x_p in float32, the same bits for any order of the terms.

    Each term is cut off below 2^-48 of the power of two above the largest magnitude; the sum of
    what is left is exact, and rounded to float32 with a relative error of 2^-23 at most.

    Args:
        values: float32.
        axes: that are summed over; they stay, with size 1. None: all.
    """
    axes = tuple(range(values.ndim)) if axes is None else tuple(axes)
    (above,) = exponents([values], axes)
    summed = _times_power(total_below_one(scaled(values, above), axes), above)
    return jnp.where(above < NOT_FINITE, summed, jnp.nan)


def exponents(
    vectors: Sequence[Float[Array, "*S"]], axes: Sequence[int]
) -> list[Int32[Array, "*T"]]:
    """Of each vector the least e with |x_p| < 2^e for all terms, with size 1 along the axes.

    Zeros and subnormal values have -126; values that are not finite `NOT_FINITE`.
    """
    if len(vectors) == 1:
        largest = [jnp.max(jnp.abs(vectors[0]), axis=tuple(axes))]
    else:  # all in one pass: XLA for CPUs takes twice as long for each by itself
        bits = [jax.lax.bitcast_convert_type(jnp.abs(each), jnp.int32) for each in vectors]
        largest = jax.lax.reduce(
            tuple(bits),
            (np.int32(0),) * len(bits),
            lambda one, two: tuple(map(jnp.maximum, one, two)),
            tuple(axes),
        )
    return [_exponent(jnp.expand_dims(each, tuple(axes))) for each in largest]


def _exponent(largest: Array) -> Array:
    """Of magnitudes, or of their bits."""
    bits = jax.lax.bitcast_convert_type(largest, jnp.int32)
    return jnp.clip((bits >> 23) - 126, -126, NOT_FINITE)


def scaled(values: Float[Array, "*S"], above: Int32[Array, "*T"]) -> Float[Array, "*S"]:
    """x 2^-e, exactly but for subnormal values, which become 0."""
    return _times_power(values, -above)


def total_below_one(values: Float[Array, "*S"], axes: Sequence[int]) -> Float[Array, "*T"]:
    """`total` of values that are finite and below 1 in magnitude, cut off below 2^-48."""
    return rounded(digits_below_one(values, axes))


def digits_below_one(values: Float[Array, "*S"], axes: Sequence[int]) -> list[Int32[Array, "*T"]]:
    """`total_below_one` before it is rounded: digits of 12 bits, the highest first.

    Those of parts of a tensor can be added, of up to 2^18 parts.
    """
    digits, left = _digits(values), list(axes)
    while left:
        # As many axes in one step as keep the sums in 32 bits.
        now = [left.pop()]
        while left and math.prod(values.shape[axis] for axis in (*now, left[-1])) <= _MOST:
            now.append(left.pop())
        digits = _carried(_added(digits, now))
    return digits


def _times_power(values: Array, exponent: Array) -> Array:
    """x 2^e, with e from -129 to 129 in two factors, since neither 2^-127 nor 2^128 is normal."""
    half = exponent // 2
    for each in (half, exponent - half):
        values = values * jax.lax.bitcast_convert_type((each + 127) << 23, jnp.float32)
    return values


def _digits(values: Array) -> list[Array]:
    """x = sum_i d_i 2^(-12 (i + 1)), each digit an integer with the sign of x; highest first."""
    digits = []
    for _ in range(_DIGITS):
        values = values * 2.0**_BITS
        whole = values.astype(jnp.int32)  # towards 0
        digits.append(whole)
        values = values - whole.astype(jnp.float32)
    return digits


def _added(digits: list[Array], axes: Sequence[int]) -> list[Array]:
    """The sums of each digit along axes; a single long one is cut into parts."""
    (axis, *others), shape = axes, digits[0].shape
    if not others and shape[axis] > _MOST:
        parts = -(-shape[axis] // _MOST)
        padding = [(0, 0)] * len(shape)
        padding[axis] = (0, parts * _MOST - shape[axis])
        cut = (*shape[:axis], parts, _MOST, *shape[axis + 1 :])
        split = [jnp.pad(digit, padding).reshape(cut) for digit in digits]
        inner = _carried(_added(split, [axis + 1]))
        return _added([jnp.squeeze(digit, axis + 1) for digit in inner], axes)
    # All digits in one pass; one sum after the other would write each digit to memory first.
    sums = jax.lax.reduce(
        tuple(digits),
        (np.int32(0),) * len(digits),
        lambda one, two: tuple(a + b for a, b in zip(one, two)),
        tuple(axes),
    )
    return [jnp.expand_dims(each, tuple(axes)) for each in sums]


def _carried(digits: Sequence[Array]) -> list[Array]:
    """The same number in digits from 0 to 4095, below two new ones that hold the sign."""
    carry, carried = jnp.zeros_like(digits[0]), []
    for digit in reversed(digits):
        digit = digit + carry
        carried.append(digit & (2**_BITS - 1))
        carry = digit >> _BITS
    carried += [carry & (2**_BITS - 1), carry >> _BITS]
    return carried[::-1]


def rounded(digits: Sequence[Int32[Array, "*T"]]) -> Float[Array, "*T"]:
    """The number as float32: its magnitude from the lowest digit up, so that little is lost."""
    digits = _carried(digits)
    negative = digits[0] < 0
    magnitude = _carried([jnp.where(negative, -digit, digit) for digit in digits])
    value = jnp.zeros(digits[0].shape, jnp.float32)
    for digit in reversed(magnitude):
        value = value * 2.0**-_BITS + digit.astype(jnp.float32)
    above = len(magnitude) - _DIGITS - 1  # digits of the whole part but the first
    value = value * 2.0 ** (_BITS * above)
    return jnp.where(negative, -value, value)
