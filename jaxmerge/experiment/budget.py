"""The searches of a run, as its config says: their strategies, and how much they evaluate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxmerge import config as configs
from jaxmerge.config import Config
from jaxmerge.errors import JaxmergeError
from jaxmerge.experiment.methods import searched, takes_weights
from jaxmerge.rundir import cost
from jaxmerge.search import gradient, samplers, strategies, surrogate
from jaxmerge.search.baselines import BASELINES, PAPER
from jaxmerge.search.loop import Economy
from jaxmerge.search.parts import deal
from jaxmerge.search.preferences import lattice
from jaxmerge.search.space import WINDOW, dimension

FRONT = "front"  # the origin of candidates of climbs along preferences, and of the front's points
WARM = "warm-start"  # the origin and name of candidates of a search along gradients before another


def check_pool_sizes(config: Config, checkpoints: int, groups: int = 1) -> None:
    """Raises `JaxmergeError` unless there can be a search over each of `analyses.pool_sizes`."""
    sizes, budget = config.analyses.pool_sizes, pool_size_budget(config)
    if len({*sizes}) < len(sizes) or any(m not in range(2, checkpoints) for m in sizes):
        raise JaxmergeError(
            "needs different numbers of checkpoints, fewer than there are",
            where="analyses.pool_sizes",
            expected=f"from 2 to {checkpoints - 1}",
            found=str(tuple(sizes)),
        )
    for m in sizes:
        strategy = build_strategy(config, checkpoints, range(m), groups)
        check_budget(strategy, "analyses.pool_size_budget", budget)


def baseline_names(config: Config) -> tuple[str, ...]:
    """Names of those that the run has: `paper` is left out where the search itself is that."""
    search, method, grain = config.search, config.merge.method, configs.granularity(config)
    found = (search.strategy, search.warm_start, method, grain)
    same = found == (PAPER, "", "linear", "model")
    return tuple(name for name in config.baselines if name != "paper" or not same)


def pool_size_budget(config: Config) -> int:
    """Evaluations of a search for `analyses.pool_size`."""
    return config.analyses.pool_size_budget or config.search.budget


def build_strategy(
    config: Config,
    checkpoints: int,
    chosen: Sequence[int] | None = None,
    groups: int = 1,
    *,
    start: Float[np.ndarray, " D"] | None = None,
    sigma: float = 0.0,
) -> strategies.Strategy:
    """The strategy that the config names.

    Args:
        config: whose `search` says it.
        checkpoints: K.
        chosen: numbers of the checkpoints that are searched over; None: all of them.
        groups: G, of leaves that have weights of their own.
        start: genotype to start from; None: as `search.init` says.
        sigma: of the first generation; 0: `search.sigma`.

    Raises:
        JaxmergeError: names the field.
    """
    init, constraint = config.search.init, configs.constraint(config)
    wanted = dimension(constraint, checkpoints)
    if init and (len(init) != wanted or not takes_weights(config.merge.method)):
        raise JaxmergeError(
            "needs the two values of a window"
            if constraint == WINDOW
            else "needs one value per checkpoint",
            where="search.init",
            expected=f"{wanted} values" if takes_weights(config.merge.method) else "()",
            found=str(len(init)),
        )
    if config.search.strategy == gradient.NAME:  # what it asks for is known when the pool is there
        return _unasked(gradient.POPULATION)
    chosen = range(checkpoints) if chosen is None else chosen
    of = searched(config, checkpoints)
    values = groups * (of.numbers if of else dimension(constraint, len(chosen)))
    population = config.search.population or strategies.default_population(values)
    if start is None and init:
        own = start_of(config, chosen) + [0.0] * (len(of.genes) if of else 0)
        start = np.array(own * groups, np.float32)
    name, sigma = config.search.strategy, sigma or config.search.sigma
    params = config.search.params.to_dict()
    if name == surrogate.NAME:  # it is fitted to what the run has scored by then
        surrogate.check(values)
        return _unasked(population)
    if name.startswith(samplers.PREFIX):
        return samplers.sampler(
            name.removeprefix(samplers.PREFIX),
            values,
            population,
            mean=start,
            sigma=sigma,
            bounds=config.space.bounds,
            params=params,
            tasks=len(config.objective.tasks) if config.front.points else 1,
        )
    return strategies.evosax(name, values, population, mean=start, sigma=sigma, params=params)


def start_of(config: Config, chosen: Sequence[int]) -> list[float]:
    """What `search.init` says of the chosen checkpoints; []: nothing."""
    init = list(config.search.init)
    return init if config.space.constraint == WINDOW or not init else [init[k] for k in chosen]


def _unasked(population: int) -> strategies.Strategy:
    """The size of a strategy's generations; it can't be asked."""

    def refuse(*_: object) -> Any:
        raise AssertionError("the strategy is not there yet")

    return strategies.Strategy(population, refuse, refuse, refuse)


def of_search(config: Config, strategy: strategies.Strategy) -> int:
    """Evaluations of the run's search."""
    along = configs.settings(config).generations * gradient.POPULATION
    if config.search.strategy == gradient.NAME:
        return along + len(preferences_of(config))
    return spent(config.search.budget, strategy) + (along if config.search.warm_start else 0)


