"""Ask/tell strategies over genotypes; fitness is maximised. Every strategy of evosax, by name.

Strategies run on the host's CPU whatever the accelerator is: their arrays are tiny, and the
decisions of a run do not depend on its mesh.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxmerge.errors import JaxmergeError

State = Any  # a pytree of arrays of 32 bits at most, as they are saved

_SVES = ("SV_CMA_ES", "SV_Open_ES")  # several populations that repel each other
_SV_POPULATIONS = 2

# Fitness that a strategy sees in place of NaN or infinity, which poison the state of many.
WORST = 1e9


def _free(generation: int) -> Mapping[str, int]:
    return {}


def _nothing(generation: int, state: State) -> Mapping[str, float]:
    return {}


Ask = Callable[[int, int, State], tuple[Float[np.ndarray, "P D"], State]]


class Strategy(NamedTuple):
    """A strategy as pure functions; all arrays are on the host.

    Attributes:
        population: P, candidates per generation.
        init: `seed -> state`.
        ask: `(seed, generation, state) -> (z_PxD, state)`; the same arguments give the same result.
        tell: `(seed, generation, z_PxD, fitness_P, state) -> state`; larger fitness is better.
        tokens: `generation -> tokens` that asking for it takes, as a `Candidate` has them, known
            before it is asked for. Scoring is counted by itself.
        expected: `(generation, state) -> scores` by task that the strategy expects of what it has
            asked for in the generation, with the state after that; {}: it expects nothing.
        by_task: whether `tell` has the scores on each task, `[P, T]`, in place of the objective.
    """

    population: int
    init: Callable[[int], State]
    ask: Ask
    tell: Callable[[int, int, np.ndarray, np.ndarray, State], State]
    tokens: Callable[[int], Mapping[str, int]] = _free
    expected: Callable[[int, State], Mapping[str, float]] = _nothing
    by_task: bool = False


def default_population(dimension: int) -> int:
    """4 + floor(3 ln D), the population of CMA-ES (arXiv 1604.00772, table 1)."""
    return 4 + math.floor(3 * math.log(dimension))


def evosax(
    name: str,
    dimension: int,
    population: int,
    *,
    mean: Float[np.ndarray, " D"] | None = None,
    sigma: float = 0.5,
    params: Mapping[str, Any] | None = None,
) -> Strategy:
    """A strategy of evosax, in genotype units.

    evosax starts every strategy with standard deviation 1, some in their parameters and some in a
    schedule; so they search x, with z = mean + sigma x. Strategies that need an evaluated first
    population get mean itself and P - 1 normal deviates around it.

    Args:
        name: as in `evosax.algorithms`, such as `CMA_ES`.
        dimension: D, the length of a genotype.
        population: P.
        mean: where to start; zeros (the uniform merge) unless given.
        sigma: standard deviation of the first generation around the mean.
        params: fields of the strategy's evosax `Params` to set.

    Raises:
        JaxmergeError: no strategy of this name or no such parameter, or one that can't have this
            population.
    """
    # Not at the top: importing evosax starts JAX's backend, before a run has said which.
    from evosax.algorithms import algorithms, population_based_algorithms

    algorithm = _algorithm(algorithms, name, dimension, population)
    settings = _params(name, algorithm, params or {})
    start = np.zeros(dimension, np.float32) if mean is None else np.asarray(mean, np.float32)
    evolves_population = name in population_based_algorithms

    def init(seed: int) -> State:
        with on_host():
            if evolves_population:
                first, worst = first_population(seed), jnp.full(population, WORST)
                return algorithm.init(_key(seed, 0), first, worst, settings)
            means = jnp.zeros((_SV_POPULATIONS, dimension) if name in _SVES else dimension)
            return algorithm.init(_key(seed, 0), means, settings)

    def first_population(seed: int) -> jax.Array:
        return jax.random.normal(_key(seed, 1), (population, dimension)).at[0].set(0.0)

    def ask(seed: int, generation: int, state: State) -> tuple[np.ndarray, State]:
        with on_host():
            if evolves_population and generation == 0:
                x_PxD = first_population(seed)
            else:
                x_PxD, state = algorithm.ask(_key(seed, 2, generation), state, settings)
            return start + np.float32(sigma) * np.asarray(x_PxD), state

    def tell(
        seed: int, generation: int, z_PxD: np.ndarray, fitness_P: np.ndarray, state: State
    ) -> State:
        cost_P = np.where(np.isfinite(fitness_P), -fitness_P, WORST).astype(np.float32)
        x_PxD = (z_PxD - start) / np.float32(sigma)
        with on_host():
            if evolves_population and generation == 0:
                return algorithm.init(_key(seed, 0), x_PxD, cost_P, settings)
            if name in _SVES:
                x_PxD = x_PxD.reshape(_SV_POPULATIONS, -1, dimension)
            state, _ = algorithm.tell(_key(seed, 3, generation), x_PxD, cost_P, state, settings)
            return state

    return Strategy(population, init, ask, tell)


def _key(seed: int, *path: int) -> jax.Array:
    key = jax.random.key(seed)
    for step in path:
        key = jax.random.fold_in(key, step)
    return key


@contextmanager
def on_host() -> Iterator[None]:
    """The first CPU device; and rank promotion, which evosax needs, though a caller forbids it."""
    cpu = jax.local_devices(backend="cpu")[0]
    with jax.default_device(cpu), jax.numpy_rank_promotion("allow"):
        yield


def _algorithm(algorithms: Mapping[str, Any], name: str, dimension: int, population: int) -> Any:
    if name not in algorithms:
        near = get_close_matches(name, algorithms, n=3, cutoff=0.4) or sorted(algorithms)
        raise JaxmergeError(
            "evosax has no strategy of this name",
            where="search.strategy",
            expected=", ".join(near),
            found=name,
        )
    extra: dict[str, Any] = {}
    size = population
    if name in _SVES:
        size, extra = population // _SV_POPULATIONS, {"num_populations": _SV_POPULATIONS}
        if population % _SV_POPULATIONS:
            raise JaxmergeError(
                f"{name} needs a population that is a multiple of {_SV_POPULATIONS}",
                where="search.population",
                expected=f"{max(population // _SV_POPULATIONS, 1) * _SV_POPULATIONS}, for example",
                found=str(population),
            )
    if name == "RandomSearch":
        extra = {"sampling_fn": lambda key: jax.random.normal(key, (dimension,))}
    if name in ("GuidedES", "ASEBO"):
        extra = {"subspace_dims": 1}
    try:
        with on_host():
            return algorithms[name](size, solution=jnp.zeros(dimension), **extra)
    except AssertionError as error:  # how evosax refuses a population
        raise JaxmergeError(
            f"{name} can't have this population: {error}",
            where="search.population",
            expected="another search.population, or another search.strategy",
            found=str(population),
        ) from error


def _params(name: str, algorithm: Any, changes: Mapping[str, Any]) -> Any:
    with on_host():
        defaults = algorithm.default_params
    known = [field for field in vars(defaults) if not field.startswith("_")]
    unknown = [field for field in changes if field not in known]
    if unknown:
        raise JaxmergeError(
            f"{name} has no such parameter",
            where=f"search.params.{unknown[0]}",
            expected=", ".join(known),
        )
    return defaults.replace(**changes)
