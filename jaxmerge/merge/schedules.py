"""Weights of the steps of one run: what a decay of the learning rate would have made of them.

A run at a constant learning rate is merged instead of annealed: WSM (arXiv 2507.17634), and the
plain mean of PMA (arXiv 2505.12082).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float

from jaxmerge.errors import JaxmergeError, check_choice

# The exponent p of each decay curve, see `weights`. The mean is the linear curve.
SCHEDULES = {"mean": 1.0, "linear": 1.0, "sqrt": 0.5}


def check(schedule: str, weights: Any, weights_file: str) -> None:
    """Raises `JaxmergeError`, which names the field of a config, unless a schedule can be used.

    Args:
        schedule: `merge.schedule`; `weights` and `weights_file` likewise.
    """
    check_choice("merge.schedule", schedule, ("", *SCHEDULES))
    if schedule and (weights or weights_file):
        raise JaxmergeError(
            "a schedule says what the weights are",
            where="merge.weights" if weights else "merge.weights_file",
            expected="one of them alone: merge.schedule, merge.weights or merge.weights_file",
            found=str(weights or weights_file),
        )


def schedule_weights(schedule: str, checkpoints: int) -> Float[np.ndarray, " K"]:
    """The weights of a schedule, of the oldest checkpoint first; float64, they sum to 1.

    The learning rate is to have fallen over the window along f(x) = 1 - x^p, from f(0) = 1 to
    f(1) = 0. Then what was learned between checkpoints i - 1 and i counts d_i = f(i / K), and

        w_0 = 1 - d_1,  w_i = d_i - d_{i+1} for 0 < i < K - 1,  w_{K-1} = d_{K-1}

    (WSM, arXiv 2507.17634, theorem on gradient decay coefficients), which is
    w_i = ((i + 1) / K)^p - (i / K)^p. `linear` has p = 1, where all weights are 1 / K: it is the
    `mean` (PMA, arXiv 2505.12082). `sqrt` has p = 1/2, whose weights fall from the oldest on.

    Args:
        schedule: a name in `SCHEDULES`.
        checkpoints: K.
    """
    return window(np.float64(checkpoints), np.float64(SCHEDULES[schedule]), checkpoints)


def window(length: Any, exponent: Any, checkpoints: int) -> Any:
    """The weights of a decay along f(x) = 1 - x^p over a window that ends at the newest checkpoint.

    w_i = v_{i+1}^p - v_i^p, with v_0 = 0 and v_j = clip(1 - (K - j) / n, 0, 1). Where n is a whole
    number these are the weights of `schedule_weights` over the newest n; between they go over
    into each other, and are differentiable in n and p. With n up to 1 the newest has all the
    weight. With n above K the window began before the pool: the oldest stands for what is missing.

    Args:
        length: n > 0, in checkpoints; `[...]` of NumPy or of JAX.
        exponent: p > 0; `[...]`.
        checkpoints: K.

    Returns:
        `[..., K]`, of the oldest checkpoint first; not negative, they sum to 1.
    """
    xp = length.__array_namespace__() if hasattr(length, "__array_namespace__") else np
    newer = xp.arange(checkpoints - 1, -1, -1, dtype=length.dtype)  # than each, so many
    newer = newer.reshape((1,) * length.ndim + (-1,))
    seen = xp.clip(1 - newer / length[..., None], 0, 1)
    inside = seen > 0
    powers = xp.exp(exponent[..., None] * xp.log(xp.where(inside, seen, 1)))
    grown = xp.where(inside, powers, 0)
    before = xp.concat([xp.zeros_like(grown[..., :1]), grown[..., :-1]], axis=-1)
    return grown - before
