"""How alike checkpoints are: the inner products of their differences, over whole models."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmerge.hosts import processes
from jaxmerge.trees import PyTree, named_leaves


def products(trees: Sequence[PyTree], base: PyTree | None) -> Float[np.ndarray, "K K"]:
    """<delta_i, delta_j> of K checkpoints, float64 sums over leaves of float32 sums.

    delta_k = theta_k - theta_0, or without a base theta_k - mean_j theta_j. Two checkpoints are
    read at a time, where they lie, and nothing is copied; on a mesh a number a leaf is added up
    over its shards.

    Args:
        trees: of the checkpoints, on the devices.
        base: tree of theta_0; None: there is none.
    """
    K, leaves = len(trees), [named_leaves(tree) for tree in trees]
    # Differences from the first checkpoint, whose mean is taken away at the end: those from zero
    # would nearly cancel.
    origin = named_leaves(trees[0] if base is None else base)
    gram = np.zeros((K, K))
    for name, leaf in origin.items():
        for i, j in combinations_with_replacement(range(K), 2):
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                found = processes.fetch(_product(leaves[i][name], leaves[j][name], leaf))
                gram[i, j] += float(found)
    gram = np.triu(gram) + np.triu(gram, 1).T
    centred = np.eye(K) - 1 / K
    return gram if base is not None else centred @ gram @ centred


def square(leaf: Array, origin: Array) -> float:
    """|theta_k - theta_0|^2 of one leaf, which every process has a part of."""
    return float(processes.fetch(_product(leaf, leaf, origin)))


@jax.jit
def _product(one: Array, other: Array, origin: Array) -> Float[Array, ""]:
    first, second, origin = (each.astype(jnp.float32) for each in (one, other, origin))
    return jnp.sum((first - origin) * (second - origin))


def norms_and_cosines(
    gram: Float[np.ndarray, "K K"],
) -> tuple[Float[np.ndarray, " K"], Float[np.ndarray, "K K"]]:
    """|delta_k|, and <delta_i, delta_j> / (|delta_i| |delta_j|), 0 beside a delta that is 0."""
    norms = np.sqrt(np.maximum(np.diag(gram), 0))
    both = np.outer(norms, norms)
    cosines = np.divide(gram, both, out=np.zeros_like(gram), where=both > 0)
    return norms, np.clip(cosines, -1, 1)
