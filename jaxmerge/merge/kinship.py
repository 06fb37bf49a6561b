"""How alike checkpoints are: the inner products of their differences, over whole models."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmerge.hosts import processes
from jaxmerge.merge.task_vectors import added
from jaxmerge.trees import PyTree, named_leaves


def products(trees: Sequence[PyTree], base: PyTree | None) -> Float[np.ndarray, "K K"]:
    """<delta_i, delta_j> of K checkpoints, float64 sums over leaves of float32 sums.

    delta_k = theta_k - theta_0, or without a base theta_k - mean_j theta_j. Every leaf is read
    where it lies; on a mesh K x K numbers a leaf are added up over its shards.

    Args:
        trees: of the checkpoints, on the devices.
        base: tree of theta_0; None: there is none.
    """
    leaves, of_base = [named_leaves(tree) for tree in trees], named_leaves(base or {})
    total = np.zeros((len(trees), len(trees)))
    for name, leaf in leaves[0].items():
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            found = _products(tuple(each[name] for each in leaves), of_base.get(name))
            total += processes.fetch(found).astype(np.float64)
    return total


@jax.jit
def _products(leaves: tuple[Array, ...], base: Array | None) -> Float[Array, "K K"]:
    wide = [leaf.astype(jnp.float32) for leaf in leaves]
    origin = added(wide) / len(wide) if base is None else base.astype(jnp.float32)
    deltas = [each - origin for each in wide]
    rows = [
        [jnp.sum(deltas[max(i, j)] * deltas[min(i, j)]) for j in range(len(deltas))]
        for i in range(len(deltas))
    ]
    return jnp.array(rows)


def norms_and_cosines(
    gram: Float[np.ndarray, "K K"],
) -> tuple[Float[np.ndarray, " K"], Float[np.ndarray, "K K"]]:
    """|delta_k|, and <delta_i, delta_j> / (|delta_i| |delta_j|), 0 beside a delta that is 0."""
    norms = np.sqrt(np.diag(gram))
    both = np.outer(norms, norms)
    cosines = np.divide(gram, both, out=np.zeros_like(gram), where=both > 0)
    return norms, np.clip(cosines, -1, 1)
