"""What a finished run found: results.json, and the table at the end."""

from __future__ import annotations

import importlib.metadata
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmerge.experiment.budget import FRONT, WARM
from jaxmerge.rundir import ANALYSIS, Candidate, RunDirectory
from jaxmerge.scores import formatting, pareto, stats
from jaxmerge.scores.curves import rises
from jaxmerge.scores.formatting import Bounds
from jaxmerge.scores.objective import Objective, define
from jaxmerge.search.archive import Archive, Request
from jaxmerge.search.archive import best as strongest
from jaxmerge.search.baselines import BASELINES, Found, Setting
from jaxmerge.search.loop import decision

_PACKAGES = ("jaxmerge", "jax", "jaxlib", "flax", "orbax-checkpoint", "evosax", "numpy")


class Tested(NamedTuple):
    """What each method chose, and how that scored where the search has not looked.

    Attributes:
        individuals: the checkpoints by themselves.
        baselines: what each baseline chose.
        best: what the search chose.
        candidates: all of these on the test split, in this order.
        heldout: the methods that were scored on held-out tasks as well, by name, the best's first.
    """

    individuals: list[Found]
    baselines: list[Found]
    best: Found
    candidates: list[Candidate]
    heldout: dict[str, Candidate]

    @property
    def winner(self) -> Candidate:
        """What the search chose, on the test split."""
        return self.candidates[-1]


def score_on_test(archive: Archive, methods: Sequence[Found]) -> list[Candidate]:
    """Scores the choice of each method on the test split."""
    return archive.evaluate("test", [_final(found) for found in methods])


def test(
    archive: Archive, setting: Setting, found: list[Found], best: Found, *, heldout: bool
) -> Tested:
    """Scores every method on test examples; three of them on the held-out tasks.

    Args:
        archive: of the run.
        setting: has the single checkpoints.
        found: of the baselines.
        best: of the search.
        heldout: whether there are held-out tasks: the search's choice, the best checkpoint, the
            uniform merge and what the paper's method chose are scored there.
    """
    alone = [Found(one.name, one, 1, one.cost) for one in setting.individuals]
    candidates = score_on_test(archive, [*alone, *found, best])
    unseen: dict[str, Candidate] = {}
    if heldout:
        single = strongest(setting.individuals, setting.objective)
        favourite = next(one for one in alone if one.candidate == single)
        others = [method for method in found if BASELINES[method.name].heldout]
        scored = archive.evaluate("heldout", [_final(one) for one in (best, favourite, *others)])
        unseen = {candidate.name: candidate for candidate in scored}
    return Tested(alone, found, best, candidates, unseen)


def collect(
    directory: RunDirectory,
    names: Sequence[str],
    objective: Objective,
    bounds: Mapping[str, Bounds],
    tested: Tested,
    groups: Sequence[str] = (),
) -> dict[str, Any]:
    """The part of results.json that follows from the scores.

    Args:
        directory: of the run.
        names: of the checkpoints, in pool order.
        objective: what was maximised.
        bounds: of all tasks' scores, held-out ones too, as in results.json.
        tested: all methods.
        groups: names of those that have weights of their own; (): there is one.
    """
    individuals, baselines, best, candidates, heldout = tested
    methods = [*individuals, *baselines, best]
    samples = [directory.examples(candidate) for candidate in candidates]
    entries = [
        entry(found, names, objective, candidate, sample, heldout.get(found.name))
        for found, candidate, sample in zip(methods, candidates, samples)
    ]
    versus = {
        found.name: compared(samples[-1], sample, objective)
        for found, sample in zip(methods[:-1], samples[:-1])
    }
    searched = [
        candidate
        for candidate in directory.candidates
        if candidate.split == "search" and not candidate.origin.startswith(ANALYSIS)
    ]
    return {
        "tasks": list(objective.tasks),
        "objective": objective.plain(),
        **({"groups": list(groups)} if groups else {}),
        "heldout_tasks": list(heldout[best.name].scores) if heldout else [],
        "bounds": {task: list(ends) for task, ends in bounds.items()},
        "individuals": entries[: len(individuals)],
        "baselines": entries[len(individuals) : -1],
        "best": {
            **entries[-1],
            "vs": versus,
            **({"heldout_vs": _heldout_versus(directory, heldout)} if heldout else {}),
        },
        **_front(searched, objective, bounds),
        "evaluations": len(searched),
        "evaluations_by_origin": dict(Counter(candidate.origin for candidate in searched)),
        "tokens_by_origin": {
            origin: tokens([one for one in searched if one.origin == origin])
            for origin in dict.fromkeys(one.origin for one in searched)
        },
        "curves": {
            name: _curve(searched, objective, origins)
            for name, origins in {
                **{found.name: (f"baseline:{found.name}",) for found in baselines},
                best.name: (WARM, best.name, FRONT, decision(best.name)),
            }.items()
        },
    }


