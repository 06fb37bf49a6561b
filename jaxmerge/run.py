"""Search for the linear combination of checkpoints that beats all of them.

    python -m jaxmerge.run --config=configs/quickstart.py --workdir=runs/quickstart

Loads the pool of checkpoints that the config names, scores every checkpoint, searches over merge
weights, tests the winner and all baselines on examples that the search never saw, and writes it all
to --workdir: results.json, report.html, every candidate in candidates.jsonl, and the winner as a
checkpoint in merged/. The same command on the same directory goes on where it was stopped.

Any field of the config can be set on the command line: --config.search.budget=400. The fields, with
their units and defaults, are in jaxmerge/config.py.
"""

from __future__ import annotations

import dataclasses
import logging as python_logging
import os
import shlex
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from absl import app, flags, logging
from jax.sharding import Mesh
from ml_collections import config_flags

from jaxmerge import config as configs
from jaxmerge import report, results, rundir, space
from jaxmerge.checkpoints import orbax
from jaxmerge.checkpoints.pool import Pool, load, survey
from jaxmerge.checkpoints.source import Source
from jaxmerge.config import Config
from jaxmerge.errors import JaxmergeError
from jaxmerge.evaluate import Evaluator
from jaxmerge.merge.linear import linear
from jaxmerge.models.architecture import DecoderConfig
from jaxmerge.models.decoder import decoder
from jaxmerge.models.model import Model, from_apply
from jaxmerge.progress import Progress
from jaxmerge.rundir import RunDirectory
from jaxmerge.search import baselines, strategies
from jaxmerge.search.archive import Archive
from jaxmerge.search.baselines import Found, Setting
from jaxmerge.search.loop import search
from jaxmerge.sharding import make_mesh
from jaxmerge.tasks import TASKS
from jaxmerge.tasks.common import Task
from jaxmerge.tokenizer import Bytes, Tokenizer


class Prepared(NamedTuple):
    """All that a run needs before its first evaluation."""

    directory: RunDirectory
    pool: Pool
    evaluators: dict[str, Evaluator]  # by split: search, test and heldout
    strategy: strategies.Strategy
    task_weights: dict[str, float]


def run(config: Config, workdir: str, command: str = "") -> dict[str, Any]:
    """The whole run; returns what results.json says.

    Args:
        config: from a `get_config()`; see `jaxmerge.config`.
        workdir: the run directory.
        command: what the report says to run again.

    Raises:
        JaxmergeError: anything that the user can mend.
    """
    seconds: dict[str, float] = {}
    with _timed(seconds, "load"):
        directory, pool, evaluators, strategy, task_weights = prepare(config, workdir)

    progress = Progress(_evaluations(config, pool, strategy), task_weights)
    with closing(directory), progress:
        archive = Archive(directory, evaluators, progress.candidates)
        with _timed(seconds, "individuals"):
            individuals = baselines.individuals(archive, pool.names)
        with _timed(seconds, "baselines"):
            budget = config.search.budget // strategy.population * strategy.population
            setting = Setting(archive, individuals, task_weights, budget, config.seed)
            found = [baselines.BASELINES[name].find(setting) for name in config.baselines]
        with _timed(seconds, "search"):
            best = search(
                archive,
                strategy,
                lambda z: space.weights(z, config.space.constraint, config.space.bounds),
                task_weights=task_weights,
                budget=config.search.budget,
                seed=config.seed,
                states=directory.path / "state",
                save_seconds=config.search.save_seconds,
            )
        with _timed(seconds, "test"):
            alone = [Found(candidate.name, candidate, 1) for candidate in individuals]
            winner = Found("search", best, budget)
            tested = results.score_on_test(archive, [*alone, *found, winner])
            heldout = {}
            if config.heldout:
                favourite = next(one for one in alone if one.candidate == _best(setting))
                uniform = [method for method in found if method.name == "uniform"]
                heldout = results.score_heldout(archive, [winner, favourite, *uniform])

        with _timed(seconds, "export"):
            if config.export:
                _export(directory, pool, winner)
        with _timed(seconds, "statistics"):
            findings = results.collect(
                directory, pool.names, task_weights, alone, found, winner, tested, heldout
            )
        findings = {
            "version": 1,
            "command": command,
            **findings,
            "seconds": {phase: round(taken, 3) for phase, taken in seconds.items()},
            **results.environment(),
        }
        directory.write_json("results.json", findings)
        report.write(directory.path)
    return findings


def prepare(config: Config, workdir: str) -> Prepared:
    """Checks everything that can be checked early, then loads the pool."""
    configs.check(config)
    _start_jax(config)
    sources = survey(config.pool.checkpoints, subtree=config.pool.subtree)
    model, mesh = _model(config, sources), _mesh(config)
    splits = {
        "search": [_task(config, name) for name in config.objective.tasks],
        "test": [_task(config, name) for name in config.objective.tasks],
        "heldout": [_task(config, name) for name in config.heldout],
    }
    strategy = _strategy(config, len(sources))
    rundir.check(workdir, configs.plain(config))
    pool = load(sources, mesh, model.sharding_rules, dtype=config.pool.dtype)
    evaluators = {
        name: Evaluator(
            pool.trees,
            model,
            _tokenizer(config),
            tasks,
            "search" if name == "search" else "test",
            mesh,
            candidates_per_step=config.evaluate.candidates_per_step or mesh.shape["pop"],
            batch_size=config.evaluate.batch_size,
            vmap_candidates=config.evaluate.vmap_candidates,
        )
        for name, tasks in splits.items()
    }
    directory = RunDirectory(workdir, configs.plain(config))
    try:
        _record_pool(directory, pool)
    except JaxmergeError:
        directory.close()
        raise
    return Prepared(directory, pool, evaluators, strategy, configs.task_weights(config))


