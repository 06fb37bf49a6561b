"""Preferences between tasks, spread evenly: which merges of a front are looked for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxmerge.errors import JaxmergeError, check_choice, check_least
from jaxmerge.scores.objective import Objective, Range, define
from jaxmerge.search.space import WINDOW

SCALARISATIONS = ("weighted", "chebyshev")

_LEAST = 0.02  # of a task's weight, at most: an objective knows no weight of 0


def check(fields: Mapping[str, Any]) -> None:
    """Raises `JaxmergeError`, which names the field, unless there can be a front.

    Args:
        fields: of a config, by their full names.
    """
    points, tasks = fields["front.points"], fields["objective.tasks"]
    check_least("front.points", points, 0)
    check_least("front.steps", fields["front.steps"], 0)
    check_least("front.search_examples", fields["front.search_examples"], 0)
    check_choice("front.scalarisation", fields["front.scalarisation"], SCALARISATIONS)
    if points and len(tasks) < 2:
        raise JaxmergeError(
            "a front is between tasks",
            where="objective.tasks",
            expected="two tasks or more; or front.points = 0",
            found=", ".join(tasks),
        )
    if points and fields["space.constraint"] == WINDOW:
        raise JaxmergeError(
            "a front is of merges with a weight for each checkpoint",
            where="space.constraint",
            expected=f"another than {WINDOW}; or front.points = 0",
            found=WINDOW,
        )
    if points and fields["search.subset"] < 1:
        raise JaxmergeError(
            "the points of a front are chosen among merges that are scored on all examples",
            where="search.subset",
            expected="1.0; or front.points = 0",
            found=str(fields["search.subset"]),
        )


def lattice(tasks: int, least: int) -> Float[np.ndarray, "N T"]:
    """Preferences v with v_t >= 0 and sum 1, on a lattice of the simplex, from its middle outward.

    All multiples of 1/H, with the smallest H for which they are `least` or more (Das & Dennis, SIAM
    Journal on Optimization 8(3), 1998): there are (H + T - 1 choose T - 1).

    Args:
        tasks: T, at least 2.
        least: how many are wanted.
    """
    height = next(h for h in itertools.count(1) if math.comb(h + tasks - 1, tasks - 1) >= least)
    rows = [
        np.diff([-1, *bars, height + tasks - 1]) - 1
        for bars in itertools.combinations(range(height + tasks - 1), tasks - 1)
    ]
    v_NxT = np.array(rows, np.float64) / height
    distance_N = np.sum((v_NxT - 1 / tasks) ** 2, axis=1).round(9)
    return v_NxT[np.argsort(distance_N, kind="stable")]


def objective(
    preference_T: Float[np.ndarray, " T"],
    reference: Mapping[str, Range],
    scalarisation: str = "weighted",
) -> Objective:
    """What a preference maximises, tasks measured in units of the pool's range on them.

    `weighted` is sum_t v_t s_t / (best_t - worst_t), scaled to weights that sum to 1. `chebyshev`
    is the aggregate of that name with v. A v of 0 counts as a fiftieth.

    Args:
        preference_T: v, of the tasks in the order of `reference`.
        reference: the best and the worst single checkpoint of each task.
        scalarisation: a name in `SCALARISATIONS`.
    """
    v_T = np.maximum(preference_T, _LEAST)
    if scalarisation == "weighted":
        v_T = v_T / [best - worst or 1.0 for best, worst in reference.values()]
    return Objective(
        define([*reference], v_T.tolist(), scalarisation).weights, scalarisation, reference
    )
