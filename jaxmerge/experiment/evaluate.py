"""Checkpoints by themselves: each is loaded, scored on the test examples, and let go."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from jaxmerge import config as configs
from jaxmerge import rundir
from jaxmerge.checkpoints.pool import Record, load
from jaxmerge.checkpoints.source import Source
from jaxmerge.checkpoints.survey import find
from jaxmerge.config import Config
from jaxmerge.errors import JaxmergeError
from jaxmerge.evaluation.evaluator import Evaluator
from jaxmerge.evaluation.tokenizer import Tokenizer
from jaxmerge.experiment import results
from jaxmerge.experiment.answers import Answers
from jaxmerge.experiment.build import (
    bounds_of,
    build_limits,
    build_model,
    build_task,
    build_tokenizer,
    warnings_of,
)
from jaxmerge.experiment.records import open_directory, record_pool, record_tasks
from jaxmerge.experiment.sizes import least_step, sized
from jaxmerge.experiment.sources import (
    huggingface_directory,
    members,
    model_directories,
    start_jax,
    tokenizer_directory,
    where_of,
)
from jaxmerge.hosts import processes
from jaxmerge.models.model import Model
from jaxmerge.planning.here import room_of
from jaxmerge.rundir import Candidate, RunDirectory
from jaxmerge.scores import formatting, stats
from jaxmerge.scores.objective import Objective, define
from jaxmerge.sharding import make_mesh
from jaxmerge.tasks.common import Task

_ORIGIN = "evaluation"  # of a candidate in the log


class _Subject(NamedTuple):
    """A checkpoint to be scored."""

    source: Source
    model: Model
    directory: str  # that has its Hugging Face config; "": none
    tokenizer: str  # that has its tokenizer; "": none


def evaluate(config: Config, workdir: str, command: str = "") -> dict[str, Any]:
    """Scores each checkpoint by itself on the test split; returns what evaluation.json says.

    The checkpoints need not be alike, nor of one architecture; one is in memory at a time. The same
    command goes on where it stopped: a checkpoint that has been scored is not looked at again.

    Args:
        config: from a `get_config()`; its search, baselines and export are not looked at.
        workdir: the run directory.
        command: what evaluation.json says to run again.

    Raises:
        JaxmergeError: anything that the user can mend. What was scored before stays.
    """
    configs.check_pool(config)
    configs.check_evaluation(config)
    start_jax(config)
    subjects = _subjects(config)
    tasks = [build_task(config, name) for name in config.objective.tasks]
    heldout = [build_task(config, name) for name in config.heldout]
    _check_examples([*tasks, *heldout])
    if processes.first():
        rundir.check(workdir, configs.plain(config))
    head = {
        "version": 1,
        "command": command,
        "tasks": [task.name for task in tasks],
        "heldout_tasks": [task.name for task in heldout],
        "objective": _plain(_shown(configs.objective(config))),
        "bounds": bounds_of([*tasks, *heldout]),
        "warnings": list(warnings_of([*tasks, *heldout])),
    }
    for warning in head["warnings"] if processes.first() else ():
        print(f"jaxmerge: {warning}", file=sys.stderr)
    with closing(open_directory(config, workdir, orbax=False)) as directory:
        record_tasks(directory, [*tasks, *heldout])
        mesh, entries, answers = _mesh(config), [], Answers(directory, "test")
        for k, subject in enumerate(subjects):
            if k == len(directory.candidates):
                _score(config, directory, subject, [*tasks, *heldout], mesh, answers)
            entries.append(_entry(config, directory, k, subject.source))
            findings = {**head, "checkpoints": entries, **results.environment()}
            directory.write_json("evaluation.json", findings)
        odd = answers.warn(directory.candidates, head["bounds"])
        findings["warnings"] = [*head["warnings"], *odd]
        directory.write_json("evaluation.json", findings)
    for warning in odd if processes.first() else ():
        print(f"jaxmerge: {warning}", file=sys.stderr)
    return findings


def table(findings: Mapping[str, Any]) -> str:
    """The scores in words: a line per checkpoint, a column per task, with 95% intervals."""
    columns = [*findings["tasks"], *findings["heldout_tasks"]]
    forms = [formatting.of_task(findings["bounds"][task]) for task in columns]
    names = list(columns)
    if findings["objective"]:
        columns.append("objective")
        names.append(findings["objective"]["aggregate"])
        forms.append(formatting.of_results(findings)["objective"])
    title, names = formatting.headings("test scores", names, forms)
    rows = [[title, *names]]
    for entry in findings["checkpoints"]:
        cells = [
            f"{form.score(entry['test'][column])} {form.interval(entry['ci95'][column])}"
            for column, form in zip(columns, forms)
        ]
        rows.append([entry["name"], *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        f"{row[0]:<{widths[0]}}  "
        + "  ".join(f"{cell:>{wide}}" for cell, wide in zip(row[1:], widths[1:]))
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _subjects(config: Config) -> list[_Subject]:
    """All checkpoints with their models; what can't be evaluated is refused before any is."""
    subjects = []
    for source in find(members(config), **where_of(config)):
        model, directory = build_model(config, source), huggingface_directory(config, [source])
        subject = _Subject(source, model, directory, tokenizer_directory(config, [source]))
        _tokenizer(config, subject)
        subjects.append(subject)
    return subjects


