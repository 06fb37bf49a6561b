"""From a config to all that a run needs: pool, model, tokenizer, tasks, evaluators, strategy."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from jaxmerge import config as configs
from jaxmerge import rundir, sharding
from jaxmerge.checkpoints import mergers
from jaxmerge.checkpoints.pool import Pool, load
from jaxmerge.checkpoints.source import Source
from jaxmerge.config import Config
from jaxmerge.errors import JaxmergeError
from jaxmerge.evaluation.evaluator import Evaluator
from jaxmerge.evaluation.remember import Remembering
from jaxmerge.evaluation.soft import SoftScore
from jaxmerge.evaluation.tokenizer import Tokenizer
from jaxmerge.experiment import methods
from jaxmerge.experiment.budget import build_strategy, check_budget, check_pool_sizes
from jaxmerge.experiment.build import (
    bounds_of,
    build_groups,
    build_limits,
    build_model,
    build_task,
    build_tokenizer,
    warnings_of,
)
from jaxmerge.experiment.held import Held
from jaxmerge.experiment.records import open_directory, record_pool, record_tasks
from jaxmerge.experiment.sizes import least_step, sized
from jaxmerge.experiment.sources import (
    find_checkpoints,
    huggingface_directory,
    model_directories,
    start_jax,
    tokenizer_directory,
)
from jaxmerge.hosts import processes
from jaxmerge.merge.searched import Searched
from jaxmerge.models.model import Model
from jaxmerge.planning.here import residency_here, room_of
from jaxmerge.planning.residency import Room
from jaxmerge.planning.work import Step
from jaxmerge.rundir import RunDirectory
from jaxmerge.scores.objective import Objective
from jaxmerge.search import gradient, strategies
from jaxmerge.sharding import make_mesh
from jaxmerge.tasks.common import Task


class Prepared(NamedTuple):
    """All that a run needs before its first evaluation."""

    directory: RunDirectory
    sources: tuple[Source, ...]
    pool: Pool
    evaluators: dict[str, Evaluator | Remembering]  # by split: search, test and heldout
    strategy: strategies.Strategy
    objective: Objective
    bounds: dict[str, list[float | None]]  # of all tasks, as in results.json
    warnings: tuple[str, ...]  # of the objective's tasks
    tasks: tuple[Task, ...]  # of the objective
    soften: Callable[[Sequence[Task]], SoftScore]  # what a search along gradients climbs
    distances: Callable[[], Float[np.ndarray, " K"]]  # squared, of the checkpoints from pool.base
    method: Searched | None = None  # that candidates are merged by; None: they are weighted sums


def prepare(config: Config, workdir: str, held: Held | None = None) -> Prepared:
    """Checks everything that can be checked early, then loads the pool.

    Args:
        config: see `jaxmerge.config`.
        workdir: the run directory.
        held: what runs before this one have left; it is used, and has this run's parts afterwards.
            Scores are remembered in it. None: this is the only run.

    Raises:
        JaxmergeError: anything that the user can mend.
    """
    _start(config)
    parts = Held() if held is None else held
    parts.release(made_of(config))
    with_base = methods.takes_base(config)
    sources = parts.part("sources", lambda: find_checkpoints(config, with_base=with_base))
    K = len(sources) - with_base
    method = methods.searched(config, K)
    model, tokenizer = parts.part("model", lambda: _model_and_tokenizer(config, sources))
    mesh = _mesh(config)
    tasks, heldout = parts.part("tasks", lambda: _tasks(config))
    groups = build_groups(config, model, sources[0].abstract)
    G = len(groups.names) if groups else 1
    strategy = parts.part("strategy", lambda: build_strategy(config, K, groups=G))
    check_budget(strategy, "search.budget", config.search.budget)
    check_pool_sizes(config, K, G)
    step = least_step(config, sources, model, mesh, groups)
    room, residency = parts.part("residency", lambda: _residency(config, step))
    population = strategy.population
    config = sized(config, workdir, model, step, room, residency=residency, population=population)
    if processes.first():
        rundir.check(workdir, configs.plain(config))
    pool = parts.part(
        "pool",
        lambda: load(
            sources,
            mesh,
            model.sharding_rules,
            dtype=config.pool.dtype,
            residency=residency,
            storage=config.pool.storage,
            rematerialise=step.layers,
            groups=groups,
            method=method,
            layers=model.layers,
        ),
    )
    splits = {"search": (tasks, "search"), "test": (tasks, "test"), "heldout": (heldout, "test")}
    like = huggingface_directory(config, sources)
    make = functools.partial(_evaluator, config, pool, model, tokenizer, mesh, like)
    evaluators = parts.part(
        "evaluators", lambda: _evaluators(make, splits, remember=held is not None)
    )
    directory = _recorded(config, workdir, pool, [*tasks, *heldout])
    return Prepared(
        directory,
        sources,
        pool,
        evaluators,
        strategy,
        configs.objective(config),
        bounds_of([*tasks, *heldout]),
        (*warnings_of(tasks), *_moved(directory)),
        tuple(tasks),
        functools.partial(_soft, config, pool, model, tokenizer, mesh, like),
        functools.partial(_distances, config, sources[:K], model, mesh),
        method,
    )


def _start(config: Config) -> None:
    """Checks the config, and that all processes have the same."""
    configs.check(config)
    start_jax(config)
    processes.agree("the config", json.dumps(configs.plain(config), sort_keys=True).encode())


def _distances(
    config: Config, sources: Sequence[Source], model: Model, mesh: Mesh
) -> Float[np.ndarray, " K"]:
    *_, base = find_checkpoints(config, with_base=True)
    where = sharding.shardings(sources[0].abstract, model.sharding_rules, mesh)
    return mergers.distances(sources, base, where)


def _soft(
    config: Config,
    pool: Pool,
    model: Model,
    tokenizer: Tokenizer,
    mesh: Mesh,
    like: str,
    tasks: Sequence[Task],
) -> SoftScore:
    return SoftScore(
        pool.merge,
        len(pool.names),
        model,
        tokenizer,
        tasks,
        mesh,
        build_limits(config, like),
        groups=pool.groups,
        minibatch=config.search.minibatch,
        seed=config.seed,
    )


def _recorded(config: Config, workdir: str, pool: Pool, tasks: Sequence[Task]) -> RunDirectory:
    """The run directory, with a record of the pool and the tasks."""
    directory = open_directory(config, workdir, orbax="orbax" in config.export.formats)
    try:
        record_pool(directory, pool.records, base=len(pool.records) > len(pool.names))
        record_tasks(directory, tasks)
    except JaxmergeError:
        directory.close()
        raise
    return directory


def _evaluator(
    config: Config,
    pool: Pool,
    model: Model,
    tokenizer: Tokenizer,
    mesh: Mesh,
    like: str,
    tasks: Sequence[Task],
    split: str,
) -> Evaluator:
    return Evaluator(
        pool.merge,
        model,
        tokenizer,
        tasks,
        split,
        mesh,
        candidates_per_step=config.evaluate.candidates_per_step,
        limits=build_limits(config, like),
        vmap_candidates=config.evaluate.vmap_candidates,
    )


def _evaluators(
    make: Callable[[Sequence[Task], str], Evaluator],
    splits: Mapping[str, tuple[Sequence[Task], str]],
    *,
    remember: bool,
) -> dict[str, Evaluator | Remembering]:
    """An evaluator for each of the tasks and splits; with a memory of scores if it is wanted."""
    made = {name: make(*of_split) for name, of_split in splits.items()}
    return {name: Remembering(one) if remember else one for name, one in made.items()}


def made_of(config: Config) -> dict[str, Any]:
    """The fields that each part of a run is made of which others can share; the dearest first."""
    plain = configs.plain(config)
    objective, search = plain["objective"], plain["search"]
    sources = [plain["pool"], plain["export"]["formats"], plain["merge"]["method"]]
    grain = [configs.granularity(config), plain["space"]["patterns"]]
    fields = ("rematerialise", "method", "genes", "variant")
    merged = [*(plain["merge"][field] for field in fields), plain["space"]["per_checkpoint"]]
    merged += [plain["seed"]] if plain["merge"]["method"] != "linear" else []
    pool = [sources, plain["mesh"], merged, grain]
    sizes = [configs.search_examples(config), objective["test_examples"]]
    tasks = [plain["tasks"], objective["tasks"], plain["heldout"], sizes]
    strategy = [search[field] for field in ("strategy", "population", "init", "sigma", "params")]
    of_gradient = search["strategy"] == gradient.NAME
    strategy += [objective["tasks"], plain["front"]["points"], plain["space"]["bounds"]]
    return {
        "pool": pool,
        "residency": pool,
        "evaluators": [pool, tasks, plain["evaluate"], search["population"], of_gradient],
        "strategy": [sources, strategy, grain, merged, plain["space"]["constraint"]],
        "sources": sources,
        "model": sources,
        "tasks": tasks,
    }


def _residency(config: Config, step: Step) -> tuple[Room, str]:
    """The memory of each device before the pool is loaded, and where the pool will live."""
    room = room_of(step.mesh.local_devices)
    residency = residency_here(step, room, "device" if step.layers else config.pool.residency)
    return room, processes.from_first(residency.encode).decode()  # the room differs between hosts


def _moved(directory: RunDirectory) -> list[str]:
    text = processes.from_first(lambda: json.dumps(directory.moved).encode())
    return [
        f"the run goes on elsewhere ({line}): scores may differ in their last bits from there on, "
        "since sums are added up in another order"
        for line in json.loads(text)
    ]


def _model_and_tokenizer(config: Config, sources: Sequence[Source]) -> tuple[Model, Tokenizer]:
    model = build_model(config, sources[0])
    directories = model_directories(config, sources)
    named = tokenizer_directory(config, sources)
    return model, build_tokenizer(config, named, model, directories)


def _tasks(config: Config) -> tuple[list[Task], list[Task]]:
    """Those of the objective, and the held-out ones."""
    return (
        [build_task(config, name) for name in config.objective.tasks],
        [build_task(config, name) for name in config.heldout],
    )


def _mesh(config: Config) -> Mesh:
    axes = config.mesh
    return make_mesh(pop=axes.pop, data=axes.data, fsdp=axes.fsdp, tensor=axes.tensor)
