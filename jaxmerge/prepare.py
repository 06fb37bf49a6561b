"""From a config to all that a run needs: pool, model, tokenizer, tasks, evaluators, strategy."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from jaxmerge import config as configs
from jaxmerge import processes, rundir
from jaxmerge.batches import Limits
from jaxmerge.checkpoints.pool import Pool, load
from jaxmerge.checkpoints.source import Source
from jaxmerge.config import Config
from jaxmerge.errors import JaxmergeError
from jaxmerge.evaluate import Evaluator
from jaxmerge.formatting import plain_bounds
from jaxmerge.held import Held
from jaxmerge.models import families
from jaxmerge.models.architecture import DecoderConfig
from jaxmerge.models.decoder import decoder
from jaxmerge.models.model import Model, from_apply
from jaxmerge.objective import Objective
from jaxmerge.planning.here import residency_here, room_of
from jaxmerge.planning.residency import Room
from jaxmerge.planning.work import Step
from jaxmerge.remember import Remembering
from jaxmerge.rundir import RunDirectory
from jaxmerge.search import strategies
from jaxmerge.searches import build_strategy, check_budget, check_pool_sizes
from jaxmerge.sharding import make_mesh
from jaxmerge.sized import least_step, sized
from jaxmerge.sources import find_checkpoints, huggingface_directory, record_pool, start_jax
from jaxmerge.tasks import BUILDERS
from jaxmerge.tasks.common import Example, Task
from jaxmerge.tokenizer import Bytes, Pretrained, Tokenizer


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
    configs.check(config)
    start_jax(config)
    processes.agree("the config", json.dumps(configs.plain(config), sort_keys=True).encode())
    parts = Held() if held is None else held
    parts.release(made_of(config))
    sources = parts.part("sources", lambda: find_checkpoints(config))
    model, tokenizer = parts.part("model", lambda: _model_and_tokenizer(config, sources))
    mesh = _mesh(config)
    tasks, heldout = parts.part("tasks", lambda: _tasks(config))
    strategy = parts.part("strategy", lambda: build_strategy(config, len(sources)))
    check_budget(strategy, "search.budget", config.search.budget)
    check_pool_sizes(config, len(sources))
    step = least_step(config, sources, model, mesh)
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
        ),
    )
    splits = {"search": (tasks, "search"), "test": (tasks, "test"), "heldout": (heldout, "test")}
    make = functools.partial(
        Evaluator,
        pool.merge,
        model,
        tokenizer,
        mesh=mesh,
        candidates_per_step=config.evaluate.candidates_per_step,
        limits=build_limits(config, huggingface_directory(config, sources)),
        vmap_candidates=config.evaluate.vmap_candidates,
    )
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
    )


def _recorded(config: Config, workdir: str, pool: Pool, tasks: Sequence[Task]) -> RunDirectory:
    """The run directory, with a record of the pool and the tasks."""
    directory = open_directory(config, workdir, orbax="orbax" in config.export.formats)
    try:
        record_pool(directory, pool.records)
        record_tasks(directory, tasks)
    except JaxmergeError:
        directory.close()
        raise
    return directory


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
    sources = [plain["pool"], plain["export"]["formats"]]
    pool = [sources, plain["mesh"], plain["merge"]["rematerialise"]]
    sizes = [objective["search_examples"], objective["test_examples"]]
    tasks = [plain["tasks"], objective["tasks"], plain["heldout"], sizes]
    strategy = [search[field] for field in ("strategy", "population", "init", "sigma", "params")]
    return {
        "pool": pool,
        "residency": pool,
        "evaluators": [pool, tasks, plain["evaluate"], search["population"]],
        "strategy": [sources, strategy],
        "sources": sources,
        "model": sources,
        "tasks": tasks,
    }


def _residency(config: Config, step: Step) -> tuple[Room, str]:
    """The memory of each device before the pool is loaded, and where the pool will live."""
    room = room_of(step.mesh.local_devices)
    residency = residency_here(step, room, "device" if step.layers else config.pool.residency)
    return room, processes.from_first(residency.encode).decode()  # the room differs between hosts


def open_directory(config: Config, workdir: str, *, orbax: bool) -> RunDirectory:
    """The run directory, which process 0 writes and all processes know.

    Args:
        config: of the run.
        workdir: its path.
        orbax: whether an Orbax checkpoint will be written to it, by all processes.

    Raises:
        JaxmergeError: see `RunDirectory`; or not all processes see what they are to write to.
    """
    directory = RunDirectory(
        workdir,
        configs.plain(config),
        writer=processes.first(),
        from_writer=processes.from_first,
    )
    if processes.several() and orbax:
        try:
            _check_shared(directory)
        except JaxmergeError:
            directory.close()
            raise
    return directory


def _check_shared(directory: RunDirectory) -> None:
    mark = directory.path / "shared.txt"

    def make() -> bytes:
        mark.write_text(secrets.token_hex(8))
        return mark.read_bytes()

    token = processes.from_first(make)
    blind = processes.spread(
        lambda _: [float(not (mark.exists() and mark.read_bytes() == token))],
        range(jax.process_count()),  # one for each
    )
    if blind.any():
        raise JaxmergeError(
            "an Orbax checkpoint is written by all processes, and not all see the directory",
            where=str(directory.path),
            expected="a file system that they share, or export.formats without orbax",
            found=f"nothing of it in process {np.flatnonzero(blind).tolist()}",
        )


def _moved(directory: RunDirectory) -> list[str]:
    text = processes.from_first(lambda: json.dumps(directory.moved).encode())
    return [
        f"the run goes on elsewhere ({line}): scores may differ in their last bits from there on, "
        "since sums are added up in another order"
        for line in json.loads(text)
    ]


def record_tasks(directory: RunDirectory, tasks: Sequence[Task]) -> None:
    """Writes tasks.json; refuses a directory whose candidates were scored on other examples."""
    records = {
        task.name: {"bounds": plain_bounds(task.bounds)}
        | {
            split: {"examples": len(examples), "digest": _digest(examples)}
            for split, examples in task.splits.items()
            if split != "train"
        }
        for task in tasks
    }
    processes.agree("the tasks' examples", json.dumps(records).encode())
    known = directory.read_json("tasks.json") or records
    changed = [
        name
        for name, record in records.items()
        # Directories of before have no bounds, which are for the report.
        if {"bounds": record["bounds"], **known.get(name, {})} != record
    ]
    if changed:
        raise JaxmergeError(
            "the examples are not those that this run directory was started with",
            where=f"task {', '.join(changed)}",
            expected=str([known.get(name) for name in changed]),
            found=str([records[name] for name in changed]),
        )
    directory.write_json("tasks.json", records)


def _digest(examples: Sequence[Example]) -> str:
    """Of what is asked and what is right, 16 hexadecimal digits."""
    asked = [(example.prompt, example.target, example.choices) for example in examples]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def bounds_of(tasks: Sequence[Task]) -> dict[str, list[float | None]]:
    """The tasks' bounds, as in results.json."""
    return {task.name: plain_bounds(task.bounds) for task in tasks}