def _tokenizer(config: Config, subject: _Subject) -> Tokenizer:
    directories = model_directories(config, [subject.source])
    return build_tokenizer(config, subject.tokenizer, subject.model, directories)


def _check_examples(tasks: Sequence[Task]) -> None:
    for task in tasks:
        if not task.splits.get("test"):
            raise JaxmergeError(
                "the test split has no examples",
                where=f"task {task.name}",
                expected="some in its builder's data, or another task",
            )


def _mesh(config: Config) -> Mesh:
    """The mesh of the config, with the places of candidates given to examples."""
    axes = config.mesh
    data = -1 if -1 in (axes.pop, axes.data) else axes.pop * axes.data
    return make_mesh(pop=1, data=data, fsdp=axes.fsdp, tensor=axes.tensor)


def _score(
    config: Config,
    directory: RunDirectory,
    subject: _Subject,
    tasks: Sequence[Task],
    mesh: Mesh,
    answers: Answers,
) -> None:
    """Loads a checkpoint, records what it is and how it scores, and lets it go."""
    started = time.perf_counter()
    source, model = subject.source, subject.model
    config = config.copy_and_resolve_references()
    config.evaluate.candidates_per_step = 1
    room, step = room_of(mesh.local_devices), least_step(config, [source], model, mesh)
    config = sized(
        *(config, str(directory.path), model, step, room), residency="device", population=1
    )
    pool = load([source], mesh, model.sharding_rules, dtype=config.pool.dtype)
    evaluator = Evaluator(
        pool.merge,
        model,
        _tokenizer(config, subject),
        tasks,
        "test",
        mesh,
        candidates_per_step=1,
        limits=build_limits(config, subject.directory),
        vmap_candidates=1,
    )
    (step,) = evaluator.steps(np.ones((1, 1), np.float32))
    scores, written_C = step.scores, step.written_C
    answers.add(source.name, step.samples[0])
    _record(directory, pool.records[0])
    k = len(directory.candidates)
    candidate = Candidate(
        id=k,
        generation=0,
        origin=_ORIGIN,
        name=source.name,
        split="test",
        row=k,
        weights=(1.0,),
        scores={task: float(np.mean(s[0], dtype=np.float64)) for task, s in scores.items()},
        n=evaluator.examples,
        seconds=round(time.perf_counter() - started, 6),
        tokens={"read": evaluator.read, "written": int(written_C[0])},
    )
    directory.append([candidate], scores)


def _record(directory: RunDirectory, record: Record) -> None:
    """Adds a checkpoint to pool.json, before the log has its scores."""
    known = directory.read_json("pool.json") or {"checkpoints": []}
    before = [Record(**one) for one in known["checkpoints"][: len(directory.candidates)]]
    record_pool(directory, [*before, record])


def _entry(config: Config, directory: RunDirectory, k: int, source: Source) -> dict[str, Any]:
    """What evaluation.json says of the k-th checkpoint, which has been scored."""
    candidate = directory.candidates[k]
    if (candidate.origin, candidate.name) != (_ORIGIN, source.name):
        raise JaxmergeError(
            "the log holds something else than the evaluation of this checkpoint",
            where=f"{directory.path / 'candidates.jsonl'}, candidate {k}",
            expected=f"{_ORIGIN} of {source.name}",
            found=f"{candidate.origin} of {candidate.name}",
        )
    samples = directory.examples(candidate)
    test = dict(candidate.scores)
    ci95 = {task: list(stats.interval({task: samples[task]}, define([task]))) for task in test}
    objective = _shown(configs.objective(config))
    if objective:
        of_objective = {task: samples[task] for task in objective.tasks}
        test["objective"] = objective.of(candidate.scores)
        ci95["objective"] = list(stats.interval(of_objective, objective))
    return {
        **directory.read_json("pool.json")["checkpoints"][k],
        "test": test,
        "ci95": ci95,
        "n": candidate.n,
        "seconds": candidate.seconds,
    }


def _shown(objective: Objective) -> Objective | None:
    """The objective where it says more than its tasks, and can be had without a pool."""
    return objective if len(objective.tasks) > 1 and not objective.how.relative else None


def _plain(objective: Objective | None) -> dict[str, Any] | None:
    return objective.plain() if objective else None
