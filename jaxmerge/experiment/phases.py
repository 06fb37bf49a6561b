"""Phases of a run, as its config says: what it will evaluate, the search, the analyses."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmerge import config as configs
from jaxmerge.config import Config
from jaxmerge.errors import JaxmergeError
from jaxmerge.experiment import analyses
from jaxmerge.experiment.analyses import Study
from jaxmerge.experiment.budget import (
    build_strategy,
    economy,
    evaluations,
    of_search,
    pool_size_budget,
)
from jaxmerge.experiment.prepare import Prepared
from jaxmerge.hosts import processes
from jaxmerge.report.live import Live
from jaxmerge.report.progress import Plan
from jaxmerge.rundir import Candidate, RunDirectory, cost
from jaxmerge.scores.objective import Objective
from jaxmerge.search import gradient, loop, space
from jaxmerge.search.archive import Archive
from jaxmerge.search.baselines import BASELINES, Found, Setting
from jaxmerge.search.baselines import best as strongest
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
    read, soft, search = prepared.evaluators["search"].read, prepared.soft, config.search
    searched = of_search(config, prepared.strategy)
    tokens = searched * read
    if soft:
        tokens += cost({"differentiated": soft.differentiated(range(search.steps))})
    if search.budget_tokens:
        tokens = min(tokens, search.budget_tokens)
    return Plan(
        evaluations(config, len(prepared.pool.names), prepared.pool.count, tokens // max(1, read)),
        {split: sum(each.examples.values()) for split, each in prepared.evaluators.items()},
        searched // prepared.strategy.population,
    )


def baselines(config: Config, setting: Setting, *, after: bool) -> list[Found]:
    """What the config's baselines find: those that come after the search, or those before it."""
    wanted = [name for name in config.baselines if BASELINES[name].after == after]
    return [BASELINES[name].find(setting) for name in wanted]


def search(
    config: Config,
    prepared: Prepared,
    archive: Archive,
    objective: Objective,
    individuals: Sequence[Candidate],
) -> Found:
    """The search over all checkpoints."""
    strategy, evaluations = prepared.strategy, config.search.budget
    climbs = config.search.strategy == gradient.NAME
    if climbs:
        strategy, evaluations = _gradient(config, prepared, objective, individuals)
    best = loop.search(
        archive,
        strategy,
        _to_weights(config, prepared.pool.count),
        objective=objective,
        budget=evaluations,
        budget_tokens=0 if climbs else config.search.budget_tokens,
        seed=config.seed,
        states=prepared.directory.path / "state",
        save_seconds=config.search.save_seconds,
        economy=_economy(config, prepared.directory, individuals, prepared.strategy),
    )
    return _found(archive, "search", "search", best)


def decided(config: Config, archive: Archive, objective: Objective, found: Found) -> Found:
    """The winner. For a search by gradients, checkpoints and baselines are finalists too."""
    if config.search.strategy != gradient.NAME:
        return found
    scored = [one for one in archive.past if one.split == "search"]
    return found._replace(candidate=strongest([found.candidate, *scored], objective))


def _gradient(
    config: Config, prepared: Prepared, objective: Objective, individuals: Sequence[Candidate]
) -> tuple[Strategy, int]:
    """The search along derivatives of the soft score, and how many candidates it scores."""
    pool, soft = prepared.pool, prepared.soft
    assert soft
    looked = soft.read
    agreement = soft.choose_forms([one.scores for one in individuals])
    for task, left_out in soft.left_out.items() if processes.first() else ():
        said = f", {left_out} examples left out" if left_out else ""
        print(
            f"jaxmerge: {task}: soft score {soft.forms[task]}, rank correlation "
            f"{agreement[task]:.2f}{said}",
            file=sys.stderr,
        )
    fields, first = config.space, {"read": soft.read - looked}
    settings = _within_tokens(config, soft.differentiated, cost(first), individuals)

    def tokens(generation: int) -> Mapping[str, int]:
        every = settings.every
        steps = range(generation * every, min((generation + 1) * every, settings.steps))
        told = {"differentiated": soft.differentiated(steps)}
        return told | (first if generation == 0 else {})

    strategy = gradient.gradient(
        soft.slopes,
        settings,
        objective,
        groups=pool.count,
        checkpoints=len(pool.names),
        start=config.search.init,
        constraint=fields.constraint,
        bounds=fields.bounds,
        shrink=fields.shrink,
    )
    return strategy._replace(tokens=tokens), settings.generations * gradient.POPULATION


def _within_tokens(
    config: Config,
    differentiated: Callable[[Iterable[int]], int],
    first: int,
    individuals: Sequence[Candidate],
) -> gradient.Settings:
    """The settings with as many steps as the config's tokens are enough for, true scores included.

    The schedule of the learning rate is that of so many steps. A true score is as dear as that of
    the dearest single checkpoint.

    Args:
        config: of the run.
        differentiated: tokens of some steps; see `SoftScore`.
        first: tokens that were taken before the first step.
        individuals: the single checkpoints.
    """
    settings, budget = configs.settings(config), config.search.budget_tokens
    scoring = gradient.POPULATION * max(one.cost for one in individuals)
    took = first
    for step in range(settings.steps if budget else 0):
        took += cost({"differentiated": differentiated([step])})
        took += scoring if step % settings.every == 0 else 0
        if took > budget and not step:
            raise JaxmergeError(
                "the budget is less than one step and its true scores",
                where="search.budget_tokens",
                expected=f"at least {took}",
                found=str(budget),
            )
        if took > budget:
            return settings._replace(steps=step)
    return settings


def climbed(prepared: Prepared) -> dict[str, Any]:
    """What results.json says of a search by gradients besides; {}: there was none."""
    soft = prepared.soft
    if not soft:
        return {}
    return {
        task: {
            "form": soft.forms[task],
            "spearman": None if math.isnan(agreement) else agreement,
            "left_out": soft.left_out[task],
        }
        for task, agreement in soft.agreement.items()
    }


def analyse(
    config: Config,
    prepared: Prepared,
    archive: Archive,
    objective: Objective,
    individuals: Sequence[Candidate],
    winner: Found,
) -> dict[str, Any]:
    """What results.json says of the analyses that the config asks for."""
    names, directory = prepared.pool.names, prepared.directory

    def search_over(chosen: Sequence[int]) -> Found:
        name = f"best-{len(chosen)}"
        budget, groups = pool_size_budget(config), prepared.pool.count
        strategy = build_strategy(config, len(names), chosen, groups)
        to_weights = _to_weights(config, groups)
        best = loop.search(
            archive,
            strategy,
            lambda z: space.spread(to_weights(z), chosen, len(names)),
            objective=objective,
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
    wanted = {
        "leave_one_out": config.analyses.leave_one_out,
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


def _to_weights(config: Config, groups: int) -> loop.ToWeights:
    """Genotypes to merge weights, as the config says."""
    fields = config.space
    return lambda z: space.weights(
        z, fields.constraint, fields.bounds, groups=groups, shrink=fields.shrink
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
    mine = [one for one in archive.past if (one.origin, one.name) in sought]
    return Found(name, best, len(mine), sum(one.cost for one in mine))
