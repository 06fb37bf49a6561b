"""What a search maximises: one number of the scores on all tasks.

Two of the aggregates measure a task by the pool: with `best_t` and `worst_t` the highest and lowest
score of a single checkpoint on the search split,

    gain_t = (s_t - best_t) / (best_t - worst_t)

is 0 where a merge is as good as the best checkpoint of the task, and -1 where it is as bad as the
worst. Where all checkpoints score alike the range counts as 1: the gain is then in the task's own
unit. A range of a few examples is mostly noise, and gives its task much weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxmerge.errors import JaxmergeError

_RHO = 0.05  # of the augmentation, as in ParEGO


class Range(NamedTuple):
    """Scores of the best and of the worst single checkpoint on a task."""

    best: float
    worst: float


Columns = Sequence[np.ndarray]  # scores or gains of each task, of one shape
Combine = Callable[[Columns, Sequence[float]], np.ndarray]


class Aggregate(NamedTuple):
    """A way to make one number of the scores on all tasks.

    Attributes:
        combine: from scores, or gains where it is `relative`, and the tasks' weights.
        phrase: what it is, for reports.
        weights: whether `objective.weights` are needed, allowed or refused.
        relative: whether tasks are measured by the pool, as gains.
        affine: whether it is a weighted sum of the scores and a constant.
    """

    combine: Combine
    phrase: str
    weights: Literal["needed", "allowed", "refused"] = "refused"
    relative: bool = False
    affine: bool = False


def _mean(scores: Columns, weights: Sequence[float]) -> np.ndarray:
    """sum_t w_t s_t."""
    return sum((w * s for w, s in zip(weights, scores)), np.zeros(1))


def _worst(scores: Columns, weights: Sequence[float]) -> np.ndarray:
    """min_t s_t."""
    return np.minimum.reduce(scores)


def _chebyshev(gains: Columns, weights: Sequence[float]) -> np.ndarray:
    """min_t v_t gain_t + rho sum_t v_t gain_t, with v_t = T w_t, so that equal weights are 1."""
    weighted = [len(gains) * w * gain for w, gain in zip(weights, gains)]
    return np.minimum.reduce(weighted) + _RHO * sum(weighted, np.zeros(1))


# `chebyshev` is the augmented weighted Chebyshev distance to the ideal point, negated (Steuer &
# Choo, Mathematical Programming 26, 1983), with the augmentation of ParEGO (Knowles, IEEE
# Transactions on Evolutionary Computation 10(1), 2006). It rewards gains over the ideal point too:
# as an achievement function (Wierzbicki, 1980) it grows with every score, reached or not.
AGGREGATES = {
    "mean": Aggregate(_mean, "mean of the tasks", affine=True),
    "weighted": Aggregate(_mean, "weighted mean of the tasks", weights="needed", affine=True),
    "worst": Aggregate(_worst, "score of the worst task"),
    "normalised": Aggregate(
        _mean,
        "mean over the tasks of the gain over the pool's best, in units of the pool's range",
        relative=True,
        affine=True,
    ),
    "chebyshev": Aggregate(
        _chebyshev,
        "augmented Chebyshev distance to the pool's best of each task, negated, in units of the "
        "pool's range",
        weights="allowed",
        relative=True,
    ),
}


@dataclasses.dataclass(frozen=True)
class Objective:
    """An aggregate of the scores on some tasks. `define` makes one.

    Attributes:
        weights: per task; they sum to 1. The tasks are its keys.
        aggregate: a name of `AGGREGATES`.
        reference: per task, the best and the worst single checkpoint; {} until `measured_by`.
    """

    weights: Mapping[str, float]
    aggregate: str = "mean"
    reference: Mapping[str, Range] = dataclasses.field(default_factory=dict)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names, in the order of the config."""
        return tuple(self.weights)

    @property
    def how(self) -> Aggregate:
        """What `aggregate` names."""
        return AGGREGATES[self.aggregate]

    def __call__(self, scores: Mapping[str, Float[np.ndarray, "*S"]]) -> Float[np.ndarray, "*S"]:
        """The objective of many candidates.

        Args:
            scores: per task, mean scores of any one shape.

        Raises:
            ValueError: the tasks are others, or the aggregate is measured by the pool, and the
                pool's scores are not known.
        """
        if set(scores) != set(self.weights):
            raise ValueError(f"scores of {sorted(scores)}, objective of {sorted(self.weights)}")
        shape = next(iter(scores.values())).shape
        columns = [np.asarray(scores[task], np.float64).reshape(-1) for task in self.weights]
        if self.how.relative:
            columns = [self._gain(task, column) for task, column in zip(self.weights, columns)]
        return self.how.combine(columns, list(self.weights.values())).reshape(shape)

    def of(self, scores: Mapping[str, float]) -> float:
        """The objective of one candidate, from its mean score on each task."""
        return float(self({task: np.asarray(scores[task]) for task in self.weights}))

    def measured_by(self, individuals: Sequence[Mapping[str, float]]) -> Objective:
        """The same, measured by these scores of the single checkpoints."""
        of_task = {task: [scores[task] for scores in individuals] for task in self.weights}
        reference = {task: Range(max(scores), min(scores)) for task, scores in of_task.items()}
        return dataclasses.replace(self, reference=reference)

    def over(self, tasks: Sequence[str]) -> Objective:
        """The same over some of its tasks; their weights again sum to 1."""
        total = sum(self.weights[task] for task in tasks)
        weights = {task: self.weights[task] / total for task in tasks}
        measured = {task: self.reference[task] for task in tasks if task in self.reference}
        return dataclasses.replace(self, weights=weights, reference=measured)

    def plain(self) -> dict[str, Any]:
        """As it stands in results.json."""
        return {
            "aggregate": self.aggregate,
            "weights": dict(self.weights),
            "reference": {task: of_task._asdict() for task, of_task in self.reference.items()},
        }

    def _gain(self, task: str, scores: np.ndarray) -> np.ndarray:
        if task not in self.reference:
            raise ValueError(f"{self.aggregate} needs the pool's scores on {task}: `measured_by`")
        best, worst = self.reference[task]
        return (scores - best) / (best - worst or 1.0)


