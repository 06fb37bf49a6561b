"""Phases of a run, as its config says: what it will evaluate, the search, the analyses."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmerge import config as configs
from jaxmerge.config import Config, fields
from jaxmerge.experiment import analyses, climb, front, genotypes, methods
from jaxmerge.experiment.analyses import Study
from jaxmerge.experiment.budget import (
    FRONT,
    WARM,
    baseline_names,
    build_strategy,
    economy,
    evaluations,
    of_search,
    pool_size_budget,
)
from jaxmerge.experiment.climb import Climb
from jaxmerge.experiment.prepare import Prepared
from jaxmerge.hosts import processes
from jaxmerge.report.live import Live
from jaxmerge.report.progress import Plan
from jaxmerge.rundir import Candidate, RunDirectory, cost
from jaxmerge.scores.objective import Objective
from jaxmerge.search import gradient, loop, space, surrogate
from jaxmerge.search.archive import Archive, stacked
from jaxmerge.search.archive import best as strongest
from jaxmerge.search.baselines import BASELINES, Found, Setting, begin, start_of
from jaxmerge.search.strategies import Strategy


def live(config: Config, prepared: Prepared) -> Live:
    """Shows the run while it goes on."""
    return Live(
        prepared.directory,
        plan(config, prepared),
        population=prepared.strategy.population,
        report_seconds=config.report.every_seconds,
        tensorboard=config.tensorboard,
        silent=not processes.first(),
    )


def plan(config: Config, prepared: Prepared) -> Plan:
    """How many candidates the run will have scored at its end, about."""
    evaluator, search = prepared.evaluators["search"], config.search
    read, population = max(1, evaluator.read), prepared.strategy.population
    searched, asking = of_search(config, prepared.strategy), 0
    if climb.wanted(config):
        share = len(evaluator.examples) * search.minibatch / sum(evaluator.examples.values())
        asking = cost({"differentiated": round(search.steps * min(share, 1) * read)})
    tokens = asking + searched * max(1, round(read * search.subset))
    if 0 < search.budget_tokens < tokens:  # the same share of all that is searched
        generations = searched // population
        searched = max(1, generations * search.budget_tokens // tokens) * population
        tokens = search.budget_tokens
    pool = prepared.pool
    counts = {"searched": searched, "draws": tokens // read}
    return Plan(
        evaluations(config, len(pool.names), pool.count, **counts),
        {split: sum(each.examples.values()) for split, each in prepared.evaluators.items()},
        searched // population,
    )


def baselines(config: Config, setting: Setting, *, after: bool) -> list[Found]:
    """What the config's baselines find: those that come after the search, or those before it."""
    names = [name for name in baseline_names(config) if BASELINES[name].after == after]
    return [BASELINES[name].find(setting) for name in names]


