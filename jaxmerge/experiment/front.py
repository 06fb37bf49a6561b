"""The front of a run: merges that trade the tasks off, from all that the run has scored.

A search along gradients is followed by climbs along preferences between the tasks, each from the
merge that was best for its preference by then. Other strategies look for the front themselves, or
leave what they happened to score. Of all merges on the front of the search split those few are
chosen that have the largest hypervolume together; they are the front's points, and are scored on
the test split.

Scores are measured from a corner, a tenth of the pool's range below its worst checkpoint on each
task, so that checkpoints that are good at one task alone can be points too. The unit of a volume is
the box from the corner to the pool's best scores: a front of volume 1 does what the best checkpoint
of each task does, all in one merge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxmerge.config import Config
from jaxmerge.experiment import results
from jaxmerge.experiment.budget import FRONT, preferences_of
from jaxmerge.experiment.climb import Climb
from jaxmerge.experiment.prepare import Prepared
from jaxmerge.merge.searched import Searched
from jaxmerge.rundir import ANALYSIS, Candidate, RunDirectory
from jaxmerge.scores import pareto, stats
from jaxmerge.scores.objective import Objective, Range
from jaxmerge.search import loop, preferences
from jaxmerge.search.archive import Archive, Request, best

_BELOW = 0.1  # of the pool's range on a task, that the corner is below its worst checkpoint
_RESAMPLES = 1000


class Box(NamedTuple):
    """What volumes of a front are measured by.

    Attributes:
        tasks: T.
        corner_T: where volumes begin.
        best_T: the best score of a single checkpoint on each task.
    """

    tasks: tuple[str, ...]
    corner_T: Float[np.ndarray, " T"]
    best_T: Float[np.ndarray, " T"]

    def scores(self, candidates: Sequence[Candidate]) -> Float[np.ndarray, "P T"]:
        """Scores of candidates on the tasks."""
        rows = [[one.scores[task] for task in self.tasks] for one in candidates]
        return np.array(rows, np.float64).reshape(-1, len(self.tasks))

    def volume(self, scores_PxT: Float[np.ndarray, "P T"]) -> float:
        """The hypervolume of some merges; 1 is that of the box."""
        unit = float(np.prod(self.best_T - self.corner_T))
        return pareto.hypervolume(scores_PxT, self.corner_T) / unit


def box(reference: Mapping[str, Range]) -> Box:
    """The box of the single checkpoints' scores.

    Args:
        reference: the best and the worst of each task.
    """
    best_T, worst_T = np.array([*reference.values()], np.float64).T
    range_T = np.where(best_T > worst_T, best_T - worst_T, 1.0)
    return Box((*reference,), worst_T - _BELOW * range_T, best_T)


def climb(
    config: Config,
    prepared: Prepared,
    archive: Archive,
    objective: Objective,
    climbed: Climb,
    to_coefficients: loop.ToWeights,
) -> None:
    """Climbs along preferences between the tasks, from the middle ones to single tasks.

    Args:
        config: of the run.
        prepared: of the run.
        archive: that scores candidates; it has those of the search.
        objective: of the tasks, measured by the pool.
        climbed: what the search has climbed.
        to_coefficients: genotypes to what merges are made from.
    """
    preferences_NxT = preferences_of(config)
    for number, preference_T in enumerate(preferences_NxT):
        mine = [one for one in archive.past if one.origin in ("search", FRONT)]
        known = [one for one in archive.past if _counts(one) and _starts(one, prepared.method)]
        wanted = preferences.objective(
            preference_T, objective.reference, config.front.scalarisation
        )
        left = config.search.budget_tokens - sum(one.cost for one in mine)
        share = max(1, left // (len(preferences_NxT) - number))
        strategy = climbed.toward(
            wanted,
            start=best(known, wanted),
            steps=config.front.steps,
            tokens=share if config.search.budget_tokens else 0,
        )
        if strategy is None:  # the tokens are spent
            continue
        if archive.recorded(FRONT, f"front-{number}"):
            archive.skip(FRONT, f"front-{number}", 1)
            continue
        loop.search(
            archive,
            strategy,
            to_coefficients,
            objective=wanted,
            budget=strategy.population,
            seed=config.seed,
            origin=FRONT,
            name=f"front-{number}",
        )


class Points:
    """The points of a run's front, those first that are worst on the first task.

    Args:
        archive: of the run; the points are scored on its test split.
        objective: of the tasks, measured by the pool.
        wanted: how many, at most.

    Attributes:
        chosen: the points on the search split.
        tested: the same on the test split; their names are their numbers, from 1.
    """

    def __init__(self, archive: Archive, objective: Objective, wanted: int):
        self._objective, self._box = objective, box(objective.reference)
        self.chosen = self._choose(archive, wanted)
        requests = [
            Request(FRONT, str(number), np.asarray(one.coefficients, np.float32))
            for number, one in enumerate(self.chosen, 1)
        ]
        self.tested = archive.evaluate("test", requests)

    def _choose(self, archive: Archive, wanted: int) -> list[Candidate]:
        known: dict[Any, Candidate] = {}
        for one in archive.past:
            if _counts(one):
                known.setdefault(one.coefficients, one)
        scored = [*known.values()]
        scores_PxT = self._box.scores(scored)
        chosen = [scored[i] for i in pareto.spread(scores_PxT, self._box.corner_T, wanted)]
        return sorted(chosen, key=lambda one: (*self._box.scores([one])[0], one.id))

    def findings(
        self, directory: RunDirectory, names: Sequence[str], tested: results.Tested
    ) -> dict[str, Any]:
        """What results.json says of the front.

        Args:
            directory: of the run.
            names: of the checkpoints, in pool order.
            tested: the methods on the test split, the single checkpoints first.
        """
        alone, objective = tested.candidates[: len(names)], self._objective
        on_test = box(objective.measured_by([one.scores for one in alone]).reference)
        single = best(alone, objective)
        of_single = directory.examples(single)
        samples = [directory.examples(one) for one in self.tested]
        low, high = stats.interval_of(samples, on_test.tasks, on_test.volume, resamples=_RESAMPLES)
        points = []
        for chosen, scored, sample in zip(self.chosen, self.tested, samples):
            found = tested.best._replace(name=scored.name, candidate=chosen)
            entry = results.entry(found, names, objective, scored, sample, None)
            versus = {single.name: results.compared(sample, of_single, objective)}
            points.append({**entry, "vs": versus})
        return {
            "points": points,
            "corner": {
                "search": dict(zip(on_test.tasks, self._box.corner_T.tolist())),
                "test": dict(zip(on_test.tasks, on_test.corner_T.tolist())),
            },
            "hypervolume": {
                "search": self._box.volume(self._box.scores(self.chosen)),
                "test": on_test.volume(on_test.scores(self.tested)),
                "ci95": [low, high],
            },
            "curves": curves([one for one in directory.candidates if _counts(one)], self._box),
        }


def as_best(findings: Mapping[str, Any], number: int) -> dict[str, Any]:
    """What results.json would say if a point of the front were the winner."""
    point = findings["front"]["points"][number - 1]
    return {**findings, "best": {**findings["best"], **point}}


def curves(searched: Sequence[Candidate], of: Box) -> dict[str, list[dict[str, float]]]:
    """Of each way of searching the hypervolume of what it had scored, by the tokens it had taken.

    Single checkpoints belong to all ways, and are not counted.
    """
    alone = [one for one in searched if one.origin == "individual"]
    ways: dict[str, list[Candidate]] = {}
    for one in searched:
        if one.origin != "individual":
            kind, _, name = one.origin.partition(":")
            ways.setdefault(name if kind == "baseline" else "search", []).append(one)
    return {name: _curve([*alone], mine, of) for name, mine in ways.items()}


def _curve(
    alone: Sequence[Candidate], mine: Sequence[Candidate], of: Box
) -> list[dict[str, float]]:
    """Each time that the volume rises, and the end."""
    volume, seen = of.volume(of.scores(alone)), of.scores(alone)
    told = [{"tokens": 0.0, "hypervolume": volume}]
    for took, one in zip(accumulate(each.cost for each in mine), mine):
        seen = np.concatenate([seen, of.scores([one])])
        seen = seen[pareto.front(seen)]
        now = of.volume(seen)
        if now > volume or one is mine[-1]:
            told.append({"tokens": float(took), "hypervolume": now})
        volume = max(now, volume)
    return told


def _starts(one: Candidate, method: Searched | None) -> bool:
    """Whether a climb can start there: weighted sums are no genotypes of a method."""
    return method is None or one.genes is not None


def _counts(one: Candidate) -> bool:
    """Whether it is scored on all search examples, and no part of an analysis."""
    return one.split == "search" and one.out_of is None and not one.origin.startswith(ANALYSIS)
