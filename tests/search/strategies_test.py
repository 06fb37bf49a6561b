"""Every strategy of evosax behind the one ask/tell interface."""

import jax
import numpy as np
import pytest
from evosax.algorithms import algorithms

from jaxmerge.errors import JaxmergeError
from jaxmerge.search.strategies import default_population, evosax

D = 5
TARGET = np.array([0.6, -0.4, 0.3, -0.7, 0.2])
# Population 12 suits all: even, a multiple of 2 x 2 for the Stein strategies, at least 4.
POPULATION = {"GESMR_GA": 10}


def _make(name, **options):
    return evosax(name, D, POPULATION.get(name, 12), **options)


def _run(strategy, state, generations, seed=0):
    """Maximises -|z - target|^2; the fitness of each generation, and the last state."""
    fitness = []
    for generation in generations:
        z, state = strategy.ask(seed, generation, state)
        assert z.shape == (strategy.population, D)
        fitness.append(-((z - TARGET) ** 2).sum(axis=1))
        state = strategy.tell(seed, generation, z, fitness[-1], state)
    return np.array(fitness), state


@pytest.mark.filterwarnings("ignore:optax.global_norm is deprecated")  # evosax still calls it
@pytest.mark.parametrize("name", sorted(algorithms))
def test_deterministic_and_resumable(name):
    """The state as plain arrays, put back half way, gives the same rest bit for bit."""
    strategy = _make(name)
    whole, _ = _run(strategy, strategy.init(0), range(3))
    first, state = _run(strategy, strategy.init(0), range(1))
    leaves, structure = jax.tree.flatten(state)
    restored = structure.unflatten([np.asarray(leaf) for leaf in leaves])
    rest, _ = _run(strategy, restored, range(1, 3))
    np.testing.assert_array_equal(whole, np.concatenate([first, rest]))


@pytest.mark.parametrize("name", ["CMA_ES", "SNES", "Sep_CMA_ES", "CR_FM_NES", "PSO", "MR15_GA"])
def test_maximises(name):
    """A negated fitness would move away from the target."""
    strategy = _make(name)
    fitness, _ = _run(strategy, strategy.init(0), range(25))
    assert fitness[-1].mean() > fitness[0].mean() + 0.3


def test_starts_around_the_mean_with_sigma():
    mean = np.array([1.0, -1.0, 2.0, 0.0, 0.5])
    for name in ("CMA_ES", "SimpleGA"):
        strategy = evosax(name, D, 400, mean=mean, sigma=0.1)
        z, _ = strategy.ask(0, 0, strategy.init(0))
        # 400 draws: the mean is within 5 sigma / sqrt(400), the deviation within 20%.
        np.testing.assert_allclose(z.mean(axis=0), mean, atol=0.025)
        np.testing.assert_allclose(z.std(axis=0), 0.1, rtol=0.2)


def test_seeds_differ():
    strategy = _make("CMA_ES")
    first, _ = strategy.ask(0, 0, strategy.init(0))
    second, _ = strategy.ask(1, 0, strategy.init(1))
    assert not np.allclose(first, second)


def test_not_a_number_does_not_poison():
    for name in ("CMA_ES", "SimpleGA", "ASEBO", "LES"):
        strategy = _make(name)
        state = strategy.init(0)
        for generation in range(3):
            z, state = strategy.ask(0, generation, state)
            fitness = np.where(np.arange(len(z)) % 3 == 0, np.nan, -(z**2).sum(axis=1))
            state = strategy.tell(0, generation, z, fitness, state)
        z, _ = strategy.ask(0, 3, state)
        assert np.isfinite(z).all(), name


def test_runs_on_the_cpu_whatever_the_default_is():
    with jax.default_device(jax.devices()[3]):
        strategy = _make("CMA_ES")
        _, state = strategy.ask(0, 0, strategy.init(0))
    assert {leaf.device for leaf in jax.tree.leaves(state)} == {jax.local_devices(backend="cpu")[0]}


def test_default_population():
    assert [default_population(k) for k in (2, 8, 16)] == [6, 10, 12]


@pytest.mark.parametrize(
    ("arguments", "options", "named"),
    [
        (("CMAES", D, 8), {}, "CMA_ES"),
        (("Open_ES", D, 7), {}, "even"),
        (("SV_CMA_ES", D, 7), {}, "multiple of 2"),
        (("CMA_ES", D, 8), {"params": {"std_int": 1.0}}, "std_init"),
    ],
)
def test_refused(arguments, options, named):
    with pytest.raises(JaxmergeError, match=named):
        evosax(*arguments, **options)
