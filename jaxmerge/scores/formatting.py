"""How scores are written: shares in percent, everything else as plain numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxmerge.scores.objective import Objective, from_plain

Bounds = Sequence[float | None]  # the least and the greatest score; None: there is none


class Format(NamedTuple):
    """How the scores of a task, or an objective, are written.

    Attributes:
        percent: whether they are shares, from 0 to 1, and written in percent.
    """

    percent: bool

    @property
    def points(self) -> str:
        """What a difference is followed by."""
        return " points" if self.percent else ""

    def score(self, value: float) -> str:
        return f"{100 * value:.1f}" if self.percent else f"{value:.3f}"

    def difference(self, value: float) -> str:
        return f"{100 * value:+.1f}" if self.percent else f"{value:+.3f}"

    def interval(self, ends: Sequence[float]) -> str:
        return f"[{self.score(ends[0])}, {self.score(ends[1])}]"

    def differences(self, ends: Sequence[float]) -> str:
        return f"[{self.difference(ends[0])}, {self.difference(ends[1])}]"


def plain_bounds(bounds: tuple[float, float]) -> list[float | None]:
    """Bounds as JSON has them, which knows no infinity."""
    return [bound if math.isfinite(bound) else None for bound in bounds]


def of_task(bounds: Bounds) -> Format:
    """The format of a task's scores: percent when they lie from 0 to 1."""
    low, high = bounds
    return Format(low is not None and low >= 0 and high is not None and high <= 1)


def of_objective(objective: Objective, bounds: Mapping[str, Bounds]) -> Format:
    """The format of an objective: percent when it is a score, and those of all its tasks are."""
    shares = all(of_task(bounds[task]).percent for task in objective.tasks)
    return Format(shares and not objective.how.relative)


def of_bounds(objective: Objective, bounds: Mapping[str, Bounds]) -> dict[str, Format]:
    """The formats of all tasks that have bounds here, and that of `objective`."""
    formats = {task: of_task(bounds[task]) for task in bounds}
    return {**formats, "objective": of_objective(objective, bounds)}


def of_results(results: Mapping[str, Any]) -> dict[str, Format]:
    """The formats of all tasks, held-out ones too, and that of `objective`."""
    return of_bounds(from_plain(results["objective"]), results["bounds"])


def headings(title: str, names: Sequence[str], formats: Sequence[Format]) -> tuple[str, list[str]]:
    """The title and the column names of a table, with the per cent sign where it belongs."""
    if all(form.percent for form in formats):
        return f"{title}, %", list(names)
    return title, [name + ", %" * form.percent for name, form in zip(names, formats)]


def window(numbers: Mapping[str, Any], checkpoints: int) -> str:
    """The window of a merge of a run's steps in words; of groups that have their own the means.

    Args:
        numbers: `length` and `exponent`, as results.json has them.
        checkpoints: K.
    """
    by_group = isinstance(numbers["length"], list | tuple)
    length, exponent = (
        sum(each) / len(each) if by_group else each
        for each in (numbers["length"], numbers["exponent"])
    )
    return (
        f"{'in the mean over groups ' if by_group else ''}the newest {length:.3g} of {checkpoints} "
        f"checkpoints, as if the learning rate had decayed by 1 - x^{exponent:.3g} over them"
    )
