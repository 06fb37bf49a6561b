"""Exact selection from a tensor by magnitude: thresholds, and which of equal values are taken.

The bits of a magnitude, read as an integer, are in its order. So a threshold is found two bits at a
time, by counts of the values above three numbers. Counts of shards add up: the threshold is the
same on any mesh. Nothing is sorted, and no copy of the tensor is made: each of the sixteen passes
computes the magnitudes anew from what is stored. Of a whole tensor on the host, a partition finds
the same at once, with 8 bytes for each value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt32

from jaxmerge.trees import PyTree

MOST = 2**32 - 1  # values of a tensor
_STEP = 2  # bits of a threshold that a pass finds; more would take long to compile

Magnitude = Callable[[Any], Array]  # what is stored of a tensor to float32 values of at least 0


class Largest(NamedTuple):
    """The k largest magnitudes of a tensor.

    Of equal magnitudes at the threshold those that come first in the tensor are taken, in C order.

    Attributes:
        threshold: bits of the k-th largest magnitude.
        before: of those that are equal to it, what comes before this place is taken.
    """

    threshold: UInt32[Array, ""]
    before: UInt32[Array, ""]

    def __call__(self, magnitudes: Float[Array, "*S"]) -> Bool[Array, "*S"]:
        """Which values of the tensor they are."""
        key = bits(magnitudes)
        tied = (key == self.threshold) & (places(magnitudes.shape) < self.before)
        return (key > self.threshold) | tied


def bits(magnitudes: Float[Array, "*S"]) -> UInt32[Array, "*S"]:
    """Of float32 values that are not negative: integers in the same order."""
    return jax.lax.bitcast_convert_type(magnitudes, jnp.uint32)


def places(shape: tuple[int, ...], first: Array | int = 0) -> UInt32[Array, "*S"]:
    """The place of each value in the tensor, in C order.

    `first` is 0; of one that the compiler does not know, places are not kept in memory.
    """
    place = jnp.full(shape, first, jnp.uint32)
    for axis, size in enumerate(shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return place


def counts(marked: Sequence[Bool[Array, "*S"]]) -> Sequence[UInt32[Array, ""]]:
    """How many values are true of each, in one pass: two at least, or CPUs copy what they count."""
    return jax.lax.reduce(
        tuple(each.astype(jnp.uint32) for each in marked),
        (np.uint32(0),) * len(marked),
        lambda one, two: tuple(a + b for a, b in zip(one, two)),
        tuple(range(marked[0].ndim)),
    )


def largest(magnitude: Magnitude, stored: PyTree, wanted: UInt32[Array, ""]) -> Largest:
    """The largest of a tensor's values.

    Args:
        magnitude: see `Magnitude`.
        stored: its argument.
        wanted: k, from 0 to the number of values, which is at most `MOST`.
    """

    def key(stored: Any) -> Array:
        return bits(magnitude(stored))

    threshold = _greatest(lambda stored, least: key(stored) >= least, stored, wanted, at_least=True)
    above, equal = counts([key(stored) > threshold, key(stored) == threshold])
    spare = wanted - above
    # A threshold of 0 decides about zeros, which count for nothing.
    settled = (threshold == 0) | (equal == spare)

    def first() -> Array:
        def tied(stored: Any, end: Array) -> Array:
            tensor, zero = stored
            found = key(tensor)
            return (found == threshold) & (places(found.shape, zero) < end)

        return _greatest(tied, (stored, jnp.uint32(0)), spare, at_least=False)

    return Largest(threshold, jax.lax.cond(settled, lambda: jnp.uint32(MOST), first))


def on_host(arrays: PyTree) -> bool:
    """Whether arrays are values, whole, in the memory of the host."""
    return all(
        isinstance(leaf, jax.Array)
        and not isinstance(leaf, jax.core.Tracer)
        and len(leaf.devices()) == 1
        and next(iter(leaf.devices())).platform == "cpu"
        for leaf in jax.tree.leaves(arrays)
    )


def largest_here(keys: UInt32[np.ndarray, " S"], wanted: int) -> Largest:
    """`largest` of a tensor on the host, by a partition: on CPUs it is faster than counts.

    Args:
        keys: `bits` of its magnitudes in C order.
        wanted: k.
    """
    if wanted == 0:
        return Largest(jnp.uint32(MOST), jnp.uint32(MOST))
    taken = np.partition(keys, keys.size - wanted)[keys.size - wanted :]
    threshold = taken[0]
    spare = int(np.count_nonzero(taken == threshold))
    del taken
    settled = threshold == 0 or np.count_nonzero(keys == threshold) == spare
    before = MOST if settled else int(np.flatnonzero(keys == threshold)[spare])
    return Largest(jnp.uint32(threshold), jnp.uint32(before))


def smallest(magnitude: Magnitude, stored: PyTree, rank: UInt32[Array, ""]) -> Float[Array, ""]:
    """The value that so many come before when all are sorted, smallest first."""

    def below(stored: Any, end: Array) -> Array:
        return bits(magnitude(stored)) < end

    found = _greatest(below, stored, rank, at_least=False)
    return jax.lax.bitcast_convert_type(found, jnp.float32)


def share(part: Float[Array, ""], of: UInt32[Array, ""] | int) -> UInt32[Array, ""]:
    """floor(d n), in integers: float32 has no place for all counts of a large tensor.

    d is taken as the nearest multiple of 2^-24, and one more, so that 0.7 of 10 is 7, though the
    float32 next to 0.7 is less.

    Args:
        part: d; below 0 counts as 0, above 1 as 1.
        of: n.
    """
    of = jnp.asarray(of, jnp.uint32)
    units = jnp.round(jnp.clip(part, 0, 1) * 2.0**24).astype(jnp.uint32)
    units = jnp.where((units > 0) & (units < 2**24), units + 1, units)
    # units * of / 2^24 in parts of 12 bits, none of whose products leaves 32 bits.
    high, low = of >> 24, of & (2**24 - 1)
    of_high, of_low = low >> 12, low & 4095
    units_high, units_low = units >> 12, units & 4095
    rest = units_high * of_low + units_low * of_high + (units_low * of_low >> 12)
    return units * high + units_high * of_high + (rest >> 12)


def _greatest(
    marked: Callable[[Any, Array], Array], stored: PyTree, wanted: Array, *, at_least: bool
) -> UInt32[Array, ""]:
    """The greatest integer i for which `marked(stored, i)` has at least, or at most, k values.

    What holds for an integer must hold for all below it.
    """

    def pass_over(step: Array, found: Array) -> Array:
        # Else the compiler takes magnitudes and places out of the loop, and keeps them.
        again, _ = jax.lax.optimization_barrier((stored, step))
        shift = (32 - _STEP - _STEP * step).astype(jnp.uint32)
        tried = [found | (jnp.uint32(i) << shift) for i in range(1, 2**_STEP)]
        numbers = counts([marked(again, integer) for integer in tried])
        for integer, number in zip(tried, numbers):
            holds = number >= wanted if at_least else number <= wanted
            found = jnp.where(holds, integer, found)
        return found

    return jax.lax.fori_loop(0, 32 // _STEP, pass_over, jnp.uint32(0))
