"""The cells of a sweep as runs that share what they can, and the table of what they found."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxmerge import config as configs
from jaxmerge import durable, rundir
from jaxmerge.config import Config
from jaxmerge.durable import LOCK, Lock
from jaxmerge.errors import JaxmergeError, at
from jaxmerge.experiment.held import Held
from jaxmerge.experiment.prepare import made_of
from jaxmerge.experiment.search import search
from jaxmerge.scores import formatting
from jaxmerge.sweep import grid
from jaxmerge.sweep.grid import Cell

COMMAND = "python -m jaxmerge.run"


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
    command: str = COMMAND,
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
            not right, or another process runs this shard. What a cell's run raises is told in the
            outcome.
    """
    cells = grid.cells(config, axes)
    mine = grid.shard(_in_running_order(cells), shard)
    path = Path(workdir).expanduser()
    for cell in mine:
        configs.check(cell.config)
        rundir.check(path / cell.name, configs.plain(cell.config))
    _record(path, config, cells, shard)
    with at(path):
        lock = Lock(path / f"{LOCK}-{_of_file(shard)}")
    with contextlib.closing(lock):
        finished, failed = _run(mine, path, command)
    return Outcome(
        {cell.name: finished[cell.name] for cell in cells if cell.name in finished},
        {cell.name: failed[cell.name] for cell in cells if cell.name in failed},
    )


def _run(
    cells: Sequence[Cell], path: Path, command: str
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """What was found by each cell's run, and why the others failed."""
    held, finished, failed = Held(), {}, {}
    for number, cell in enumerate(cells, start=1):
        directory = path / cell.name
        known = _findings(directory)
        if known is not None:
            finished[cell.name] = known
            continue
        print(f"jaxmerge: cell {number} of {len(cells)}: {cell.name}", file=sys.stderr, flush=True)
        try:
            finished[cell.name] = search(
                cell.config, str(directory), _command(command, cell, directory), held
            )
        except JaxmergeError as error:
            failed[cell.name] = str(error)
            print(f"jaxmerge: {cell.name} failed: {error}", file=sys.stderr, flush=True)
    return finished, failed


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
        known = durable.read_json(file)
        rundir.check_same_config(path, {part: known.get(part) for part in record}, record)
        return
    rundir.check_new(path, "sweep.json")
    with at(path):
        path.mkdir(parents=True, exist_ok=True)
    with durable.replacing(file, f"-{_of_file(shard)}") as temporary:
        temporary.write_text(
            json.dumps({**record, "cells": [cell.name for cell in cells]}, indent=2)
        )


def _of_file(shard: str) -> str:
    return shard.replace("/", "-")


def _findings(directory: Path) -> dict[str, Any] | None:
    """What results.json says of a run that has ended; its report is the last file of it."""
    results, page = directory / "results.json", directory / "report.html"
    if not (results.exists() and page.exists()):
        return None
    ended = page.stat().st_mtime_ns >= results.stat().st_mtime_ns
    return durable.read_json(results) if ended else None


def _command(start: str, cell: Cell, directory: Path) -> str:
    values = [f"--config.{field}={value}" for field, value in cell.values.items()]
    return f"{start} {shlex.join([*values, f'--workdir={directory}'])}"