def preferences_of(config: Config) -> Float[np.ndarray, "N T"]:
    """Those that gradients climb along for a front; none where another strategy looks for it."""
    tasks, points = len(config.objective.tasks), config.front.points
    if not points or not config.front.steps or config.search.strategy != gradient.NAME:
        return np.zeros((0, tasks))
    return lattice(tasks, points)


def of_pool_size(config: Config, strategy: strategies.Strategy) -> int:
    """Evaluations of a search of `analyses.pool_sizes`."""
    if config.search.strategy == gradient.NAME:
        return configs.settings(config).generations * gradient.POPULATION
    return spent(pool_size_budget(config), strategy)


def check_budget(strategy: strategies.Strategy, where: str, budget: int) -> None:
    """Raises `JaxmergeError`, which names the field, unless the budget has a whole generation."""
    if budget < strategy.population:
        raise JaxmergeError(
            "the budget is less than one generation",
            where=where,
            expected=f"at least the population, {strategy.population}",
            found=str(budget),
        )


def spent(budget: int, strategy: strategies.Strategy) -> int:
    """Evaluations of the whole generations that a budget has."""
    return budget // strategy.population * strategy.population


def economy(
    config: Config, individuals: Mapping[str, Float[np.ndarray, "K _"]], population: int
) -> Economy | None:
    """How the search of a config scores fewer examples; None: it does not.

    Args:
        config: whose `search` says it.
        individuals: scores of the single checkpoints on all search examples, by task.
        population: candidates of a generation.
    """
    search = config.search
    parts = deal(individuals, subset=search.subset, seed=config.seed)
    return Economy(parts, max(1, population // 2), search.finalists) if len(parts) > 1 else None


def evaluations(
    config: Config,
    checkpoints: int,
    groups: int = 1,
    *,
    searched: int | None = None,
    draws: int | None = None,
) -> dict[str, int]:
    """Candidates that a run of K checkpoints will have scored at its end, by split, about.

    Args:
        config: of the run.
        checkpoints: K.
        groups: G.
        searched: of the search; None: as many as its budget has.
        draws: that the search's tokens are enough for; None: as many as `search.budget` has.
    """
    wanted, sizes, K = config.analyses, config.analyses.pool_sizes, checkpoints
    strategy = build_strategy(config, K, groups=groups)
    searched = of_search(config, strategy) if searched is None else searched
    over = [of_pool_size(config, build_strategy(config, K, range(m), groups)) for m in sizes]
    decided = config.search.finalists * (1 + len(over)) if config.search.subset < 1 else 0
    dropped = K if wanted.leave_one_out else 0
    pairs = math.comb(len(config.objective.tasks), 2) if wanted.transfer else 0
    draws = spent(config.search.budget, strategy) if draws is None else draws
    names = baseline_names(config)
    found = sum(BASELINES[name].evaluations(K, draws) for name in names)
    seen = sum(BASELINES[name].heldout for name in names)
    return {
        "search": K + found + searched + sum(over) + decided,
        "test": K + len(names) + 1 + config.front.points + dropped + len(over) + pairs,
        "heldout": 2 + seen + pairs if config.heldout else 0,
    }


def budget_divisor(config: Config) -> int:
    """A search along gradients has this part of a budget in tokens.

    With another strategy after it half of them, with climbs along preferences a third.
    """
    if config.search.strategy != gradient.NAME:
        return 2
    return 3 if len(preferences_of(config)) else 1


def within_tokens(
    settings: gradient.Settings,
    tokens: int,
    took: int,
    differentiated: Callable[[Iterable[int]], int],
    scoring: int,
) -> gradient.Settings:
    """The settings with as many steps as tokens are enough for, true scores included.

    The schedule of the learning rate is that of so many steps.

    Args:
        settings: with the most steps.
        tokens: of the budget; 0: any number.
        took: tokens that were taken before the first step.
        differentiated: tokens of some steps; see `SoftScore`.
        scoring: tokens of a true score of all candidates.
    """
    for step in range(settings.steps if tokens else 0):
        took += cost({"differentiated": differentiated([step])})
        took += scoring if step % settings.every == 0 else 0
        if took > tokens:
            return settings._replace(steps=step)
    return settings
