"""Exact selection from a tensor, and sums that are the same in any order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge.merge import selection, sums
from tests.merge.methods_reference import how_many, top


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_the_largest_are_those_of_a_stable_sort(size):
    """With many equal values, all of them equal, none taken and all taken."""
    rng = np.random.default_rng(0)
    found_of = jax.jit(lambda x, k: selection.largest(lambda stored: stored, x, jnp.uint32(k)))
    largest = jax.jit(lambda x, k: selection.largest(lambda stored: stored, x, k)(x))
    smallest = jax.jit(lambda x, k: selection.smallest(lambda stored: stored, x, k))
    for values in (rng.integers(5, size=size), np.full(size, 3), rng.exponential(size=size)):
        values = values.astype(np.float32)
        for count in {0, 1, size // 3, size - 1, size}:
            found = np.asarray(largest(values, jnp.uint32(count)))
            expected = top(values, count)
            differ = found != expected
            assert not values[differ].any()  # but for zeros, which count for nothing
            here = selection.largest_here(np.asarray(selection.bits(jnp.asarray(values))), count)
            assert here.threshold == found_of(values, count).threshold
            np.testing.assert_array_equal(np.asarray(here(jnp.asarray(values))), found)
            if count < size:
                assert smallest(values, jnp.uint32(count)) == np.sort(values)[count]


def test_shares_of_a_tensor():
    """Decimal parts of small tensors as one counts them; of large ones in 56 bits."""
    assert [int(selection.share(jnp.float32(d), 10)) for d in (0, 0.3, 0.7, 0.29, 1, 2)] == [
        *(0, 3, 7, 2, 10, 10)
    ]
    rng = np.random.default_rng(0)
    for part, of in zip(rng.uniform(size=50), rng.integers(2**32, size=50)):
        assert int(selection.share(jnp.float32(part), int(of))) == how_many(part, int(of))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("shape", [(), (7, 5), (3, 4, 5), (600_000,)])
def test_sums_are_rounded_once_and_alike_in_any_order(shape, scale):
    """Within two roundings of float32, also where terms nearly cancel or are far apart."""
    values = (np.random.default_rng(0).standard_cauchy(size=shape) * scale).astype(np.float32)
    total = jax.jit(lambda values: sums.total(values).reshape(()))
    found = total(values)
    magnitude = np.abs(values.astype(np.float64))
    cut = values.size * 2.0**-47 * magnitude.max()
    exact = values.astype(np.float64).sum()
    assert abs(float(found) - exact) <= abs(exact) * 2**-23 + cut
    other = np.random.default_rng(1).permutation(values.ravel()).reshape(shape)
    assert total(other) == found


def test_sums_of_what_is_not_finite():
    for value in (np.nan, np.inf):
        assert np.isnan(jax.jit(sums.total)(np.array([1, value], np.float32)))
