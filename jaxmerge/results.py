"""What a finished run found: results.json, and the table at the end."""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxmerge import pareto, stats
from jaxmerge.rundir import Candidate, RunDirectory
from jaxmerge.search.archive import Archive, Request
from jaxmerge.search.baselines import Found, objective

_PACKAGES = ("jaxmerge", "jax", "jaxlib", "flax", "orbax-checkpoint", "evosax", "numpy")


def score_on_test(archive: Archive, methods: Sequence[Found]) -> list[Candidate]:
    """Scores the choice of each method on the test split."""
    return archive.evaluate("test", [_final(found) for found in methods])


def score_heldout(archive: Archive, methods: Sequence[Found]) -> dict[str, dict[str, float]]:
    """Scores of the choices on the held-out tasks, by method."""
    tested = archive.evaluate("heldout", [_final(found) for found in methods])
    return {candidate.name: candidate.scores for candidate in tested}


def collect(
    directory: RunDirectory,
    names: Sequence[str],
    task_weights: Mapping[str, float],
    individuals: Sequence[Found],
    baselines: Sequence[Found],
    winner: Found,
    tested: Sequence[Candidate],
    heldout: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """The part of results.json that follows from the scores.

    Args:
        names: of the checkpoints, in pool order.
        task_weights: of the objective.
        individuals, baselines, winner: what each method chose, on the search split.
        tested: the same, in this order, on the test split.
        heldout: scores on held-out tasks, of those methods that were scored there.
    """
    methods = [*individuals, *baselines, winner]
    samples = [directory.examples(candidate) for candidate in tested]
    entries = [
        _entry(found, names, task_weights, candidate, sample, heldout.get(found.name, {}))
        for found, candidate, sample in zip(methods, tested, samples)
    ]
    versus = {}
    for found, sample in zip(methods[:-1], samples[:-1]):
        compared = stats.paired(samples[-1], sample, task_weights)
        versus[found.name] = {
            "delta": compared.delta,
            "ci95": [compared.low, compared.high],
            "p": compared.p,
        }
    searched = [candidate for candidate in directory.candidates if candidate.split == "search"]
    scores_PxM = np.array([[line.scores[task] for task in task_weights] for line in searched])
    front = pareto.front(scores_PxM)
    return {
        "tasks": list(task_weights),
        "task_weights": dict(task_weights),
        "heldout_tasks": list(next(iter(heldout.values()), {})),
        "individuals": entries[: len(individuals)],
        "baselines": entries[len(individuals) : -1],
        "best": {**entries[-1], "vs": versus},
        "pareto": [searched[i].id for i in front],
        "hypervolume": pareto.hypervolume(scores_PxM[front], np.zeros(len(task_weights))),
        "evaluations": len(searched),
        "evaluations_by_origin": dict(Counter(candidate.origin for candidate in searched)),
    }


def environment() -> dict[str, Any]:
    """Versions and devices, for results.json."""
    devices = jax.devices()
    return {
        "versions": {package: importlib.metadata.version(package) for package in _PACKAGES},
        "devices": {
            "platform": devices[0].platform,
            "kind": devices[0].device_kind,
            "count": len(devices),
            "processes": jax.process_count(),
        },
    }


def table(results: Mapping[str, Any]) -> str:
    """The end of a run in words: test scores of all methods, and how sure the difference is."""
    tasks, best = results["tasks"], results["best"]
    entries = [*results["individuals"], *results["baselines"], best]
    width = max(len(entry["name"]) for entry in entries)
    columns = [*tasks, "mean"]
    title = f"{'test scores, %':<{width}}  " + "  ".join(f"{name:>12}" for name in columns)
    lines = [title, "-" * len(title)]
    for entry in entries:
        low, high = entry["ci95"]["objective"]
        values = [entry["test"][task] for task in tasks] + [entry["test_objective"]]
        lines.append(
            f"{entry['name']:<{width}}  "
            + "  ".join(f"{100 * value:12.1f}" for value in values)
            + f"  [{100 * low:.1f}, {100 * high:.1f}]"
        )
    rival = max(results["individuals"], key=lambda entry: entry["test_objective"])
    versus = best["vs"][rival["name"]]
    low, high = versus["ci95"]
    lines.append(
        f"\nThe searched merge against the best single checkpoint ({rival['name']}): "
        f"{100 * versus['delta']:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}], "
        f"p = {versus['p']:.2g}."
    )
    for task in results["heldout_tasks"]:
        scored = [entry for entry in entries if entry["heldout"]]
        lines.append(
            f"Held out, {task}: "
            + ", ".join(f"{entry['name']} {100 * entry['heldout'][task]:.1f}" for entry in scored)
        )
    return "\n".join(lines)


def _final(found: Found) -> Request:
    return Request("final", found.name, np.asarray(found.candidate.weights, np.float32))


def _entry(
    found: Found,
    names: Sequence[str],
    task_weights: Mapping[str, float],
    tested: Candidate,
    sample: Mapping[str, np.ndarray],
    heldout: Mapping[str, float],
) -> dict[str, Any]:
    intervals = {task: stats.interval({task: sample[task]}, {task: 1.0}) for task in task_weights}
    intervals["objective"] = stats.interval(sample, task_weights)
    return {
        "name": found.name,
        "id": found.candidate.id,
        "weights": dict(zip(names, found.candidate.weights)),
        "evaluations": found.evaluations,
        "search": found.candidate.scores,
        "search_objective": objective(found.candidate, task_weights),
        "test": tested.scores,
        "test_objective": objective(tested, task_weights),
        "ci95": {name: list(interval) for name, interval in intervals.items()},
        "heldout": dict(heldout),
    }
