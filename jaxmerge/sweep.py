"""Runs over a grid of config values, in one process that loads the pool and compiles once.

    python -m jaxmerge.sweep --config=configs/quickstart.py --workdir=runs/sweep \\
        --sweep=search.strategy=CMA_ES,SNES --sweep=seed=0,1,2

Each cell of the grid is a run of its own, with a run directory of its own in --workdir, such as
runs/sweep/search.strategy=SNES,seed=1: what `python -m jaxmerge.run` would have left there, and
what it can go on with. Cells whose configs agree share the pool in memory, the tasks and the
compiled programs; and what was scored for one is not scored again for another (its `seconds` in
candidates.jsonl are then those of looking it up). Nothing else differs from separate runs.

The same command goes on where it was stopped. A cell that fails is told of, and the others go on;
the exit code is then 2. --shard=i/n, with i from 1 to n, makes the i-th part of the cells only, for
as many machines. At the end there is a table of the cells, and comparison.html in --workdir; cells
of several shards are compared by `python -m jaxmerge.report DIR DIR ...`.

Values are read like those of flags: --sweep=search.sigma=0.3,0.6 as two numbers; several tuples are
written --sweep="objective.tasks=('a','b'),('c',)". --config.FIELD=VALUE sets a field of all cells.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import config_flags

from jaxmerge import command_line, formatting, grid, report, rundir
from jaxmerge import config as configs
from jaxmerge.config import Config
from jaxmerge.errors import JaxmergeError
from jaxmerge.grid import Cell
from jaxmerge.held import Held
from jaxmerge.run import run

_COMMAND = "python -m jaxmerge.run"


class Outcome(NamedTuple):
    """What became of the cells of a sweep, or of a shard, in the order of the grid.

    Attributes:
        finished: what results.json says, by the name of the cell.
        failed: the message, by the name of the cell.
    """

    finished: dict[str, dict[str, Any]]
    failed: dict[str, str]


def sweep(
    config: Config,
    axes: Sequence[str],
    workdir: str,
    *,
    shard: str = "1/1",
    command: str = _COMMAND,
) -> Outcome:
    """Runs every cell that has not been run.

    Args:
        config: what the cells have in common.
        axes: each `FIELD=VALUE,VALUE,...`; see `grid.cells`.
        workdir: has sweep.json, and a run directory for each cell.
        shard: `i/n`, with i from 1 to n: which part of the cells.
        command: what the command of each cell's run begins with, --workdir and values left out.

    Raises:
        JaxmergeError: before anything is run: the grid, the config of a cell or the directory is
            not right. What a cell's run raises is told in the outcome.
    """
    cells = grid.cells(config, axes)
    mine = grid.shard(_in_running_order(cells), shard)
    path = Path(workdir)
    for cell in mine:
        configs.check(cell.config)
        rundir.check(path / cell.name, configs.plain(cell.config))
    _record(path, config, cells, shard)
    held, finished, failed = Held(), {}, {}
    for number, cell in enumerate(mine, start=1):
        directory = path / cell.name
        known = _findings(directory)
        if known is not None:
            finished[cell.name] = known
            continue
        print(f"jaxmerge: cell {number} of {len(mine)}: {cell.name}", file=sys.stderr, flush=True)
        try:
            finished[cell.name] = run(
                cell.config, str(directory), _command(command, cell, directory), held
            )
        except JaxmergeError as error:
            failed[cell.name] = str(error)
            print(f"jaxmerge: {cell.name} failed: {error}", file=sys.stderr, flush=True)
    return Outcome(
        {cell.name: finished[cell.name] for cell in cells if cell.name in finished},
        {cell.name: failed[cell.name] for cell in cells if cell.name in failed},
    )


def table(finished: Mapping[str, Mapping[str, Any]]) -> str:
    """A line per cell: the winner's objective, its gain over the best checkpoint, the cost."""
    rows = [
        ["cell", "search", "test", "95%", "above best single", "95%", "evaluations", "seconds"],
        *(_row(name, findings) for name, findings in finished.items()),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))])
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def _row(name: str, findings: Mapping[str, Any]) -> list[str]:
    best, form = findings["best"], formatting.of_results(findings)["objective"]
    rival = max(findings["individuals"], key=lambda entry: entry["test_objective"])
    versus = best["vs"][rival["name"]]
    return [
        name,
        form.score(best["search_objective"]),
        form.score(best["test_objective"]),
        form.interval(best["ci95"]["objective"]),
        form.difference(versus["delta"]),
        form.differences(versus["ci95"]),
        str(findings["evaluations"]),
        f"{sum(findings['seconds'].values()):.0f}",
    ]


