"""A search, from its config to its results, in one function."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jaxmerge import report
from jaxmerge.checkpoints import card
from jaxmerge.checkpoints.export import export
from jaxmerge.config import Config
from jaxmerge.evaluation.evaluator import Sample
from jaxmerge.experiment import adapters, climb, front, methods, phases, results, speech
from jaxmerge.experiment.answers import Answers
from jaxmerge.experiment.held import Held
from jaxmerge.experiment.prepare import Prepared, prepare
from jaxmerge.experiment.sources import huggingface_directory, tokenizer_directory
from jaxmerge.hosts import processes
from jaxmerge.report.live import Live
from jaxmerge.rundir import Candidate
from jaxmerge.scores import formatting
from jaxmerge.search import baselines
from jaxmerge.search.archive import Archive, Request
from jaxmerge.search.baselines import Setting


# Longer than a screen: a run from its start to its end, a phase after the other.
def search(
    config: Config, workdir: str, command: str = "", held: Held | None = None
) -> dict[str, Any]:
    """The whole run; returns what results.json says.

    Args:
        config: from a `get_config()`; see `jaxmerge.config`.
        workdir: the run directory.
        command: what the report says to run again.
        held: what earlier runs of the process have left, and later ones will find.

    Raises:
        JaxmergeError: anything that the user can mend.
    """
    seconds: dict[str, float] = {}
    with _timed(seconds, "load"):
        prepared = prepare(config, workdir, held)
    directory, pool = prepared.directory, prepared.pool
    read_before = pool.traffic()
    _say(prepared.warnings)

    with closing(directory), phases.live(config, prepared) as live:
        answers = Answers(directory, "search")
        archive = _archive(prepared, live, answers)
        with _timed(seconds, "individuals"):
            individuals = baselines.individuals(archive, pool.names)
            odd = answers.warn(individuals, prepared.bounds)
            _say(odd)
            objective = prepared.objective.measured_by([one.scores for one in individuals])
            form = formatting.of_objective(objective, prepared.bounds)
            live.rate(objective, form, individuals)
        with _timed(seconds, "baselines"):
            setting = Setting(
                *(archive, individuals, objective, config.seed),
                losses=lambda: climb.losses(prepared),
                distances=prepared.distances,
            )
            found = phases.baselines(config, setting, after=False)
        with _timed(seconds, "search"):
            winner, climbed = phases.search(
                config, prepared, archive, objective, individuals, found
            )
        with _timed(seconds, "baselines"):
            setting = setting._replace(tokens=winner.tokens)
            found += phases.baselines(config, setting, after=True)
            found.sort(key=lambda one: config.baselines.index(one.name))
            winner = phases.decided(config, archive, objective, winner)
        with _timed(seconds, "test"):
            tested = results.test(archive, setting, found, winner, heldout=bool(config.heldout))
            points = front.Points(archive, objective, config.front.points)
        with _timed(seconds, "analyses"):
            analysed = phases.analyse(
                config, prepared, archive, objective, individuals, winner, climbed
            )
        with _timed(seconds, "statistics"):
            names = pool.groups.names if pool.groups else ()
            findings = results.collect(
                directory, pool.names, objective, prepared.bounds, tested, names
            )
        with _timed(seconds, "speech"):
            silent = speech.of_search(config, prepared, tested.winner)
            odd += [silent] if silent else []
            _say([silent] if silent else [])
        said = {"command": command, "warnings": [*prepared.warnings, *odd]}
        findings = {"version": 2, **said, **findings, "analyses": analysed}
        findings |= methods.findings(prepared.method)
        if points.chosen:
            findings["front"] = points.findings(directory, pool.names, tested)
        with _timed(seconds, "export"):
            _export(config, prepared, tested.winner, findings, directory.path / "merged")
            for number, point in enumerate(points.tested if config.front.export else (), 1):
                place = directory.path / "points" / str(number)
                _export(config, prepared, point, front.as_best(findings, number), place)
        findings["seconds"] = {phase: round(taken, 3) for phase, taken in seconds.items()}
        findings |= {"tokens": results.tokens(archive.past), **results.environment()}
        if climbed:
            findings["soft"] = climbed.findings()
        findings |= pool.kinship()
        findings["residency"] = pool.traffic(since=read_before)
        if storage := phases.stored(prepared, tested.winner):
            findings["storage"] = storage
        directory.write_json("results.json", findings)
        if processes.first():
            report.write(directory.path)
    return findings


def _archive(prepared: Prepared, live: Live, answers: Answers) -> Archive:
    """The log of the run, and what evaluates what is not in it."""
    method = prepared.method
    return Archive(
        prepared.directory,
        prepared.evaluators,
        live.candidates,
        _individuals_to(answers),
        genes=[gene.name for gene in method.genes] if method else None,
        checkpoints=len(prepared.pool.names),
    )


def _export(
    config: Config,
    prepared: Prepared,
    merge: Candidate,
    findings: Mapping[str, Any],
    place: Path,
) -> None:
    """Writes a merge in the config's formats, with a card."""
    pool = prepared.pool
    records = [dataclasses.asdict(record) for record in pool.records]

    def text() -> str:
        return card.of_search(records, findings)

    export(
        place,
        pool.trees[0],
        pool.merged(np.array(merge.coefficients, np.float32)),
        source=prepared.sources[0],
        architecture=pool.architecture,
        like=huggingface_directory(config, prepared.sources),
        tokenizer=tokenizer_directory(config, prepared.sources),
        card=text,
        adapter=adapters.writer(config, prepared.sources, merge.weights, text, pool.groups),
        rope_type=config.pool.rope_type,
        formats=config.export.formats,
        dtype=config.export.dtype,
        shard_bytes=config.export.shard_bytes,
    )


def _say(warnings: Sequence[str]) -> None:
    for warning in warnings if processes.first() else ():
        print(f"jaxmerge: {warning}", file=sys.stderr)


def _individuals_to(answers: Answers) -> Callable[[Request, Mapping[str, Sample]], None]:
    """Keeps what checkpoints by themselves said; merges say too much."""

    def keep(asked: Request, samples: Mapping[str, Sample]) -> None:
        if asked.origin == "individual":
            answers.add(asked.name, samples)

    return keep


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - started
