"""Samplers of Optuna as strategies: asked for populations, and begun again to the same bits."""

import numpy as np
import pytest

from jaxmerge.errors import JaxmergeError
from jaxmerge.search import samplers

NAMES = ("TPESampler", "CmaEsSampler", "QMCSampler", "NSGAIISampler", "NSGAIIISampler")
PEAK = np.array([0.8, -0.5, 0.3])


def score(z_PxD):
    return -np.sum((z_PxD - PEAK) ** 2, axis=1)


def two(z_PxD):
    """Two tasks whose best genotypes lie apart."""
    return np.stack([score(z_PxD), -np.sum((z_PxD + PEAK) ** 2, axis=1)], axis=1)


def run(strategy, generations, told=score, seed=3, state=None, first=0):
    state = strategy.init(seed) if state is None else state
    asked = []
    for generation in range(first, generations):
        z_PxD, state = strategy.ask(seed, generation, state)
        asked.append(z_PxD)
        state = strategy.tell(seed, generation, z_PxD, told(z_PxD), state)
    return np.stack(asked), state


@pytest.mark.parametrize("name", NAMES)
def test_it_finds_more_than_it_starts_with(name):
    strategy = samplers.sampler(name, 3, 8)
    asked, _ = run(strategy, 12)
    assert asked.dtype == np.float32
    assert asked.shape == (12, 8, 3)
    np.testing.assert_array_equal(asked[0, 0], np.zeros(3))  # the uniform merge
    reached = score(asked.reshape(-1, 3)).max()
    assert reached > score(asked[0, :1])[0] + 0.5  # of 0.98 that there are


@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_a_state_is_gone_on_with_to_the_same_bits(name, tasks):
    of = two if tasks > 1 and name != "CmaEsSampler" else score
    whole, _ = run(samplers.sampler(name, 3, 6, tasks=tasks), 6, of)
    strategy = samplers.sampler(name, 3, 6, tasks=tasks)
    _, state = run(strategy, 3, of)
    # In another process: only the state is there.
    state = {key: np.array(value) for key, value in state.items()}
    assert all(value.dtype.itemsize <= 4 for value in state.values())  # JAX would cut others
    rest, _ = run(samplers.sampler(name, 3, 6, tasks=tasks), 6, of, state=state, first=3)
    np.testing.assert_array_equal(rest, whole[3:])
    np.testing.assert_array_equal(run(strategy, 6, of)[0], whole)  # and from the start once more
    other, _ = run(strategy, 6, of, seed=4)
    assert name == "QMCSampler" or not np.array_equal(other, whole)


def test_a_front_is_asked_for_by_task():
    strategy = samplers.sampler("NSGAIISampler", 3, 12, tasks=2)
    assert strategy.by_task
    assert not samplers.sampler("NSGAIISampler", 3, 12).by_task
    asked, _ = run(strategy, 20, two)
    first, last = two(asked[0]), two(asked[-3:].reshape(-1, 3))
    assert last.max(axis=0).min() > first.max(axis=0).min()
    assert not samplers.sampler("CmaEsSampler", 3, 12, tasks=2).by_task


def test_start_step_and_bounds():
    mean = np.array([1.0, -2.0], np.float32)
    strategy = samplers.sampler("QMCSampler", 2, 64, mean=mean, sigma=0.25, bounds=(-2.5, 8.0))
    asked, _ = run(strategy, 2, lambda z: z[:, 0])
    found = asked.reshape(-1, 2)
    np.testing.assert_allclose(found[0], mean)
    assert (found >= [0.0, -2.5]).all()
    assert (found <= [2.0, -1.0]).all()


def test_a_score_that_is_no_number_is_the_worst():
    strategy = samplers.sampler("CmaEsSampler", 3, 6)
    asked, _ = run(strategy, 4, lambda z: np.where(z[:, 0] > 0, np.nan, score(z)))
    assert np.isfinite(asked).all()


@pytest.mark.parametrize(
    ("name", "params", "said"),
    [
        ("TPE", {}, "optuna:TPESampler"),
        ("GridSampler", {}, "no sampler of this name"),
        ("TPESampler", {"gama": 1}, r"search\.params\.gama"),
        ("CmaEsSampler", {"popsize": "many"}, r"search\.params"),
    ],
)
def test_what_cant_be_is_refused(name, params, said):
    with pytest.raises(JaxmergeError, match=said):
        samplers.sampler(name, 2, 6, params=params)