def search(
    config: Config,
    prepared: Prepared,
    archive: Archive,
    objective: Objective,
    individuals: Sequence[Candidate],
    found: Sequence[Found],
) -> tuple[Found, Climb | None]:
    """The search over all checkpoints, and what it climbed; None: nothing.

    It is along gradients, by a strategy of evosax, or by one that starts where gradients ended.

    Args:
        config: of the run.
        prepared: of the run.
        archive: that scores candidates.
        objective: what is maximised.
        individuals: the single checkpoints.
        found: by the baselines that come before the search.
    """
    strategy, search = prepared.strategy, config.search
    to_coefficients = _to_coefficients(config, prepared, len(prepared.pool.names))
    run = functools.partial(
        loop.search,
        archive,
        to_weights=to_coefficients,
        objective=objective,
        numbers=_numbers(config, prepared, len(prepared.pool.names)),
        seed=config.seed,
        save_seconds=search.save_seconds,
    )
    climbed, budget = None, search.budget_tokens
    start = begin(start_of(fields(config)), objective, individuals, found)
    if climb.wanted(config):
        # The one that the search starts from last: the uniform merge unless it is told.
        merges = [*(one.candidate for one in reversed(found)), *([start] if start else [])]
        climbed = Climb(config, prepared, objective, individuals, merges)
        climbed.say()
        warming = search.strategy != gradient.NAME
        name, states = (WARM, WARM) if warming else ("search", "state")
        best = run(
            climbed.strategy(archive, name, name),
            budget=climbed.evaluations,
            states=prepared.directory.path / states,
            origin=name,
            name=name,
        )
        if not warming:
            if config.front.points:
                front.climb(config, prepared, archive, objective, climbed, to_coefficients)
            return _found(archive, "search", "search", best), climbed
        warm = [one for one in archive.past if one.origin == WARM]
        strategy = climb.warmed(config, prepared, warm)
        budget = max(1, budget - sum(one.cost for one in warm)) if budget else 0
    elif start:
        G = prepared.pool.count
        mean = genotypes.genotypes(config, prepared.method, G, start).reshape(-1)
        strategy = build_strategy(config, len(prepared.pool.names), groups=G, start=mean)
    if search.strategy == surrogate.NAME:
        strategy = _surrogate(config, prepared, archive, objective, start)
    best = run(
        strategy,
        budget=search.budget,
        budget_tokens=budget,
        states=prepared.directory.path / "state",
        economy=_economy(config, prepared.directory, individuals, strategy),
    )
    return _found(archive, "search", "search", best), climbed


def _surrogate(
    config: Config,
    prepared: Prepared,
    archive: Archive,
    objective: Objective,
    merge: Candidate | None,
) -> Strategy:
    """The strategy that is fitted to all merges of the run's log so far."""
    of, groups, fields = prepared.method, prepared.pool.count, config.space
    K, tasks = len(prepared.pool.names), objective.tasks

    def known() -> tuple[np.ndarray, np.ndarray]:
        past = [one for one in archive.past if one.split == "search" and one.out_of is None]
        scores = [[one.scores[task] for task in tasks] for one in past]
        if not config.front.points:
            scores = [[objective.of(one.scores)] for one in past]
        return stacked([one.coefficients for one in past]), np.array(scores)

    start = genotypes.start_genotype(config, of, groups, range(K), merge)
    told = {"checkpoints": K, **genotypes.mapping(config, of, groups)}
    inner = functools.partial(space.row if of else space.mapped, **told)
    return surrogate.surrogate(
        known,
        start.reshape(-1),
        prepared.strategy.population,
        mapped=lambda z: inner(z.reshape(start.shape) if groups > 1 else z),
        sigma=config.search.sigma,
        bounds=fields.bounds,
        tasks=len(tasks) if config.front.points else 1,
    )


def decided(config: Config, archive: Archive, objective: Objective, found: Found) -> Found:
    """The winner. Beside gradients, and of a front, checkpoints and baselines are finalists too."""
    if not climb.wanted(config) and not config.front.points:
        return found
    scored = [one for one in archive.past if one.split == "search"]
    return found._replace(candidate=strongest([found.candidate, *scored], objective))


