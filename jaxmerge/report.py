"""A run directory as one page: `python -m jaxmerge.report DIR` writes `DIR/report.html`.

The page needs nothing but itself: plotly.js, styles and data are inside, and its content security
policy lets no script run but the two that are written here. Names of checkpoints and tasks are
input: they reach the page through `report_tables.text` and `_embedded_json` alone.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import html
import json
import os
import sys
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import numpy as np
from plotly.offline import get_plotlyjs

from jaxmerge import report_tables
from jaxmerge.errors import JaxmergeError
from jaxmerge.objective import Objective, from_plain

Json = dict[str, Any]

_CANDIDATE_FIELDS = ("id", "generation", "origin", "name", "split", "weights", "scores")
_POOL_FIELDS = ("name", "source", "format", "bytes", "parameters", "dtype", "fingerprint")


class Run(NamedTuple):
    """What a run directory says.

    Attributes:
        config: the resolved config.
        pool: the checkpoints, in pool order.
        candidates: every evaluated candidate, in the order of evaluation.
        results: see results.schema.json.
    """

    config: Json
    pool: list[Json]
    candidates: list[Json]
    results: Json


def write(directory: Path) -> Path:
    """Writes `report.html` into the directory of a finished run.

    Returns:
        The path of the report.

    Raises:
        JaxmergeError: a file is missing, is not what a finished run leaves, or cannot be written.
    """
    page = render(read(directory))
    path, temporary = directory / "report.html", directory / f".report.html.{os.getpid()}"
    try:
        # Newlines as they are: the policy holds hashes of the scripts.
        with temporary.open("w", encoding="utf-8", errors="replace", newline="\n") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise JaxmergeError("cannot be written", where=str(path), found=str(error)) from None
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read(directory: Path) -> Run:
    """Reads the files of a finished run.

    Raises:
        JaxmergeError: a file is missing or is not what a finished run leaves.
    """
    schema = json.loads(resources.files("jaxmerge").joinpath("results.schema.json").read_text())
    texts = {
        name: _read_text(directory / name)
        for name in ("config.json", "pool.json", "candidates.jsonl", "results.json")
    }
    where = str(directory / "results.json")
    results = _current(_parsed(texts["results.json"], where), where)
    _require(results, schema["required"], where)
    for _, entry in report_tables.models(results):
        _require(entry, schema["$defs"]["entry"]["required"], where)
    rivals = [entry["name"] for entry in results["individuals"] + results["baselines"]]
    _require(results["best"]["vs"], rivals, f"{where}, best.vs")
    if not results["individuals"]:
        raise JaxmergeError("no individuals", where=where, expected="one for each checkpoint")

    where = str(directory / "pool.json")
    pool = _parsed(texts["pool.json"], where)
    _require(pool, ("checkpoints",), where)
    for checkpoint in pool["checkpoints"]:
        _require(checkpoint, _POOL_FIELDS, where)

    candidates = []
    for number, line in enumerate(texts["candidates.jsonl"].rstrip("\n").split("\n"), start=1):
        where = f"{directory / 'candidates.jsonl'}, line {number}"
        candidate = _parsed(line, where)
        _require(candidate, _CANDIDATE_FIELDS, where)
        if candidate["split"] != "heldout":  # results.json has those scores
            _require(candidate["scores"], results["tasks"], where)
            candidates.append(candidate)
    config = _parsed(texts["config.json"], str(directory / "config.json"), finite=False)
    return Run(config, pool["checkpoints"], candidates, results)


def render(run: Run) -> str:
    """The page."""
    template = resources.files("jaxmerge").joinpath("report_template.html").read_text("utf-8")
    before, script, after = template.split("<!-- script -->")
    plotly, script = get_plotlyjs(), script.strip()
    results, choices = run.results, [*run.results["tasks"], "objective"]
    title, lead = report_tables.headline(results)
    fields = {
        "policy": " ".join(_script_hash(source) for source in (plotly, script)),
        "title": title,
        "lead": lead,
        "aim": report_tables.aim(results),
        "warnings": report_tables.warnings(results),
        "x_options": report_tables.options(choices, 0),
        "y_options": report_tables.options(choices, 1),
        "weights": report_tables.weights_table(results, run.pool),
        "scores": report_tables.scores_table(results),
        "paired": report_tables.paired_table(results),
        "heldout": report_tables.heldout_section(results),
        "made": report_tables.made_section(results, run.pool, run.config),
    }
    # The scripts go in last and by concatenation: what is in them is nobody's placeholder.
    return "".join(
        [
            Template(before).substitute(fields),
            '<script type="application/json" id="data">',
            _embedded_json(_plot_data(run)),
            f"</script>\n<script>{plotly}</script>\n<script>{script}</script>",
            Template(after).substitute(fields),
        ]
    )


def console(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxmerge.report", description="Writes DIR/report.html of a finished run."
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="the run directory")
    try:
        print(write(parser.parse_args(arguments).directory))
    except JaxmergeError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _current(results: Json, where: str) -> Json:
    """Results of version 2; those of version 1 knew a weighted mean of scores from 0 to 1 alone."""
    if results.get("version") == 1:
        _require(results, ("tasks", "heldout_tasks", "task_weights"), where)
        weights = results["task_weights"]
        alike = len(set(weights.values())) == 1
        results = {
            **results,
            "version": 2,
            "objective": {
                "aggregate": "mean" if alike else "weighted",
                "weights": weights,
                "reference": {},
            },
            "bounds": {t: [0.0, 1.0] for t in [*results["tasks"], *results["heldout_tasks"]]},
            "warnings": [],
            "hypervolume_reference": dict.fromkeys(results["tasks"], 0.0),
        }
    if results.get("version") != 2:
        raise JaxmergeError(
            "unknown version", where=where, expected="1 or 2", found=str(results.get("version"))
        )
    return results


def _plot_data(run: Run) -> Json:
    """What the plots show; text in it is escaped, since plotly takes it for markup."""
    tasks, objective = run.results["tasks"], from_plain(run.results["objective"])
    label = f"objective: {objective.aggregate}"

    def choices(scores: dict[str, float]) -> list[float]:
        return [*(scores[task] for task in tasks), objective.of(scores)]

    models = [
        {
            "id": entry["id"],
            "name": _plot_text(entry["name"]),
            "kind": kind,
            "weights": [entry["weights"].get(checkpoint["name"], 0) for checkpoint in run.pool],
            "search": choices(entry["search"]),
            "test": choices(entry["test"]),
            "ci95": [entry["ci95"][choice] for choice in [*tasks, "objective"]],
        }
        for kind, entry in report_tables.models(run.results)
    ]
    named = {model["id"] for model in models}
    points = [
        {
            "id": line["id"],
            "name": _plot_text(line["name"]),
            "origin": _plot_text(line["origin"]),
            "weights": [round(weight, 4) for weight in line["weights"]],
            "search": choices(line["scores"]),
        }
        for line in run.candidates
        if line["split"] == "search" and line["id"] not in named
    ]
    return {
        "choices": [*(_plot_text(task) for task in tasks), label],
        "checkpoints": [_plot_text(checkpoint["name"]) for checkpoint in run.pool],
        "models": models,
        "points": points,
        "pareto": run.results["pareto"],
        "curves": {
            "search": _curve(run, "search", objective),
            "random": _curve(run, "baseline:random", objective),
            "single": max(entry["search_objective"] for entry in run.results["individuals"]),
        },
    }


def _curve(run: Run, origin: str, objective: Objective) -> Json:
    """Best objective so far by evaluations, and each generation's mean where it ends."""
    lines = [line for line in run.candidates if line["origin"] == origin]
    objective_P = np.array([objective.of(line["scores"]) for line in lines])
    generation_P = np.array([line["generation"] for line in lines])
    ends = [int(np.flatnonzero(generation_P == g)[-1]) + 1 for g in np.unique(generation_P)]
    means = [float(objective_P[generation_P == g].mean()) for g in np.unique(generation_P)]
    best = np.maximum.accumulate(objective_P) if lines else objective_P
    return {"best": best.tolist(), "mean": means, "mean_at": ends}


