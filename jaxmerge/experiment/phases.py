"""Phases of a run, as its config says: what it will evaluate, the search, the analyses."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmerge import config as configs
from jaxmerge.config import Config
from jaxmerge.experiment import analyses
from jaxmerge.experiment.analyses import Study
from jaxmerge.experiment.budget import (
    build_strategy,
    economy,
    evaluations,
    of_search,
    pool_size_budget,
    spent,
)
from jaxmerge.experiment.prepare import Prepared
from jaxmerge.hosts import processes
from jaxmerge.report.live import Live
from jaxmerge.report.progress import Plan
from jaxmerge.rundir import Candidate, RunDirectory
from jaxmerge.scores.objective import Objective
from jaxmerge.search import gradient, loop, space
from jaxmerge.search.archive import Archive
from jaxmerge.search.baselines import Found
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
    """How many candidates the run will have scored at its end, at most."""
    return Plan(
        evaluations(config, len(prepared.pool.names), prepared.pool.count),
        {split: sum(each.examples.values()) for split, each in prepared.evaluators.items()},
        of_search(config, prepared.strategy) // prepared.strategy.population,
    )


def search(
    config: Config,
    prepared: Prepared,
    archive: Archive,
    objective: Objective,
    individuals: Sequence[Candidate],
) -> Found:
    """The search over all checkpoints."""
    strategy, climbed = prepared.strategy, config.search.strategy == gradient.NAME
    if climbed:
        strategy = _gradient(config, prepared, objective, individuals)
    best = loop.search(
        archive,
        strategy,
        _to_weights(config, prepared.pool.count),
        objective=objective,
        budget=of_search(config, strategy),
        seed=config.seed,
        states=prepared.directory.path / "state",
        save_seconds=config.search.save_seconds,
        economy=_economy(config, prepared.directory, individuals, prepared.strategy),
    )
    decided = _decided(archive, "search", "search")
    if climbed:  # the checkpoints and what the baselines scored are finalists too
        scored = [one for one in archive.past if one.split == "search"]
        best = strongest([best, *scored], objective)
    return Found("search", best, of_search(config, strategy) + decided)


def _gradient(
    config: Config, prepared: Prepared, objective: Objective, individuals: Sequence[Candidate]
) -> Strategy:
    """The search along derivatives of the soft score."""
    pool, soft = prepared.pool, prepared.soft
    assert soft
    agreement = soft.choose_forms([one.scores for one in individuals])
    for task, left_out in soft.left_out.items() if processes.first() else ():
        said = f", {left_out} examples left out" if left_out else ""
        print(
            f"jaxmerge: {task}: soft score {soft.forms[task]}, rank correlation "
            f"{agreement[task]:.2f}{said}",
            file=sys.stderr,
        )
    fields = config.space
    return gradient.gradient(
        soft.slopes,
        configs.settings(config),
        objective,
        groups=pool.count,
        checkpoints=len(pool.names),
        start=config.search.init,
        constraint=fields.constraint,
        bounds=fields.bounds,
        shrink=fields.shrink,
    )


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
            seed=config.seed,
            states=directory.path / "analyses" / name,
            save_seconds=config.search.save_seconds,
            origin=analyses.POOL_SIZE,
            name=name,
            economy=_economy(config, directory, individuals, strategy),
        )
        decided = _decided(archive, analyses.POOL_SIZE, name)
        return Found(name, best, spent(budget, strategy) + decided)

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


def _decided(archive: Archive, origin: str, name: str) -> int:
    """Evaluations of the final decision of a search."""
    sought = (loop.decision(origin), name)
    return sum((one.origin, one.name) == sought for one in archive.past)