def _heldout_versus(
    directory: RunDirectory, heldout: Mapping[str, Candidate]
) -> dict[str, dict[str, Any]]:
    """The first method minus each other, on each held-out task by itself."""
    (_, best), *others = ((name, directory.examples(one)) for name, one in heldout.items())
    return {
        name: {
            task: compared({task: best[task]}, {task: sample[task]}, define([task]))
            for task in best
        }
        for name, sample in others
    }


def compared(ours: stats.Samples, theirs: stats.Samples, objective: Objective) -> dict[str, Any]:
    """One model minus another on the same examples, as results.json has it."""
    found = stats.paired(ours, theirs, objective)
    return {"delta": found.delta, "ci95": [found.low, found.high], "p": found.p}


def _curve(
    searched: Sequence[Candidate], objective: Objective, origins: Sequence[str]
) -> list[dict[str, Any]]:
    """Each time that a way of searching found a better candidate, and the tokens by then."""
    mine = [one for one in searched if one.origin in origins]
    values = [objective.of(one.scores) if one.out_of is None else math.nan for one in mine]
    return [
        {"tokens": took, "id": mine[i].id, "search_objective": values[i]}
        for took, i in rises([one.cost for one in mine], values)
    ]


def tokens(candidates: Sequence[Candidate]) -> dict[str, int]:
    """Tokens that candidates have `read`, `written` and, if any, `differentiated`."""
    counted = Counter({"read": 0, "written": 0})
    for candidate in candidates:
        counted.update(candidate.tokens or {})
    return dict(counted)


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
    best, formats = results["best"], formatting.of_results(results)
    entries = [*results["individuals"], *results["baselines"], best]
    lines = _scores(results, entries)
    rival = max(results["individuals"], key=lambda entry: entry["test_objective"])
    versus, form = best["vs"][rival["name"]], formats["objective"]
    lines.append(
        f"\nThe searched merge against the best single checkpoint ({rival['name']}): "
        f"{form.difference(versus['delta'])}{form.points} {form.differences(versus['ci95'])}, "
        f"p = {versus['p']:.2g}."
    )
    for task in results["heldout_tasks"]:
        scored = [
            f"{entry['name']} {formats[task].score(entry['heldout'][task])}"
            for entry in entries
            if entry["heldout"]
        ]
        lines.append(f"Held out, {task}: " + ", ".join(scored))
        told = [
            f"{name} {formats[task].difference(versus[task]['delta'])} "
            f"{formats[task].differences(versus[task]['ci95'])}"
            for name, versus in best.get("heldout_vs", {}).items()
        ]
        lines += [f"  the search against {', '.join(told)}"] if told else []
    if "front" in results:
        lines.append(_front_table(results))
    return "\n".join(lines)