def _in_running_order(cells: Sequence[Cell]) -> list[Cell]:
    """Cells that share most, next to each other; else as they are."""
    from jaxmerge.prepare import made_of  # imports Flax, and is not wanted for --help

    keys = [[json.dumps(part) for part in made_of(cell.config).values()] for cell in cells]
    columns = list(zip(*keys))
    places = [[column.index(part) for column, part in zip(columns, key)] for key in keys]
    return [cell for _, cell in sorted(zip(places, cells), key=lambda pair: pair[0])]


def _record(path: Path, config: Config, cells: Sequence[Cell], shard: str) -> None:
    """Writes sweep.json; refuses a directory that was made with another grid or config."""
    values = {field: [cell.values[field] for cell in cells] for field in cells[0].values}
    swept = {field: list(dict.fromkeys(of_cells)) for field, of_cells in values.items()}
    record = {"config": configs.plain(config), "sweep": swept}
    file = path / "sweep.json"
    if file.exists():
        known = rundir.read_json(file)
        rundir.check_same_config(path, {part: known.get(part) for part in record}, record)
        return
    rundir.check_new(path, "sweep.json")
    path.mkdir(parents=True, exist_ok=True)
    with rundir.replacing(file, "-" + shard.replace("/", "-")) as temporary:
        temporary.write_text(
            json.dumps({**record, "cells": [cell.name for cell in cells]}, indent=2)
        )


def _findings(directory: Path) -> dict[str, Any] | None:
    """What results.json says of a run that has ended; its report is the last file of it."""
    results, page = directory / "results.json", directory / "report.html"
    if not (results.exists() and page.exists()):
        return None
    ended = page.stat().st_mtime_ns >= results.stat().st_mtime_ns
    return rundir.read_json(results) if ended else None


def _command(start: str, cell: Cell, directory: Path) -> str:
    values = [f"--config.{field}={value}" for field, value in cell.values.items()]
    return f"{start} {shlex.join([*values, f'--workdir={directory}'])}"


def main(_: Sequence[str]) -> None:
    """Runs what the flags say; prints the table, and fails when a cell did."""
    given, workdir = flags.FLAGS["config"], flags.FLAGS.workdir
    overrides = config_flags.get_override_values(given)
    start = [f"--config={config_flags.get_config_filename(given)}"]
    swept = [axis.partition("=")[0] for axis in flags.FLAGS.sweep]
    start += [
        f"--config.{field}={grid.as_text(value)}"
        for field, value in overrides.items()
        if field not in swept
    ]
    outcome = sweep(
        flags.FLAGS.config,
        flags.FLAGS.sweep,
        workdir,
        shard=flags.FLAGS.shard,
        command=f"{_COMMAND} {shlex.join(start)}",
    )
    if outcome.finished:
        print(table(outcome.finished))
    if len(outcome.finished) > 1:
        directories = [Path(workdir) / name for name in outcome.finished]
        print(f"\nReport: {report.compare(directories, Path(workdir) / 'comparison.html')}")
    if outcome.failed:
        raise JaxmergeError(
            f"{len(outcome.failed)} of {len(outcome.finished) + len(outcome.failed)} cells failed; "
            "the same command tries them again",
            where=workdir,
            found="\n".join(f"{name}: {message}" for name, message in outcome.failed.items()),
        )


def console() -> None:
    """The command line: `jaxmerge-sweep`, or `python -m jaxmerge.sweep`."""
    flags.DEFINE_multi_string("sweep", [], "FIELD=VALUE,VALUE,...; may be given several times.")
    flags.DEFINE_string("shard", "1/1", "i/n: the i-th of n parts of the cells.")
    command_line.start(main, __doc__ or "")


if __name__ == "__main__":
    console()
