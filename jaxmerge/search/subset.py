"""An informative subset of a task's examples, chosen by the single checkpoints' scores on them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class Subset(NamedTuple):
    """Examples that stand for all of them.

    Attributes:
        places_n: which examples, in ascending order.
        weights_n: 1 / (probability that the example was chosen): how many examples it stands for.
    """

    places_n: Int[np.ndarray, " n"]
    weights_n: Float[np.ndarray, " n"]


def informative(
    scores_KxN: Float[np.ndarray, "K N"], size: int, rng: np.random.Generator
) -> Subset:
    """Draws examples with probabilities that grow with how much models differ on them.

    With p_i the mean of the K checkpoints' scores on example i, scaled to 0..1 and smoothed as if
    one more checkpoint had scored 1/2, the probability of example i is proportional to
    sqrt(p_i (1 - p_i)): the standard deviation of an answer, which is the allocation of least
    variance (Neyman, Journal of the Royal Statistical Society 97(4), 1934). Where all checkpoints
    agree it is small, and not 0. The draw is systematic in the order of p (Madow, Annals of
    Mathematical Statistics 20(3), 1949), so that easy and hard examples are there in their shares.
    The mean weighted by `weights_n` is then nearly unbiased, whatever model it is of (Hajek's
    ratio estimator).

    Args:
        scores_KxN: finite scores of the single checkpoints.
        size: n, from 1 to N.
        rng: of the draw, and of the order of examples of equal p.
    """
    (K, N), span = scores_KxN.shape, np.ptp(scores_KxN) or 1.0
    shares_N = ((scores_KxN - scores_KxN.min()) / span).mean(axis=0, dtype=np.float64)
    shares_N = (K * shares_N + 0.5) / (K + 1)
    chance_N = _chances(np.sqrt(shares_N * (1 - shares_N)), size)
    mixed_N = rng.permutation(N)
    order_N = mixed_N[np.argsort(shares_N[mixed_N], kind="stable")]
    # One point in each unit interval of the cumulated probabilities; which are at most 1 each, so
    # that no example is hit twice. Their sum is an integer but for rounding.
    ends_N = np.cumsum(chance_N[order_N])
    points_n = (np.arange(size) + rng.uniform()) * (ends_N[-1] / size)
    places_n = np.sort(order_N[np.searchsorted(ends_N, points_n, side="right")])
    return Subset(places_n, 1 / chance_N[places_n])


def _chances(sizes_N: Float[np.ndarray, " N"], size: int) -> Float[np.ndarray, " N"]:
    """min(1, c sizes) with c such that they sum to `size`."""
    certain_N = np.zeros(len(sizes_N), bool)
    while True:
        rest = size - np.count_nonzero(certain_N)
        chance_N = np.where(certain_N, 1.0, rest * sizes_N / (sizes_N[~certain_N].sum() or 1.0))
        if (chance_N <= 1).all():
            return chance_N
        certain_N |= chance_N >= 1
