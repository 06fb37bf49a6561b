"""Preferences between tasks: their lattice, and what each maximises."""

import math

import numpy as np
import pytest

from jaxmerge.errors import JaxmergeError
from jaxmerge.scores.objective import Range
from jaxmerge.search import preferences

REFERENCE = {"a": Range(0.9, 0.1), "b": Range(0.5, 0.4)}


@pytest.mark.parametrize(("tasks", "least"), [(2, 8), (3, 8), (3, 10), (4, 5)])
def test_a_lattice_of_the_simplex(tasks, least):
    found = preferences.lattice(tasks, least)
    assert len(found) >= least
    assert len({*map(tuple, found)}) == len(found)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    assert (found >= 0).all()
    height = round(1 / found[found > 0].min())
    assert len(found) == math.comb(height + tasks - 1, tasks - 1)
    assert math.comb(height + tasks - 2, tasks - 1) < least  # no coarser one is enough
    distance = np.linalg.norm(found - 1 / tasks, axis=1)
    assert (np.diff(distance.round(6)) >= 0).all()  # from the middle outward
    assert {*map(tuple, np.eye(tasks))} <= {*map(tuple, found)}


def test_tasks_are_weighed_in_units_of_the_pools_range():
    wanted = preferences.objective(np.array([0.5, 0.5]), REFERENCE)
    # A whole range of either task is worth the same.
    low, high_a, high_b = (
        wanted.of({"a": a, "b": b}) for a, b in ((0.1, 0.4), (0.9, 0.4), (0.1, 0.5))
    )
    assert high_a - low == pytest.approx(high_b - low)


def test_chebyshev_minds_the_task_that_lags():
    wanted = preferences.objective(np.array([0.5, 0.5]), REFERENCE, "chebyshev")
    assert wanted.of({"a": 0.5, "b": 0.45}) > wanted.of({"a": 0.9, "b": 0.41})


def test_a_single_task_still_breaks_ties_by_the_others():
    wanted = preferences.objective(np.array([1.0, 0.0]), REFERENCE)
    assert wanted.of({"a": 0.5, "b": 0.5}) > wanted.of({"a": 0.5, "b": 0.4})
    assert wanted.of({"a": 0.6, "b": 0.4}) > wanted.of({"a": 0.5, "b": 0.5})


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("front.points", -1, r"front\.points"),
        ("front.steps", -1, r"front\.steps"),
        ("front.scalarisation", "sum", r"front\.scalarisation"),
        ("front.search_examples", -1, r"front\.search_examples"),
        ("objective.tasks", ["a"], r"objective\.tasks"),
        ("search.subset", 0.5, r"search\.subset"),
        ("space.constraint", "window", r"space\.constraint"),
    ],
)
def test_what_cant_be_is_refused(field, value, said):
    right = {"front.points": 8, "front.steps": 20, "front.scalarisation": "weighted"}
    right |= {"objective.tasks": ["a", "b"], "search.subset": 1.0}
    right |= {"space.constraint": "softmax", "front.search_examples": 0}
    preferences.check(right)
    with pytest.raises(JaxmergeError, match=said):
        preferences.check({**right, field: value})
