"""Pareto fronts and their hypervolume; every score is maximised."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int


def front(scores_PxM: Float[np.ndarray, "P M"]) -> Int[np.ndarray, " F"]:
    """Rows that no other row dominates, as increasing indices `[F]`.

    Row q dominates row p when `q_m >= p_m` for all m and `q_m > p_m` for one. Of equal rows the
    first alone is kept.

    Args:
        scores_PxM: M scores of P candidates.

    Raises:
        ValueError: not a matrix, or a score is NaN.
    """
    scores_PxM = _checked(scores_PxM)
    # Lexicographically descending, ties by index: no row is dominated by a later one.
    remaining = np.lexsort(tuple(-scores_PxM.T[::-1]))
    kept = []
    while remaining.size:
        best = remaining[0]
        kept.append(best)
        # A row survives when it beats the kept row somewhere; an equal row does not.
        remaining = remaining[(scores_PxM[remaining] > scores_PxM[best]).any(axis=1)]
    return np.sort(np.array(kept, np.int64))


def hypervolume(
    scores_PxM: Float[np.ndarray, "P M"], reference_M: Float[np.ndarray, " M"]
) -> float:
    """Volume of the union of the boxes between the reference and each row, exact.

        HV = vol( union_p prod_m [reference_m, scores_pm] )

    A row that is not above the reference in every score adds nothing. The exclusive volumes of the
    rows are summed, as in the WFG algorithm (While, Bradstreet & Barone, IEEE Transactions on
    Evolutionary Computation 16(1), 2012): in the order of one score, the overlap of a row with its
    successors has one dimension less.

    Args:
        scores_PxM: M scores of P candidates.
        reference_M: the corner that the volume is measured from.

    Returns:
        The volume, in the product of the scores' units; 0 when no row is above the reference.

    Raises:
        ValueError: not a matrix and a vector that fit, or a score is NaN.
    """
    scores_PxM = _checked(scores_PxM)
    reference_M = np.asarray(reference_M, np.float64)
    if reference_M.shape != scores_PxM.shape[1:] or np.isnan(reference_M).any():
        raise ValueError(f"expected a reference of {scores_PxM.shape[1]} scores")
    sides_PxM = scores_PxM - reference_M
    return _volume(sides_PxM[(sides_PxM > 0).all(axis=1)])


def _volume(sides_PxM: Float[np.ndarray, "P M"]) -> float:
    """Volume of the union of boxes that start at the origin."""
    if not len(sides_PxM):
        return 0.0
    if sides_PxM.shape[1] == 1:
        return float(sides_PxM.max())
    sides_PxM = sides_PxM[np.argsort(sides_PxM[:, -1], kind="stable")]
    if sides_PxM.shape[1] == 2:
        # Slab by slab of the last side: as wide as the widest box that reaches so far.
        widths_P = np.maximum.accumulate(sides_PxM[::-1, 0])[::-1]
        return float(np.diff(sides_PxM[:, -1], prepend=0.0) @ widths_P)
    sides_PxM = sides_PxM[front(sides_PxM)]
    volume = 0.0
    for p, sides_M in enumerate(sides_PxM):
        # The later boxes reach at least as far in the last side, so all overlaps end with this one.
        overlaps = np.minimum(sides_PxM[p + 1 :, :-1], sides_M[:-1])
        volume += sides_M[-1] * (sides_M[:-1].prod() - _volume(overlaps))
    return float(volume)


def _checked(scores_PxM: Float[np.ndarray, "P M"]) -> Float[np.ndarray, "P M"]:
    scores_PxM = np.asarray(scores_PxM, np.float64)
    if scores_PxM.ndim != 2:
        raise ValueError(f"expected scores [P, M], found shape {scores_PxM.shape}")
    if np.isnan(scores_PxM).any():
        raise ValueError("a score is NaN")
    return scores_PxM


def spread(
    scores_PxM: Float[np.ndarray, "P M"], reference_M: Float[np.ndarray, " M"], count: int
) -> Int[np.ndarray, " F"]:
    """Rows of the front that together have a large hypervolume: a few that stand for all of it.

    One after the other the row that adds most is taken, which has at least 1 - 1/e of the largest
    hypervolume of so many (Nemhauser, Wolsey & Fisher, Mathematical Programming 14, 1978). Then
    rows are exchanged as long as that adds to it. Rows that add nothing are left out.

    Args:
        scores_PxM: M scores of P candidates.
        reference_M: the corner that volumes are measured from.
        count: how many rows are wanted.

    Returns:
        Increasing indices `[F]`, at most `count`.
    """
    candidates = front(scores_PxM)
    sides = np.asarray(scores_PxM, np.float64)[candidates] - np.asarray(reference_M, np.float64)
    inside = (sides > 0).all(axis=1)
    candidates, sides = candidates[inside], sides[inside]
    chosen: list[int] = []
    volume = 0.0
    for _ in range(min(count, len(candidates))):
        best, added = _largest(sides, chosen)
        if added <= volume:
            break
        chosen, volume = [*chosen, best], added
    better = True
    while better:
        better = False
        for place in range(len(chosen)):
            others = chosen[:place] + chosen[place + 1 :]
            best, exchanged = _largest(sides, others)
            if exchanged > volume * (1 + 1e-12):
                chosen, volume, better = [*others, best], exchanged, True
    return np.sort(candidates[chosen]).astype(np.int64)


def _largest(sides_FxM: Float[np.ndarray, "F M"], chosen: list[int]) -> tuple[int, float]:
    """The row that beside the chosen ones makes the largest volume, and that volume."""
    volumes = [_volume(sides_FxM[[*chosen, f]]) for f in range(len(sides_FxM))]
    return int(np.argmax(volumes)), max(volumes)