def _start_jax(config: Config) -> None:
    if config.mesh.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", config.mesh.cpu_devices)
    if config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(config.compilation_cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def _mesh(config: Config) -> Mesh:
    axes = config.mesh
    return make_mesh(pop=axes.pop, data=axes.data, fsdp=axes.fsdp, tensor=axes.tensor)


def _model(config: Config, sources: Sequence[Source]) -> Model:
    named, arguments = config.pool.model, config.pool.model_args.to_dict()
    if not named:
        arguments = dict(sources[0].architecture)
        named = arguments.pop("model", "")
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


def _tokenizer(config: Config) -> Tokenizer:
    if config.pool.tokenizer == "bytes":
        return Bytes()
    return configs.imported(config.pool.tokenizer, "pool.tokenizer")()


def _task(config: Config, name: str) -> Task:
    arguments = config.tasks.get(name, ml_collections.ConfigDict()).to_dict()
    builder = arguments.pop("builder", "")
    build = configs.imported(builder, f"tasks.{name}.builder") if builder else TASKS[name]
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


def _strategy(config: Config, checkpoints: int) -> strategies.Strategy:
    start = config.search.init
    if start and len(start) != checkpoints:
        raise JaxmergeError(
            "needs one value per checkpoint",
            where="search.init",
            expected=f"{checkpoints} values",
            found=str(len(start)),
        )
    population = config.search.population or strategies.default_population(checkpoints)
    if config.search.budget < population:
        raise JaxmergeError(
            "the budget is less than one generation",
            where="search.budget",
            expected=f"at least the population, {population}",
            found=str(config.search.budget),
        )
    return strategies.evosax(
        config.search.strategy,
        checkpoints,
        population,
        mean=np.array(start, np.float32) if start else None,
        sigma=config.search.sigma,
        params=config.search.params.to_dict(),
    )


def _record_pool(directory: RunDirectory, pool: Pool) -> None:
    """Writes pool.json; refuses a directory whose candidates were made of other checkpoints."""
    records = [dataclasses.asdict(record) for record in pool.records]
    known = directory.read_json("pool.json")
    if known is not None:
        for before, now in zip(known["checkpoints"], records):
            if before["fingerprint"] != now["fingerprint"]:
                raise JaxmergeError(
                    "the checkpoint is not the one that this run directory was started with",
                    where=now["source"],
                    expected=f"fingerprint {before['fingerprint']}",
                    found=now["fingerprint"],
                )
    directory.write_json("pool.json", {"checkpoints": records})


def _evaluations(config: Config, pool: Pool, strategy: strategies.Strategy) -> int:
    """How many candidates the run will have scored at its end, on all splits."""
    K, budget = len(pool.names), config.search.budget // strategy.population * strategy.population
    found = sum(baselines.BASELINES[name].evaluations(K, budget) for name in config.baselines)
    tested = K + len(config.baselines) + 1
    heldout = 2 + ("uniform" in config.baselines) if config.heldout else 0
    return K + found + budget + tested + heldout


def _best(setting: Setting) -> Any:
    return baselines.best(setting.individuals, setting.task_weights)


def _export(directory: RunDirectory, pool: Pool, winner: Found) -> None:
    path = directory.path / "merged" / "orbax"
    if not path.exists():
        merged = linear(pool.trees, np.asarray(winner.candidate.weights, np.float32))
        orbax.save(path, merged, architecture=pool.architecture)


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - started


def main(argv: Sequence[str]) -> None:
    """Runs what the flags say, and prints the table of results."""
    if len(argv) > 1:
        raise JaxmergeError("these arguments are no flags", found=" ".join(argv[1:]))
    config, workdir = flags.FLAGS.config, flags.FLAGS.workdir
    findings = run(config, workdir, "python -m jaxmerge.run " + shlex.join(sys.argv[1:]))
    print(results.table(findings))
    print(f"\nReport: {Path(workdir) / 'report.html'}")


def console() -> None:
    """The command line: `jaxmerge`, or `python -m jaxmerge.run`."""
    if {"-h", "--help", "-help", "--helpfull"} & set(sys.argv[1:]):
        print(f"{(__doc__ or '').strip()}\n\n{configs.reference()}")
        return
    sys.path.insert(0, os.getcwd())  # for the import paths in configs
    config_flags.DEFINE_config_file("config", None, "Path of the config file.")
    flags.DEFINE_string("workdir", None, "The run directory; made if it is missing.")
    try:
        app.run(main, flags_parser=_parse)
    except JaxmergeError as error:
        print(f"jaxmerge: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(
            2
        )  # at once: reads that Orbax gave up would complain of it while Python shuts down
    except KeyboardInterrupt:
        print("jaxmerge: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


def _parse(argv: Sequence[str]) -> list[str]:
    """Parses the flags, config file included; what is wrong in them is the user's to mend."""
    try:
        rest = flags.FLAGS(argv)
        for name in ("config", "workdir"):
            if not flags.FLAGS[name].present:
                raise JaxmergeError(f"--{name} is missing; --help says how to use it")
        flags.FLAGS.config.to_dict()  # a config file that can't be loaded says so when it is used
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        said = str(error.args[0] if error.args else error)
        raise JaxmergeError(said, where="command line or config file") from error
    if not flags.FLAGS["verbosity"].present:
        _quiet()
    return rest


def _quiet() -> None:
    """Orbax tells of each file it opens, and of each read that it gives up on a damaged one."""
    logging.set_verbosity(logging.WARNING)
    python_logging.getLogger("asyncio").disabled = True
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited")
    sys.unraisablehook = lambda unraisable: logging.debug("%s", unraisable.exc_value)


if __name__ == "__main__":
    console()
