"""Search for the linear combination of checkpoints that beats all of them.

    python -m jaxmerge.run --config=configs/quickstart.py --workdir=runs/quickstart

Loads the pool of checkpoints that the config names, scores every checkpoint, searches over merge
weights, tests the winner and all baselines on examples that the search never saw, and writes it all
to --workdir: results.json, report.html, every candidate in candidates.jsonl, and the winner as a
checkpoint in merged/. The same command on the same directory goes on where it was stopped.

With --mode=merge it only merges, with the weights of the config, and evaluates nothing:

    python -m jaxmerge.run --mode=merge --config=configs/default.py --workdir=runs/merge \\
        --config.pool.checkpoints="('models/a','models/b')" --config.merge.weights="(0.3,0.7)"

With --mode=evaluate it scores checkpoints by themselves, one or many, alike or not, on the test
examples of the config's tasks, and writes evaluation.json:

    python -m jaxmerge.run --mode=evaluate --config=configs/quickstart.py --workdir=runs/scores \\
        --config.pool.checkpoints="('models/a',)"

Any field of the config can be set on the command line: --config.search.budget=400. The fields, with
their units and defaults, are in jaxmerge/config.py.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from jaxmerge import (
    card,
    command_line,
    formatting,
    processes,
    report,
    results,
    searches,
    watch,
)
from jaxmerge.checkpoints.pool import Record
from jaxmerge.config import Config
from jaxmerge.errors import JaxmergeError
from jaxmerge.export import export
from jaxmerge.held import Held
from jaxmerge.merging import merge, set_up_host
from jaxmerge.search import baselines
from jaxmerge.search.archive import Archive
from jaxmerge.search.baselines import Found, Setting
from jaxmerge.sources import huggingface_directory

if TYPE_CHECKING:
    from jaxmerge.prepare import Prepared


def run(
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
    # Late: they import Flax, half a second that a merge can do without.
    from jaxmerge import phases
    from jaxmerge.prepare import prepare

    seconds: dict[str, float] = {}
    with _timed(seconds, "load"):
        prepared = prepare(config, workdir, held)
    directory, pool = prepared.directory, prepared.pool
    read_before = pool.traffic()
    for warning in prepared.warnings if processes.first() else ():
        print(f"jaxmerge: {warning}", file=sys.stderr)

    with closing(directory), phases.live(config, prepared) as live:
        archive = Archive(directory, prepared.evaluators, live.candidates)
        with _timed(seconds, "individuals"):
            individuals = baselines.individuals(archive, pool.names)
            objective = prepared.objective.measured_by([one.scores for one in individuals])
            form = formatting.of_objective(objective, prepared.bounds)
            live.rate(objective, form, individuals)
        with _timed(seconds, "baselines"):
            budget = searches.spent(config.search.budget, prepared.strategy)
            setting = Setting(archive, individuals, objective, budget, config.seed)
            found = [baselines.BASELINES[name].find(setting) for name in config.baselines]
        with _timed(seconds, "search"):
            winner = phases.search(config, prepared, archive, objective, individuals)
        with _timed(seconds, "test"):
            alone = [Found(candidate.name, candidate, 1) for candidate in individuals]
            tested = results.score_on_test(archive, [*alone, *found, winner])
            heldout = {}
            if config.heldout:
                favourite = next(one for one in alone if one.candidate == _best(setting))
                uniform = [method for method in found if method.name == "uniform"]
                heldout = results.score_heldout(archive, [winner, favourite, *uniform])

        with _timed(seconds, "analyses"):
            analysed = phases.analyse(config, prepared, archive, objective, individuals, winner)
        with _timed(seconds, "statistics"):
            findings = results.collect(
                *(directory, pool.names, objective, prepared.bounds),
                *(alone, found, winner, tested, heldout),
            )
        said = {"command": command, "warnings": list(prepared.warnings)}
        findings = {"version": 2, **said, **findings, "analyses": analysed}
        with _timed(seconds, "export"):
            _export_winner(config, prepared, findings)
        findings["seconds"] = {phase: round(taken, 3) for phase, taken in seconds.items()}
        findings |= {"tokens": results.tokens(archive.past), **results.environment()}
        findings["residency"] = pool.traffic(since=read_before)
        if storage := phases.stored(prepared, tested[-1]):
            findings["storage"] = storage
        directory.write_json("results.json", findings)
        if processes.first():
            report.write(directory.path)
    return findings


def _best(setting: Setting) -> Any:
    return baselines.best(setting.individuals, setting.objective)


def _export_winner(config: Config, prepared: Prepared, findings: Mapping[str, Any]) -> None:
    directory, pool = prepared.directory, prepared.pool
    weights = np.array(list(findings["best"]["weights"].values()), np.float32)
    export(
        directory.path / "merged",
        pool.trees[0],
        pool.merged(weights),
        architecture=pool.architecture,
        like=huggingface_directory(config, prepared.sources),
        card=lambda: card.of_search(_plain(pool.records), findings),
        **config.export,
    )


def _plain(records: Sequence[Record]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(record) for record in records]


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - started


def main(_: Sequence[str]) -> None:
    """Runs what the flags say, and prints the table of results."""
    config, workdir = flags.FLAGS.config, flags.FLAGS.workdir
    command = "python -m jaxmerge.run " + shlex.join(sys.argv[1:])
    if flags.FLAGS.mode == "merge":
        if flags.FLAGS.coordinator:
            raise JaxmergeError("a merge runs in one process", where="--coordinator")
        set_up_host(config)
        for path in merge(config, workdir, command):
            print(f"Merged: {path}")
        return
    processes.connect(flags.FLAGS.coordinator, flags.FLAGS.processes, flags.FLAGS.process)
    if flags.FLAGS.mode == "evaluate":
        from jaxmerge import scoring  # late, as in `run`

        table = scoring.table(scoring.evaluate(config, workdir, command))
    else:
        table = results.table(run(config, workdir, command))
        table += f"\n\nReport: {Path(workdir) / 'report.html'}"
    watch.leave()
    if processes.first():
        print(table)


def console() -> None:
    """The command line: `jaxmerge`, or `python -m jaxmerge.run`."""
    flags.DEFINE_enum("mode", "search", ["search", "merge", "evaluate"], "What to do.")
    flags.DEFINE_string("coordinator", "", "Several processes: host:port of the first, or auto.")
    flags.DEFINE_integer("processes", None, "How many they are; not with --coordinator=auto.")
    flags.DEFINE_integer("process", None, "Which of them this is, from 0; likewise.")
    command_line.start(main, __doc__ or "")


if __name__ == "__main__":
    console()
