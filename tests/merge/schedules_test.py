"""Weights of steps that stand for a decay of the learning rate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge.errors import JaxmergeError
from jaxmerge.merge import schedules

CURVES = {"mean": lambda x: 1 - x, "linear": lambda x: 1 - x, "sqrt": lambda x: 1 - x**0.5}


@pytest.mark.parametrize("schedule", schedules.SCHEDULES)
@pytest.mark.parametrize("K", [2, 3, 9])
def test_a_merge_is_what_a_decayed_learning_rate_would_have_made(schedule, K):
    """Of checkpoints theta_i = theta_0 + g_1 + ... + g_i the merge is theta_0 + sum_i d_i g_i."""
    rng = np.random.default_rng(K)
    start, moved_KxN = rng.normal(size=5), rng.normal(size=(K - 1, 5))
    checkpoints = np.concatenate([start[None], start + np.cumsum(moved_KxN, axis=0)])
    decayed = [CURVES[schedule](i / K) for i in range(1, K)]
    weights = schedules.schedule_weights(schedule, K)
    # Sums of a few float64 of about 1.
    np.testing.assert_allclose(weights @ checkpoints, start + decayed @ moved_KxN, atol=1e-14)
    assert weights.sum() == pytest.approx(1, abs=1e-15)


def test_the_mean_is_that_of_equal_weights():
    for K in range(1, 64):
        found = schedules.schedule_weights("mean", K).astype(np.float32)
        np.testing.assert_array_equal(found, np.full(K, 1 / K, np.float32))


def test_a_window_ends_at_the_newest():
    lengths, exponents = np.array([3.0, 0.5, 1e4]), np.array([0.5, 2.0, 1.0])
    found = schedules.window(lengths, exponents, 5)
    np.testing.assert_allclose(found[0], [0, 0, *schedules.schedule_weights("sqrt", 3)])
    np.testing.assert_array_equal(found[1], [0, 0, 0, 0, 1])
    np.testing.assert_allclose(found[2], [1, 0, 0, 0, 0], atol=5e-4)  # began long before the pool
    np.testing.assert_allclose(found.sum(axis=-1), 1)


def test_it_is_differentiable_between_whole_lengths():
    """As differences have it; also where the oldest are outside of the window."""
    score = np.arange(5.0) ** 2

    def of(numbers, xp):
        return (schedules.window(numbers[0], numbers[1], 5) * xp.asarray(score)).sum()

    for numbers in ([5.0, 1.0], [2.4, 0.7], [3.3, 3.0]):
        at = np.array(numbers)
        found = jax.grad(lambda x: of(x, jnp))(jnp.array(numbers, jnp.float32))
        step = 1e-6
        # One-sided: the whole length 5 is the pool's, beyond which another piece begins.
        expected = [(of(at, np) - of(at - step * one, np)) / step for one in np.eye(2)]
        np.testing.assert_allclose(found, expected, rtol=2e-3)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("cosine", (), ""), "merge.schedule"),
        (("sqrt", (0.5, 0.5), ""), "merge.weights"),
        (("sqrt", (), "table.json"), "merge.weights_file"),
    ],
)
def test_refused(given, said):
    with pytest.raises(JaxmergeError, match=said):
        schedules.check(*given)
