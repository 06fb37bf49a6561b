"""The surrogate: quadratics that are fitted to scored merges, and what they propose."""

import functools

import numpy as np
import pytest

from jaxmerge.errors import JaxmergeError
from jaxmerge.search import space, surrogate

BESTS = np.array([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]])


def scores(weights_NxK):
    """Two tasks, each a quadratic of the weights whose best is known."""
    return np.stack([1 - np.sum((weights_NxK - best) ** 2, axis=1) for best in BESTS], axis=1)


def search(tasks, generations, noise=0.0):
    mapped = functools.partial(space.mapped, constraint="softmax")
    rng = np.random.default_rng(1)
    rows = [np.eye(3)]
    told = [scores(rows[0])]

    def known():
        seen = np.concatenate(told)
        return np.concatenate(rows), seen if tasks > 1 else seen.mean(axis=1, keepdims=True)

    strategy = surrogate.surrogate(
        known,
        np.zeros(3, np.float32),
        8,
        mapped=mapped,
        sigma=0.5,
        bounds=(-8.0, 8.0),
        tasks=tasks,
    )
    state = strategy.init(0)
    for generation in range(generations):
        z_PxD, state = strategy.ask(0, generation, state)
        weights = np.asarray(space.weights(z_PxD), np.float64)
        rows.append(weights)
        told.append(scores(weights) + noise * rng.standard_normal((len(weights), 2)))
        state = strategy.tell(0, generation, z_PxD, told[-1], state)
    return rows, strategy, known


def test_it_finds_the_best_of_a_quadratic():
    rows, _, _ = search(1, 4)
    best = BESTS.mean(axis=0)
    off = np.sqrt(np.sum((rows[-1] - best) ** 2, axis=1))
    first = np.sqrt(np.sum((rows[1] - best) ** 2, axis=1))
    assert np.median(off) < 0.05 < np.median(first)


def test_with_noise_too():
    rows, _, _ = search(1, 8, noise=0.02)
    off = np.sqrt(np.sum((rows[-1] - BESTS.mean(axis=0)) ** 2, axis=1))
    assert np.median(off) < 0.15


def test_preferences_spread_proposals_along_the_front():
    rows, strategy, _ = search(2, 6)
    assert strategy.by_task
    found = scores(np.concatenate(rows[-2:]))
    # The front of the two is the line between their bests: on it the distances add up.
    distance = np.sqrt(1 - found).sum(axis=1)
    length = np.sqrt(np.sum((BESTS[0] - BESTS[1]) ** 2))
    assert np.median(distance) < 1.1 * length
    assert np.ptp(found[:, 0]) > 0.3  # of 0.72


def test_the_same_generation_is_the_same():
    _, strategy, _ = search(2, 3)
    again, _ = strategy.ask(0, 3, {})
    once_more, _ = strategy.ask(0, 3, {})
    np.testing.assert_array_equal(again, once_more)
    assert not np.array_equal(strategy.ask(1, 3, {})[0], again)


def test_too_many_weights_are_refused():
    surrogate.check(64)
    with pytest.raises(JaxmergeError, match=r"space\.granularity"):
        surrogate.check(65)
