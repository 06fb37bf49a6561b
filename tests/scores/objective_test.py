"""Each aggregate by hand, against an independent reference, and what is refused."""

import functools
import math
import operator

import numpy as np
import pytest

from jaxmerge.errors import JaxmergeError
from jaxmerge.scores.objective import AGGREGATES, Objective, define, from_plain

TASKS: tuple[str, ...] = ("sums", "words", "text")
POOL = [
    {"sums": 0.8, "words": 0.2, "text": -1.5},
    {"sums": 0.4, "words": 0.7, "text": -1.0},
]  # ranges 0.4, 0.5 and 0.5
MERGE = {"sums": 0.7, "words": 0.7, "text": -0.9}  # gains -0.25, 0 and +0.2


def _objective(aggregate: str) -> Objective:
    weights = () if AGGREGATES[aggregate].weights == "refused" else (2.0, 1.0, 1.0)
    return define(TASKS, weights, aggregate).measured_by(POOL)


@pytest.mark.parametrize(
    ("aggregate", "expected"),
    [
        ("mean", 0.5 / 3),
        ("weighted", 0.5 * 0.7 + 0.25 * 0.7 - 0.25 * 0.9),
        ("worst", -0.9),
        ("normalised", (-0.25 + 0 + 0.2) / 3),
        # v = 1.5, 0.75, 0.75; the least weighted gain is that of sums.
        ("chebyshev", -0.375 + 0.05 * (-0.375 + 0 + 0.15)),
    ],
)
def test_by_hand(aggregate, expected):
    assert _objective(aggregate).of(MERGE) == pytest.approx(expected)


def _reference(aggregate: str, scores: dict[str, np.ndarray]) -> np.ndarray:
    """The same with whole matrices."""
    matrix = np.stack([scores[task] for task in TASKS], axis=-1)
    pool = np.array([[one[task] for task in TASKS] for one in POOL])
    gains = (matrix - pool.max(0)) / np.ptp(pool, axis=0)
    weights = np.array([0.5, 0.25, 0.25])
    return {
        "mean": matrix.mean(-1),
        "weighted": np.average(matrix, axis=-1, weights=weights),
        "worst": matrix.min(-1),
        "normalised": gains.mean(-1),
        "chebyshev": (3 * weights * gains).min(-1) + 0.05 * (3 * gains) @ weights,
    }[aggregate]


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (4, 5)])
def test_of_many_is_that_of_each_and_of_the_reference(aggregate, shape):
    rng = np.random.default_rng(0)
    scores = {task: rng.normal(size=shape) for task in TASKS}
    objective = _objective(aggregate)
    values = objective(scores)
    assert values.shape == shape
    for index in np.ndindex(shape):
        alone = objective.of({task: float(scores[task][index]) for task in TASKS})
        assert values[index] == alone
    np.testing.assert_allclose(values, _reference(aggregate, scores), rtol=0, atol=1e-13)


def test_the_mean_adds_in_the_order_of_the_tasks():
    """Bit for bit sum_t w_t s_t, so that a log of another day gives the same winner."""
    rng = np.random.default_rng(1)
    for _ in range(100):
        scores = dict(zip(TASKS, rng.random(3).tolist()))
        # Not the built-in sum, which makes up for roundings from Python 3.12 on.
        expected = functools.reduce(operator.add, [1 / 3 * scores[task] for task in TASKS], 0.0)
        assert define(TASKS).of(scores) == expected


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_no_aggregate_falls_when_a_score_rises(aggregate):
    """`worst` alone may stay."""
    rng = np.random.default_rng(2)
    objective = _objective(aggregate)
    for _ in range(50):
        scores = dict(zip(TASKS, rng.normal(size=3).tolist()))
        for task in TASKS:
            rise = objective.of({**scores, task: scores[task] + 0.1}) - objective.of(scores)
            assert rise >= 0 if aggregate == "worst" else rise > 0


def test_the_pool_is_the_measure():
    """The best of each task is 0, the worst -1, for every relative aggregate with one task."""
    for aggregate, at_worst in (("normalised", -1), ("chebyshev", -1.05)):
        objective = define(["sums"], (), aggregate).measured_by(POOL)
        assert objective.of({"sums": 0.8}) == 0
        assert objective.of({"sums": 0.4}) == pytest.approx(at_worst)


def test_where_all_checkpoints_score_alike_gains_are_in_the_unit_of_the_task():
    objective = define(["sums"], (), "normalised").measured_by([{"sums": 0.5}, {"sums": 0.5}])
    assert objective.of({"sums": 0.75}) == 0.25


def test_a_relative_aggregate_without_its_pool_says_so():
    with pytest.raises(ValueError, match="chebyshev needs the pool's scores on sums"):
        define(TASKS, (), "chebyshev").of(MERGE)


def test_other_tasks_are_refused():
    with pytest.raises(ValueError, match=r"\['sums'\].*\['sums', 'text', 'words'\]"):
        define(TASKS)({"sums": np.ones(3)})


def test_through_results_and_back():
    for aggregate in AGGREGATES:
        objective = _objective(aggregate)
        assert from_plain(objective.plain()) == objective
        assert math.isclose(sum(objective.weights.values()), 1)


@pytest.mark.parametrize(
    ("tasks", "weights", "aggregate", "named"),
    [
        ((), (), "mean", r"objective\.tasks"),
        (("sums", "sums"), (), "mean", r"objective\.tasks.*\n.*each task once\n.*sums"),
        (TASKS, (), "median", r"objective\.aggregate.*\n.*chebyshev.*\n.*median"),
        (TASKS, (), "weighted", r"objective\.weights.*\n.*3 numbers"),
        (TASKS, (1.0, 2.0), "weighted", r"objective\.weights.*\n.*3 numbers"),
        (TASKS, (1.0, 2.0, 0.0), "chebyshev", r"objective\.weights.*positive"),
        (TASKS, (1.0, 2.0, 3.0), "mean", r"objective\.weights: the aggregate mean.*\n.*weighted"),
        (TASKS, (1.0, 2.0, 3.0), "worst", r"objective\.weights"),
        (TASKS, (1.0, 2.0, 3.0), "normalised", r"objective\.weights"),
    ],
)
def test_contradictions_name_the_field(tasks, weights, aggregate, named):
    with pytest.raises(JaxmergeError, match=named):
        define(tasks, weights, aggregate)