def define(
    tasks: Sequence[str], weights: Sequence[float] = (), aggregate: str = "mean"
) -> Objective:
    """The objective over these tasks.

    Args:
        tasks: names; unique.
        weights: one positive number per task, of any sum; (): all alike.
        aggregate: a name of `AGGREGATES`.

    Raises:
        JaxmergeError: names the field of the config: there are no tasks, no such aggregate, or
            weights that the aggregate does not take, or none where it needs them.
    """
    if not tasks:
        raise JaxmergeError(
            "no tasks are named",
            where="objective.tasks",
            expected='objective.tasks: names of tasks, such as ("arithmetic",)',
        )
    twice = sorted({task for task in tasks if list(tasks).count(task) > 1})
    if twice:
        raise JaxmergeError(
            "a task is named more than once",
            where="objective.tasks",
            expected="each task once",
            found=", ".join(twice),
        )
    if aggregate not in AGGREGATES:
        raise JaxmergeError(
            "there is no such aggregate",
            where="objective.aggregate",
            expected=", ".join(AGGREGATES),
            found=aggregate,
        )
    _check_weights(tasks, weights, aggregate)
    raw = weights or (1.0,) * len(tasks)
    return Objective({task: weight / sum(raw) for task, weight in zip(tasks, raw)}, aggregate)


def from_plain(plain: Mapping[str, Any]) -> Objective:
    """The objective that results.json tells of."""
    reference = {task: Range(**of_task) for task, of_task in plain["reference"].items()}
    return Objective(plain["weights"], plain["aggregate"], reference)


def _check_weights(tasks: Sequence[str], weights: Sequence[float], aggregate: str) -> None:
    take = AGGREGATES[aggregate].weights
    if weights and take == "refused":
        takers = [name for name, how in AGGREGATES.items() if how.weights != "refused"]
        raise JaxmergeError(
            f"the aggregate {aggregate} takes no weights",
            where="objective.weights",
            expected=f"(), or objective.aggregate one of {', '.join(takers)}",
            found=str(tuple(weights)),
        )
    if (weights or take == "needed") and (len(weights) != len(tasks) or min(weights) <= 0):
        raise JaxmergeError(
            "needs one positive number per task",
            where="objective.weights",
            expected=f"{len(tasks)} numbers",
            found=str(tuple(weights)),
        )
