"""What the first factors of some adapters were: peft takes their product out of the base."""

from __future__ import annotations

import numpy as np


def _principal(weight: np.ndarray, rank: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """PiSSA's start: U_r (U_r^T W), the part of W of its `rank` largest singular values.

    Args:
        weight: W `[output, input]`, in float64.
        rank: of the part.
        scale: not needed: peft divides the first factors by it.

    Returns:
        Two factors of the part, `[output, rank]` and `[rank, input]`.
    """
    import scipy.linalg  # of these adapters alone: a fifth of a second

    wide = weight.shape[0] <= weight.shape[1]
    square = weight @ weight.T if wide else weight.T @ weight
    last = len(square) - 1
    _, vectors = scipy.linalg.eigh(square, subset_by_index=(max(last - rank + 1, 0), last))
    return (vectors, vectors.T @ weight) if wide else (weight @ vectors, vectors.T)


def _triangular(weight: np.ndarray, rank: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """OLoRA's start: s Q_r R_r of W = Q R, in which Q_r spans the first `rank` columns of W.

    Args:
        weight: W `[output, input]`, in float64.
        rank: of the part.
        scale: s, which peft multiplies the first factors with.

    Returns:
        See `_principal`.
    """
    basis, _ = np.linalg.qr(weight[:, :rank])
    return scale * basis, basis.T @ weight


STARTS = {"pissa": _principal, "olora": _triangular}
