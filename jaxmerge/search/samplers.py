"""Samplers of Optuna (arXiv 1907.10902) as strategies, by name: `optuna:TPESampler`."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxmerge.errors import JaxmergeError
from jaxmerge.search.strategies import WORST, State, Strategy

PREFIX = "optuna:"

_REACH = 4.0  # standard deviations at each side of the start, which samplers look between
_ONE_NUMBER = ("CmaEsSampler",)  # these can't be told of several objectives
# These need more than numbers to be sampled from, such as a grid, or sample all there is.
_OTHERS = ("BaseGASampler", "BaseSampler", "BruteForceSampler", "GridSampler")
_OTHERS += ("PartialFixedSampler",)


def sampler(
    name: str,
    dimension: int,
    population: int,
    *,
    mean: Float[np.ndarray, " D"] | None = None,
    sigma: float = 0.5,
    bounds: tuple[float, float] = (-8.0, 8.0),
    params: Mapping[str, Any] | None = None,
    tasks: int = 1,
) -> Strategy:
    """A sampler of Optuna, which is asked for a whole population at a time.

    It looks within four `sigma` of `mean`, and starts with `mean` itself. A study has no state that
    can be saved, so one that is gone on with is told again all that it was told before.

    Args:
        name: as in `optuna.samplers`.
        dimension: D, the length of a genotype.
        population: P.
        mean: where to start; zeros (the uniform merge) unless given.
        sigma: a quarter of how far to look from there, in genotype units; CMA-ES's first step.
        bounds: of genotypes.
        params: arguments of the sampler.
        tasks: T, of which it is told the scores, to find their front; 1: of the objective.

    Raises:
        JaxmergeError: Optuna is not installed, or has no such sampler or argument.
    """
    optuna = package()
    make = _class(optuna, name)
    start_D = np.zeros(dimension) if mean is None else np.asarray(mean, np.float64)
    low_D = np.clip(start_D - _REACH * sigma, *bounds)
    high_D = np.clip(start_D + _REACH * sigma, *bounds)
    start_D = np.clip(start_D, low_D, high_D)
    names = [f"z{d}" for d in range(dimension)]
    first = dict(zip(names, start_D.tolist()))
    settings = {**_own_settings(name, population, first, names), **(params or {})}
    T = 1 if name in _ONE_NUMBER else tasks
    _check_arguments(name, make, settings)

    def study(seed: int) -> Any:
        made = optuna.create_study(directions=["maximize"] * T, sampler=make(seed=seed, **settings))
        made.enqueue_trial(first)
        return made

    uniform = optuna.distributions.FloatDistribution
    among = {each: uniform(*ends) for each, *ends in zip(names, low_D.tolist(), high_D.tolist())}
    live = _Live(study, among, population, optuna)
    _try(name, live, np.zeros((2 * population, T)))

    def init(seed: int) -> State:
        return {"told": np.zeros((0, T), np.float32)}

    def ask(seed: int, generation: int, state: State) -> tuple[np.ndarray, State]:
        z_PxD = live.ask(seed, generation, np.asarray(state["told"]))
        return z_PxD.astype(np.float32), state

    def tell(
        seed: int, generation: int, z_PxD: np.ndarray, fitness: np.ndarray, state: State
    ) -> State:
        told = np.asarray(fitness, np.float32).reshape(len(z_PxD), T)
        told = np.where(np.isfinite(told), told, -WORST)
        return {"told": np.concatenate([np.asarray(state["told"]), told])}

    return Strategy(population, init, ask, tell, by_task=T > 1)


class _Live:
    """A study that is asked for one generation after the other, or begun again.

    Args:
        study: makes one, of a seed.
        among: the distribution of each number.
        population: P.
        optuna: the package.
    """

    def __init__(self, study: Any, among: Mapping[str, Any], population: int, optuna: ModuleType):
        self._make, self._among, self._population = study, among, population
        self._optuna = optuna
        self._study: Any = None
        self._seed, self._open = 0, []
        self._told = np.zeros((0, 1))

    def ask(
        self, seed: int, generation: int, told: Float[np.ndarray, "N T"]
    ) -> Float[np.ndarray, "P D"]:
        """The genotypes of a generation, after what was told of all generations before it."""
        P = self._population
        with _quietly(self._optuna):
            asked = len(self._told) // P + bool(self._open)
            follows = (self._seed, asked) == (seed, generation)
            follows = follows and np.array_equal(self._told, told[: len(self._told)])
            if self._study is None or not follows:
                self._study, self._seed, self._open = self._make(seed), seed, []
                self._told = told[:0]
            study = self._study
            while True:
                done = len(self._told) // P
                if self._open:
                    for trial, values in zip(self._open, told[done * P : (done + 1) * P]):
                        study.tell(trial, values.tolist())
                    self._told, self._open = told[: (done + 1) * P], []
                    done += 1
                self._open = [study.ask(dict(self._among)) for _ in range(P)]
                if done == generation:
                    return np.array([[*trial.params.values()] for trial in self._open])


def _try(name: str, live: _Live, told: Float[np.ndarray, "N T"]) -> None:
    """Asks for some generations, so that what can't be is refused before anything is loaded."""
    try:
        live.ask(0, 2, told)
    except ImportError as error:
        raise JaxmergeError(
            f"{name} needs a package that is not there: {error.name}",
            where="search.strategy",
            expected=f"pip install {error.name}; or another sampler of Optuna",
        ) from error
    except (AssertionError, AttributeError, TypeError, ValueError) as error:
        raise JaxmergeError(
            f"{name} can't be made so: {error}",
            where="search.params",
            expected="arguments as the documentation of Optuna has them",
        ) from error


def package() -> ModuleType:
    """Optuna; it is imported late, for it takes a second.

    Raises:
        JaxmergeError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise JaxmergeError(
            "Optuna is not installed",
            where="search.strategy",
            expected="pip install 'jaxmerge[optuna]'; or a strategy of evosax",
        ) from error
    return optuna


def _class(optuna: ModuleType, name: str) -> Any:
    known = [n for n in dir(optuna.samplers) if n.endswith("Sampler") and n not in _OTHERS]
    if name not in known:
        near = get_close_matches(name, known, n=3, cutoff=0.4) or known
        raise JaxmergeError(
            "Optuna has no sampler of this name that a search could use",
            where="search.strategy",
            expected=", ".join(PREFIX + each for each in near),
            found=PREFIX + name,
        )
    return getattr(optuna.samplers, name)


def _own_settings(
    name: str, population: int, first: Mapping[str, float], names: list[str]
) -> dict[str, Any]:
    """Arguments that follow from the config."""
    if name == "CmaEsSampler":  # its step is in units of the range, which is eight sigmas
        return {"x0": dict(first), "sigma0": 1 / (2 * _REACH), "popsize": population}
    if name in ("NSGAIISampler", "NSGAIIISampler"):
        return {"population_size": population}
    if name == "TPESampler":  # those of a population that are not told of yet count as bad
        return {"constant_liar": True, "multivariate": len(names) > 1}
    return {}


def _check_arguments(name: str, make: Any, settings: Mapping[str, Any]) -> None:
    known = [each for each in inspect.signature(make).parameters if each != "seed"]
    unknown = [each for each in settings if each not in known]
    if unknown:
        raise JaxmergeError(
            f"{name} has no such argument",
            where=f"search.params.{unknown[0]}",
            expected=", ".join(known),
        )


@contextmanager
def _quietly(optuna: ModuleType) -> Iterator[None]:
    """Optuna tells nothing of each trial, and warns of nothing that is experimental."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        optuna.logging.set_verbosity(before)