def _scores(results: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table: a line per method, a column per task, and the objective with its interval."""
    tasks, formats = results["tasks"], formatting.of_results(results)
    forms = [*(formats[task] for task in tasks), formats["objective"]]
    title, names = formatting.headings(
        "test scores", [*tasks, results["objective"]["aggregate"]], forms
    )
    width = max(len(text) for text in (title, *(entry["name"] for entry in entries)))
    widths = [max(12, len(name)) for name in names]
    heading = "  ".join(f"{name:>{wide}}" for name, wide in zip(names, widths))
    lines = [f"{title:<{width}}  {heading}"]
    lines.append("-" * len(lines[0]))
    for entry in entries:
        values = [*(entry["test"][task] for task in tasks), entry["test_objective"]]
        cells = [f"{form.score(value):>{wide}}" for form, value, wide in zip(forms, values, widths)]
        interval = forms[-1].interval(entry["ci95"]["objective"])
        lines.append(f"{entry['name']:<{width}}  {'  '.join(cells)}  {interval}")
    return lines


def _front_table(results: Mapping[str, Any]) -> str:
    """The points of the front, a line for each, and how much they span."""
    front, tasks, formats = results["front"], results["tasks"], formatting.of_results(results)
    title, names = formatting.headings("front, test", tasks, [formats[task] for task in tasks])
    width = max(len(title), max(len(point["name"]) for point in front["points"]))
    widths = [max(21, len(name)) for name in names]
    lines = [f"{title:<{width}}  " + "  ".join(f"{n:>{w}}" for n, w in zip(names, widths))]
    lines = ["", lines[0], "-" * len(lines[0])]
    for point in front["points"]:
        cells = [
            f"{formats[task].score(point['test'][task])} "
            f"{formats[task].interval(point['ci95'][task])}".rjust(wide)
            for task, wide in zip(tasks, widths)
        ]
        lines.append(f"{point['name']:<{width}}  {'  '.join(cells)}")
    volume = front["hypervolume"]
    lines.append(
        f"Hypervolume on test {volume['test']:.3f} [{volume['ci95'][0]:.3f}, "
        f"{volume['ci95'][1]:.3f}]; 1 would be the best checkpoint of each task in one merge."
    )
    return "\n".join(lines)


def _front(
    searched: Sequence[Candidate], objective: Objective, bounds: Mapping[str, Bounds]
) -> dict[str, Any]:
    """The Pareto front on the search split, and its hypervolume above the least scores there are.

    A task without a least score is measured from the worst single checkpoint.
    """
    searched = [line for line in searched if line.out_of is None]  # an estimate may be too high
    scores_PxM = np.array([[line.scores[task] for task in objective.tasks] for line in searched])
    front = pareto.front(scores_PxM)
    least = {task: bounds[task][0] for task in objective.tasks}
    corner = {
        task: objective.reference[task].worst if low is None else low for task, low in least.items()
    }
    return {
        "pareto": [searched[i].id for i in front],
        "hypervolume": pareto.hypervolume(scores_PxM[front], np.array(list(corner.values()))),
        "hypervolume_reference": corner,
    }


def _final(found: Found) -> Request:
    return Request("final", found.name, np.asarray(found.candidate.coefficients, np.float32))


def entry(
    found: Found,
    names: Sequence[str],
    objective: Objective,
    tested: Candidate,
    sample: Mapping[str, np.ndarray],
    heldout: Candidate | None,
) -> dict[str, Any]:
    """What results.json says of a method's choice.

    Args:
        found: the choice.
        names: of the checkpoints, in pool order.
        objective: what was maximised.
        tested: the choice on the test split.
        sample: its score on each test example, by task.
        heldout: the choice on held-out tasks; None: it was not scored there.
    """
    intervals = {
        task: stats.interval({task: sample[task]}, define([task])) for task in objective.tasks
    }
    intervals["objective"] = stats.interval(sample, objective)
    grouped = found.candidate.weights
    return {
        "name": found.name,
        "id": found.candidate.id,
        "weights": dict(zip(names, found.candidate.by_checkpoint)),
        **({"groups": grouped} if isinstance(grouped[0], tuple) else {}),
        **({} if found.candidate.genes is None else {"genes": found.candidate.genes}),
        **({} if found.candidate.window is None else {"window": found.candidate.window}),
        "evaluations": found.evaluations,
        "tokens": found.tokens,
        "search": found.candidate.scores,
        "search_objective": objective.of(found.candidate.scores),
        "test": tested.scores,
        "test_objective": objective.of(tested.scores),
        "ci95": {name: list(interval) for name, interval in intervals.items()},
        "heldout": heldout.scores if heldout else {},
    }