def _plot_text(value: object) -> str:
    """Escaped for plotly's own markup, which does not know quotation marks as entities."""
    return html.escape(str(value), quote=False)


def _embedded_json(data: Json) -> str:
    """JSON that cannot end the script element that holds it."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _script_hash(source: str) -> str:
    digest = hashlib.sha256(source.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        raise JaxmergeError("no such file", where=str(path), expected="a finished run") from None
    except (OSError, UnicodeDecodeError) as error:
        raise JaxmergeError("cannot be read", where=str(path), found=str(error)) from None


def _parsed(text: str, where: str, *, finite: bool = True) -> Json:
    """The JSON object; `finite` refuses NaN and infinities, which a page cannot parse."""

    def constant(name: str) -> float:
        if finite:
            raise ValueError(f"the number {name}")
        return float(name)

    try:
        parsed = json.loads(text, parse_constant=constant)
    except ValueError as error:
        raise JaxmergeError("not valid JSON", where=where, found=str(error)) from None
    if not isinstance(parsed, dict):
        raise JaxmergeError("not a JSON object", where=where, found=type(parsed).__name__)
    return parsed


def _require(mapping: Json, fields: Iterable[str], where: str) -> None:
    missing = [field for field in fields if field not in mapping]
    if missing:
        raise JaxmergeError("missing fields", where=where, expected=", ".join(missing))


if __name__ == "__main__":
    sys.exit(console())
