"""Fronts against the definition, volumes against hand-made cases and Monte Carlo."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from jaxmerge.scores import pareto


@pytest.mark.parametrize("M", [1, 2, 3, 5])
@pytest.mark.parametrize("levels", [3, 1000])
def test_front_is_that_of_the_definition(M: int, levels: int) -> None:
    # Few levels make many equal rows and ties in single scores.
    scores_PxM = np.random.default_rng(M).integers(0, levels, (80, M)) / levels
    expected = []
    for p, row in enumerate(scores_PxM):
        dominated = any((q >= row).all() and (q > row).any() for q in scores_PxM)
        repeated = any((q == row).all() for q in scores_PxM[:p])
        if not dominated and not repeated:
            expected.append(p)
    assert pareto.front(scores_PxM).tolist() == expected


def test_front_of_one_and_of_none() -> None:
    assert pareto.front(np.array([[0.5, 0.5]])).tolist() == [0]
    assert pareto.front(np.zeros((0, 3))).tolist() == []


@pytest.mark.parametrize(
    ("rows", "reference", "volume"),
    [
        ([[0.5]], [0.25], 0.25),
        ([[1, 2], [2, 1]], [0, 0], 3),  # two boxes of 2, overlapping in 1
        ([[1, 2], [2, 1], [2, 1], [1, 1]], [0, 0], 3),  # repeated and dominated rows
        ([[1, 2], [2, 1]], [0.5, 0.5], 1.25),
        ([[1, 2], [2, 1]], [1, 0], 1),  # the first row is not above the reference
        ([[1, 2]], [1, 2], 0),
        ([[-1, 3], [3, -1]], [0, 0], 0),
        ([[1, 1, 2], [1, 2, 1], [2, 1, 1]], [0, 0, 0], 4),  # a cube and three more on its faces
        ([[2, 1, 1, 1], [1, 1, 1, 3]], [0, 0, 0, 0], 4),
    ],
)
def test_hypervolume_by_hand(
    rows: list[list[float]], reference: list[float], volume: float
) -> None:
    found = pareto.hypervolume(np.array(rows, float), np.array(reference, float))
    assert found == pytest.approx(volume, abs=1e-12)


def test_hypervolume_of_none_is_zero() -> None:
    assert pareto.hypervolume(np.zeros((0, 3)), np.zeros(3)) == 0


@pytest.mark.parametrize("M", [2, 3, 4, 5, 6])
def test_hypervolume_by_inclusion_and_exclusion(M: int) -> None:
    scores_PxM = np.random.default_rng(M).integers(1, 6, (7, M)) / 5  # with ties
    expected = 0.0
    for size in range(1, 8):
        for chosen in itertools.combinations(scores_PxM, size):
            expected += (-1) ** (size + 1) * np.prod(np.min(chosen, axis=0))
    # Float64 sums of 127 terms below 1.
    assert pareto.hypervolume(scores_PxM, np.zeros(M)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("M", [3, 6])
def test_hypervolume_by_monte_carlo(M: int) -> None:
    rng = np.random.default_rng(M)
    scores_PxM = np.abs(rng.standard_normal((100, M)))
    scores_PxM /= np.linalg.norm(scores_PxM, axis=1, keepdims=True)  # all on the front
    reference_M = np.full(M, 0.05)
    points_SxM = rng.uniform(0.05, 1, (40_000, M))
    inside = np.mean([(scores_PxM >= point).all(axis=1).any() for point in points_SxM])
    error = np.sqrt(inside * (1 - inside) / len(points_SxM))
    expected, unit = inside * 0.95**M, 0.95**M
    found = pareto.hypervolume(scores_PxM, reference_M)
    assert found == pytest.approx(expected, abs=4 * error * unit)  # four standard errors


def test_hypervolume_grows_with_a_row_of_the_front_alone() -> None:
    scores_PxM = np.random.default_rng(0).random((30, 3))
    reference_M = np.zeros(3)
    volume = pareto.hypervolume(scores_PxM, reference_M)
    front = pareto.front(scores_PxM)
    assert pareto.hypervolume(scores_PxM[front], reference_M) == pytest.approx(volume, rel=1e-12)
    for p in front:
        assert pareto.hypervolume(np.delete(scores_PxM, p, axis=0), reference_M) < volume


def test_nan_is_refused() -> None:
    scores_PxM = np.array([[0.5, np.nan], [0.2, 0.3]])
    with pytest.raises(ValueError, match="NaN"):
        pareto.front(scores_PxM)
    with pytest.raises(ValueError, match="NaN"):
        pareto.hypervolume(scores_PxM, np.zeros(2))


@pytest.mark.parametrize("tasks", [2, 3])
def test_a_few_rows_stand_for_the_front(tasks):
    rng = np.random.default_rng(tasks)
    scores = rng.uniform(size=(40, tasks))
    reference = np.full(tasks, 0.05)
    chosen = pareto.spread(scores, reference, 4)
    assert {*chosen} <= {*pareto.front(scores)}
    assert (np.diff(chosen) > 0).all()
    volume = pareto.hypervolume(scores[chosen], reference)
    subsets = itertools.combinations(pareto.front(scores), 4)
    largest = max(pareto.hypervolume(scores[list(subset)], reference) for subset in subsets)
    assert volume >= 0.99 * largest  # exchanges nearly always reach it; they must reach 1 - 1/e
    drawn = [rng.choice(pareto.front(scores), 4, replace=False) for _ in range(50)]
    assert volume > np.mean([pareto.hypervolume(scores[each], reference) for each in drawn])


def test_rows_that_add_nothing_are_left_out():
    scores = np.array([[0.5, 0.5], [0.5, 0.5], [0.9, 0.0], [0.4, 0.4]])
    assert pareto.spread(scores, np.array([0.1, 0.1]), 3).tolist() == [0]
    assert pareto.spread(scores, np.array([0.1, -0.1]), 3).tolist() == [0, 2]
    assert pareto.spread(scores, np.array([1.0, 1.0]), 3).tolist() == []