def analyse(
    config: Config,
    prepared: Prepared,
    archive: Archive,
    objective: Objective,
    individuals: Sequence[Candidate],
    winner: Found,
    climbed: Climb | None,
) -> dict[str, Any]:
    """What results.json says of the analyses that the config asks for."""
    names, directory = prepared.pool.names, prepared.directory

    def search_over(chosen: Sequence[int]) -> Found:
        if config.space.constraint == space.WINDOW:
            chosen = sorted(chosen)  # from the oldest on
        name = f"best-{len(chosen)}"
        budget, groups = pool_size_budget(config), prepared.pool.count
        if climbed:
            strategy = climbed.strategy(archive, analyses.POOL_SIZE, name, chosen)
            budget = climbed.evaluations
        else:
            strategy = build_strategy(config, len(names), chosen, groups)
        to_weights = _to_coefficients(config, prepared, len(chosen))
        best = loop.search(
            archive,
            strategy,
            lambda z: space.spread(to_weights(z), chosen, len(names)),
            objective=objective,
            numbers=_numbers(config, prepared, len(chosen)),
            budget=budget,
            budget_tokens=config.search.budget_tokens,
            seed=config.seed,
            states=directory.path / "analyses" / name,
            save_seconds=config.search.save_seconds,
            origin=analyses.POOL_SIZE,
            name=name,
            economy=_economy(config, directory, individuals, strategy),
        )
        return _found(archive, analyses.POOL_SIZE, name, best)

    study = Study(
        *(archive, directory, names, objective, individuals, winner),
        heldout=bool(config.heldout),
        search_over=search_over,
        pool_sizes=config.analyses.pool_sizes,
    )
    weighted = prepared.method is None or prepared.method.weighted
    wanted = {
        **dict.fromkeys(("nonzero", "weight_vs_score"), weighted),
        "leave_one_out": config.analyses.leave_one_out and weighted,
        "pool_size": bool(config.analyses.pool_sizes),
        "transfer": config.analyses.transfer,
    }
    return analyses.analyse(study, [name for name in analyses.ANALYSES if wanted.get(name, True)])


def stored(prepared: Prepared, winner: Candidate) -> dict[str, Any] | None:
    """What a pool in a few bits does to the winner, for results.json; None: the pool is exact.

    Args:
        prepared: of the run.
        winner: as scored on the test split.
    """
    weights_K = np.array(winner.weights, np.float32)
    error = prepared.pool.stored_error(weights_K)
    if error is None:
        return None
    exact = prepared.evaluators["test"].exact()(weights_K[None])
    scores = {
        task: {"stored": score, "exact": float(exact[task].mean(dtype=np.float64))}
        for task, score in winner.scores.items()
    }
    return {**error, "scores": scores}


def _numbers(config: Config, prepared: Prepared, checkpoints: int) -> loop.ToNumbers | None:
    """Genotypes to the numbers of their windows, of so many checkpoints; None: they have none."""
    fields = config.space
    if fields.constraint != space.WINDOW:
        return None
    return lambda z: space.numbers_of_window(
        z, checkpoints, fields.bounds, groups=prepared.pool.count, shrink=fields.shrink
    )


def _to_coefficients(config: Config, prepared: Prepared, checkpoints: int) -> loop.ToWeights:
    """Genotypes to merge weights of so many checkpoints, or to a method's rows."""
    fields, method, groups = config.space, prepared.method, prepared.pool.count
    constraint = configs.constraint(config)
    if method is None:
        return lambda z: space.weights(
            z,
            constraint,
            fields.bounds,
            groups=groups,
            shrink=fields.shrink,
            checkpoints=checkpoints,
        )
    return lambda z: space.rows(
        z,
        method.checkpoints,
        methods.ranges(method),
        constraint,
        fields.bounds,
        weighted=method.weighted,
        groups=groups,
        shrink=fields.shrink,
    )


def _economy(
    config: Config,
    directory: RunDirectory,
    individuals: Sequence[Candidate],
    strategy: Strategy,
) -> loop.Economy | None:
    rows = [directory.examples(one) for one in individuals]
    scores = {task: np.stack([row[task] for row in rows]) for task in rows[0]}
    return economy(config, scores, strategy.population)


def _found(archive: Archive, origin: str, name: str, best: Candidate) -> Found:
    """The best of a search, and what it took, the final decision included."""
    sought = {(origin, name), (loop.decision(origin), name)}
    sought |= {(WARM, WARM)} if origin == "search" else set()
    past = [one for one in archive.past if one.split == "search"]
    mine = [
        one
        for one in past
        if (one.origin, one.name) in sought or (origin == "search" and one.origin == FRONT)
    ]
    return Found(name, best, len(mine), sum(one.cost for one in mine))
