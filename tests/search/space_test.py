"""Genotypes to weights."""

import numpy as np
import pytest

from jaxmerge.errors import JaxmergeError
from jaxmerge.merge.schedules import schedule_weights
from jaxmerge.search import space

BOUNDS = (-8.0, 8.0)
Z = np.random.default_rng(0).normal(size=(50, 6)) * 2


@pytest.mark.parametrize("constraint", [*space.CONSTRAINTS, space.WINDOW])
def test_zero_is_the_uniform_merge(constraint):
    z = np.zeros((1, space.dimension(constraint, 5)))
    np.testing.assert_array_equal(
        space.weights(z, constraint, BOUNDS, checkpoints=5), np.full((1, 5), 0.2, np.float32)
    )


def test_two_numbers_are_a_window():
    """Half of six checkpoints along 1 - sqrt(x); of groups each has its own."""
    z = np.log(np.array([[0.5, 0.5], [1, 1]])).reshape(1, 4)
    found = space.weights(z, space.WINDOW, BOUNDS, groups=2, checkpoints=6)
    of_three = schedule_weights("sqrt", 3)
    # A length that is whole up to its last bit: the square root of that bit is 1e-8.
    np.testing.assert_allclose(found[0], [[0, 0, 0, *of_three], [1 / 6] * 6], atol=1e-7)
    (numbers,) = space.numbers_of_window(z, 6, BOUNDS, groups=2)
    np.testing.assert_allclose(numbers["length"], (3, 6))
    np.testing.assert_allclose(numbers["exponent"], (0.5, 1))


@pytest.mark.parametrize("constraint", ["softmax", "abs", "signed"])
def test_sums_to_one(constraint):
    # Six float32 weights, each rounded once: at most 6 half-ulps of values up to about 4.
    np.testing.assert_allclose(space.weights(Z, constraint, BOUNDS).sum(axis=1), 1, atol=2e-6)


def test_signs():
    assert (space.weights(Z, "softmax", BOUNDS) > 0).all()
    assert (space.weights(Z, "abs", BOUNDS) >= 0).all()
    assert (space.weights(Z, "signed", BOUNDS) < 0).any()
    assert abs(space.weights(Z, "free", BOUNDS).sum(axis=1) - 1).max() > 0.1


def test_a_checkpoint_can_be_left_out():
    np.testing.assert_array_equal(space.weights(np.array([[-1.0, 0, 1]]), "abs", BOUNDS)[0, 0], 0)


def test_abs_of_nothing_is_uniform():
    np.testing.assert_array_equal(space.weights(np.array([[-1.0, -1.0]]), "abs", BOUNDS), 0.5)


def test_bounds_clip():
    clipped = space.weights(np.array([[100.0, -100.0]]), "free", (-2.0, 3.0))
    np.testing.assert_array_equal(clipped, np.array([[2.0, -0.5]], np.float32))


@pytest.mark.parametrize(
    ("constraint", "bounds", "named"),
    [("softmx", BOUNDS, "space.constraint"), ("abs", (1.0, 2.0), "space.bounds")],
)
def test_refused(constraint, bounds, named):
    with pytest.raises(JaxmergeError, match=named):
        space.weights(Z, constraint, bounds)


def test_some_of_the_checkpoints():
    """The others have no weight; the order is that of the numbers."""
    spread = space.spread(np.array([[0.75, 0.25], [0.5, 0.5]], np.float32), [3, 0], 4)
    np.testing.assert_array_equal(spread, [[0.25, 0, 0, 0.75], [0.5, 0, 0, 0.5]])
    assert spread.dtype == np.float32


RANGES = [space.Range(1.0, 0.05, 1.0), space.Range(1.0, 0.0, 2.0)]


def test_numbers_start_at_their_defaults_and_are_reflected_at_the_ends():
    np.testing.assert_allclose(space.numbers(np.zeros(2), RANGES), [1, 1])
    found = space.numbers(np.array([[0.5, 0.5], [-0.5, -0.5]]), RANGES)
    np.testing.assert_allclose(found, [[0.7625, 1.5], [0.7625, 0.5]])
    far = space.numbers(np.linspace(-9, 9, 181)[:, None] * np.ones(2), RANGES)
    assert (far >= np.array([0.05, 0]) - 1e-12).all()
    assert (far <= np.array([1, 2]) + 1e-12).all()


def test_rows_of_a_method_are_weights_numbers_and_one():
    z_PxD = np.zeros((2, 2 * (3 + 1)))
    z_PxD[1, 3] = 0.5  # the number of the first group
    found = space.rows(z_PxD, 3, RANGES[1:], groups=2)
    third = 1 / 3
    np.testing.assert_allclose(found[0], [[third] * 3 + [1, 1]] * 2, rtol=1e-6)
    np.testing.assert_allclose(found[1, 0], [third] * 3 + [1.5, 1], rtol=1e-6)
    pulled = space.rows(z_PxD, 3, RANGES[1:], groups=2, shrink=1.0)
    np.testing.assert_allclose(pulled[1, :, 3], [1.25, 1.25], rtol=1e-6)
    alone = space.rows(np.zeros((1, 1)), 2, RANGES[1:], weighted=False)
    np.testing.assert_allclose(alone, [[0.5, 0.5, 1, 1]])