def warnings_of(tasks: Sequence[Task]) -> tuple[str, ...]:
    """What the tasks warn of, each by its name."""
    return tuple(f"{task.name}: {task.warning}" for task in tasks if task.warning)


def build_limits(config: Config, like: str) -> Limits:
    """What goes through a model at a time.

    Args:
        config: whose `evaluate` says it.
        like: Hugging Face directory whose configuration says the context; "": nothing does.
    """
    evaluate = config.evaluate
    return Limits(
        rows=evaluate.batch_size,
        tokens=evaluate.batch_tokens,
        context=evaluate.context or (families.context(like) if like else 0),
        truncate=evaluate.too_long == "truncate",
    )


def _model_and_tokenizer(config: Config, sources: Sequence[Source]) -> tuple[Model, Tokenizer]:
    model = build_model(config, sources[0])
    return model, build_tokenizer(config, huggingface_directory(config, sources), model)


def _tasks(config: Config) -> tuple[list[Task], list[Task]]:
    """Those of the objective, and the held-out ones."""
    return (
        [build_task(config, name) for name in config.objective.tasks],
        [build_task(config, name) for name in config.heldout],
    )


def _mesh(config: Config) -> Mesh:
    axes = config.mesh
    return make_mesh(pop=axes.pop, data=axes.data, fsdp=axes.fsdp, tensor=axes.tensor)


def build_model(config: Config, source: Source) -> Model:
    """The model that a checkpoint is of, as the config or else the checkpoint says.

    Raises:
        JaxmergeError: neither says, or there is no decoder for it.
    """
    named, arguments = config.pool.model, config.pool.model_args.to_dict()
    if not named:
        arguments = dict(source.architecture)
        named = arguments.pop("model", "")
        if "model_type" in arguments:
            raise JaxmergeError(
                f"there is no decoder for models of type {arguments['model_type']}, so these "
                "checkpoints can't be evaluated",
                where="pool.model",
                expected=f'one of {", ".join(families.FAMILIES)}; or your own, "module:function"; '
                "--mode=merge merges them with given weights",
            )
        if not named:
            raise JaxmergeError(
                "the checkpoints do not say which model they are of",
                where="pool.model",
                expected='"decoder" with pool.model_args, or "module:function"',
            )
    try:
        if named == "decoder":
            return decoder(DecoderConfig.from_plain(arguments))
        built = configs.imported(named, "pool.model")(**arguments)
    except TypeError as error:
        raise JaxmergeError(
            "these are not the model's arguments", where="pool.model_args", found=str(error)
        ) from error
    return built if isinstance(built, Model) else from_apply(built)


def build_tokenizer(config: Config, directory: str, model: Model) -> Tokenizer:
    """The tokenizer that the config names, or else that of a Hugging Face directory.

    Raises:
        JaxmergeError: there is none.
    """
    pool = config.pool
    named = pool.tokenizer or directory
    if named == "bytes" or (not named and model.vocabulary in (0, Bytes.vocabulary)):
        return Bytes()
    if not named:
        raise JaxmergeError(
            "the checkpoints do not say which tokenizer they are for",
            where="pool.tokenizer",
            expected='a Hugging Face directory here or in pool.base, "bytes", or "module:function"',
        )
    if os.path.isdir(named):
        return Pretrained(named, chat=pool.chat, system=pool.system)
    if ":" not in named:
        raise JaxmergeError("there is no such directory", where="pool.tokenizer", found=named)
    return configs.imported(named, "pool.tokenizer")()


def build_task(config: Config, name: str) -> Task:
    """The task of this name, with the arguments and sizes that the config gives it."""
    arguments = config.tasks.get(name, ml_collections.ConfigDict()).to_dict()
    builder = arguments.pop("builder", name)
    build = BUILDERS.get(builder) or configs.imported(builder, f"tasks.{name}.builder")
    sizes = {
        "search": config.objective.search_examples,
        "test": config.objective.test_examples,
    }
    try:
        task = build(**{**sizes, **arguments})
    except TypeError as error:
        raise JaxmergeError(
            "these are not the task's arguments", where=f"tasks.{name}", found=str(error)
        ) from error
    return dataclasses.replace(task, name=name)
