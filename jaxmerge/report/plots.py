"""What the plots of a run show, as JSON for plots.js and run.js.

Scores that are shares are given in percent. Text is escaped, since plotly takes it for markup.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from jaxmerge.report.reading import Json, Run
from jaxmerge.report.values import label, scaled
from jaxmerge.rundir import cost
from jaxmerge.scores.curves import rises

WARM = "warm-start"  # the origin of what a search along gradients scored before another search
_SPREAD = (0.1, 0.5, 0.9)  # quantiles of a generation


def of_run(run: Run, models: Sequence[tuple[str, Json]], pareto: Sequence[int]) -> Json:
    """The trade-offs and the search.

    Args:
        run: the run.
        models: (kind, entry) of what is drawn by name; an entry has `test` and `ci95`, or neither.
        pareto: ids of the candidates on the front over all tasks.
    """
    named = {entry["id"] for _, entry in models}
    points = [
        {
            "id": candidate["id"],
            "name": label(candidate["name"]) + _scored(candidate),
            "origin": label(candidate["origin"]),
            "weights": [round(weight, 4) for weight in candidate["weights"]],
            "search": _choices(run, candidate["scores"]),
        }
        for candidate in run.searched
        if candidate["id"] not in named
    ]
    return {
        **_titles(run),
        "checkpoints": [label(checkpoint["name"]) for checkpoint in run.pool],
        "models": [_model(run, kind, entry) for kind, entry in models],
        "points": points,
        "pareto": list(pareto),
        "curves": {
            "search": curve(run, "search"),
            "random": curve(run, "baseline:random"),
            "single": _best_single(run),
            "ways": ways(run),
        },
    }


def of_analyses(run: Run, results: Json) -> Json:
    """The plots of the analyses that were asked for."""
    analyses, form = results.get("analyses", {}), run.formats["objective"]
    data: Json = {}
    if "weight_vs_score" in analyses:
        data["weights"] = [
            {
                "name": label(entry["name"]),
                "score": scaled(form, entry["search_objective"]),
                "weight": round(results["best"]["weights"].get(entry["name"], 0.0), 4),
            }
            for entry in results["individuals"]
        ]
    if analyses.get("pool_size"):
        data["sizes"] = [
            {
                "m": point["m"],
                "search": scaled(form, point["search_objective"]),
                "test": scaled(form, point["test_objective"]),
                "ci95": [scaled(form, end) for end in point["ci95"]],
                "evaluations": point["evaluations"],
                "checkpoints": [label(name) for name in point["checkpoints"]],
            }
            for point in sorted(analyses["pool_size"], key=lambda point: point["m"])
        ]
    return data


def curve(run: Run, origin: str) -> Json:
    """Best objective so far by evaluations, and each generation's spread where it ends.

    `at` are the evaluations by then, `tokens` the tokens, in the unit of `rundir.cost`.
    """
    lines, form = run.of_origin(origin), run.formats["objective"]
    if not lines:
        return {"best": [], "at": [], "tokens": [], "low": [], "median": [], "high": []}
    objective_P = np.array([run.objective.of(line["scores"]) for line in lines])
    generation_P = np.array([line["generation"] for line in lines])
    generations = np.unique(generation_P)
    ends = [int(np.flatnonzero(generation_P == g)[-1]) + 1 for g in generations]
    spread = [np.quantile(objective_P[generation_P == g], _SPREAD) for g in generations]
    low, median, high = ([scaled(form, q) for q in column] for column in zip(*spread))
    best = [scaled(form, value) for value in np.maximum.accumulate(objective_P)]
    before = run.of_origin(WARM) if origin == "search" else []
    took = list(accumulate(cost(line.get("tokens")) for line in [*before, *lines]))
    tokens = [took[len(before) + end - 1] for end in ends]
    return {"best": best, "at": ends, "tokens": tokens, "low": low, "median": median, "high": high}


def ways(run: Run) -> list[Json]:
    """Of the search and each baseline the best so far by the tokens it had taken, where it rises.

    Only what was scored on all search examples counts. The last point is where it ends. Of the
    search are also a warm start and the final decision. There are none where the log is of before
    tokens were counted.
    """
    lines = [one for one in run.searched if one["origin"] != "individual"]
    if not all(one.get("tokens") for one in lines):
        return []
    by_way: dict[str, list[Json]] = {}
    for one in lines:
        kind, _, name = one["origin"].partition(":")
        by_way.setdefault(name if kind == "baseline" else "search", []).append(one)
    return [_way(run, name, of_way) for name, of_way in by_way.items()]


def _way(run: Run, name: str, lines: Sequence[Json]) -> Json:
    form, costs = run.formats["objective"], [cost(one["tokens"]) for one in lines]
    values = [math.nan if one.get("out_of") else run.objective.of(one["scores"]) for one in lines]
    risen = rises(costs, values)
    tokens, best = [took for took, _ in risen], [scaled(form, values[i]) for _, i in risen]
    if best and tokens[-1] < sum(costs):
        tokens, best = [*tokens, sum(costs)], [*best, best[-1]]
    return {"name": label(name), "evaluations": len(lines), "tokens": tokens, "best": best}


def _scored(candidate: Json) -> str:
    """What of the examples the scores are estimates from; nothing where it is all of them."""
    if not candidate.get("out_of"):
        return ""
    n, of = sum(candidate["n"].values()), sum(candidate["out_of"].values())
    return f" (estimate from {n:,} of {of:,} examples)"


def _titles(run: Run) -> Json:
    forms = [run.formats[task] for task in [*run.objective.tasks, "objective"]]
    shown = [*map(label, run.objective.tasks), f"objective ({run.objective.aggregate})"]
    return {
        "choices": shown,
        "units": ["%" if form.percent else "" for form in forms],
        "digits": [1 if form.percent else 3 for form in forms],
    }


def _model(run: Run, kind: str, entry: Json) -> Json:
    drawn: dict[str, Any] = {
        "id": entry["id"],
        "name": label(entry["name"]),
        "kind": kind,
        "weights": [entry["weights"].get(checkpoint["name"], 0) for checkpoint in run.pool],
        "search": _choices(run, entry["search"]),
    }
    if "test" in entry:
        drawn["test"] = _choices(run, entry["test"])
        drawn["ci95"] = [
            [scaled(run.formats[choice], end) for end in entry["ci95"][choice]]
            for choice in [*run.objective.tasks, "objective"]
        ]
    return drawn


def _choices(run: Run, scores: Mapping[str, float]) -> list[float]:
    """What the axes can show of a candidate: its score on each task, and the objective."""
    values = {**scores, "objective": run.objective.of(scores)}
    return [scaled(run.formats[c], values[c]) for c in [*run.objective.tasks, "objective"]]


def _best_single(run: Run) -> float | None:
    alone = [run.objective.of(one["scores"]) for one in run.of_origin("individual")]
    return scaled(run.formats["objective"], max(alone)) if alone else None
