"""Genotype to merge weights: what the strategy moves in, and what the merge takes.

A genotype z has one value per checkpoint, and z = 0 is the uniform soup under every constraint.
The unit of z is the uniform weight 1/K (for softmax, a factor e), so that one step size suits all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from jaxmerge.errors import JaxmergeError

Weights = Float[np.ndarray, "P K"]


def softmax(z_PxK: Float[np.ndarray, "P K"]) -> Weights:
    """w_k = exp(z_k) / sum_j exp(z_j): positive, sums to one."""
    grown = np.exp(z_PxK - z_PxK.max(axis=1, keepdims=True))
    return grown / grown.sum(axis=1, keepdims=True)


def absolute(z_PxK: Float[np.ndarray, "P K"]) -> Weights:
    """w_k = |1 + z_k| / sum_j |1 + z_j|: not negative, sums to one."""
    size = np.abs(1 + z_PxK)
    total = size.sum(axis=1, keepdims=True)
    return np.where(total > 0, size / np.where(total > 0, total, 1), 1 / z_PxK.shape[1])


def signed(z_PxK: Float[np.ndarray, "P K"]) -> Weights:
    """w_k = (1 + z_k - mean_j z_j) / K: sums to one, negative weights allowed."""
    return (1 + z_PxK - z_PxK.mean(axis=1, keepdims=True)) / z_PxK.shape[1]


def free(z_PxK: Float[np.ndarray, "P K"]) -> Weights:
    """w_k = (1 + z_k) / K: any weights."""
    return (1 + z_PxK) / z_PxK.shape[1]


CONSTRAINTS = {"softmax": softmax, "abs": absolute, "signed": signed, "free": free}


def weights(
    z_PxK: Float[np.ndarray, "P K"],
    constraint: str = "softmax",
    bounds: tuple[float, float] = (-8.0, 8.0),
) -> Weights:
    """Merge weights of a population of genotypes, in float32.

    Args:
        z_PxK: genotypes.
        constraint: a name in `CONSTRAINTS`.
        bounds: each z_k is first clipped to [low, high].
    """
    check(constraint, bounds)
    clipped = np.clip(np.asarray(z_PxK, np.float64), *bounds)
    return CONSTRAINTS[constraint](clipped).astype(np.float32)


def spread(
    weights_PxM: Float[np.ndarray, "P M"], chosen: Sequence[int], checkpoints: int
) -> Weights:
    """Weights of the M chosen checkpoints among all K; those of the others are 0."""
    weights_PxK = np.zeros((len(weights_PxM), checkpoints), np.float32)
    weights_PxK[:, list(chosen)] = weights_PxM
    return weights_PxK


def check(constraint: str, bounds: tuple[float, float]) -> None:
    """Raises `JaxmergeError` unless both can be used."""
    if constraint not in CONSTRAINTS:
        raise JaxmergeError(
            "unknown constraint",
            where="space.constraint",
            expected=", ".join(CONSTRAINTS),
            found=constraint,
        )
    if not bounds[0] < 0 < bounds[1]:
        raise JaxmergeError(
            "the bounds must have 0, the uniform merge, between them",
            where="space.bounds",
            found=str(bounds),
        )
