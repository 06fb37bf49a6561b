"""The linear merge of a model of which no more than a layer is merged at a time.

For pools on the devices where not even one merged model fits besides: the layers of the checkpoints
go through the model's scan, which merges each just before it is used and forgets it, as gradient
checkpointing does with activations (arXiv 1604.06174). It takes a merge for each layer of each pass
through the model, so for each token that is written: a pass reads K checkpoints instead of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxmerge.hosts import processes
from jaxmerge.merge.groups import Groups
from jaxmerge.merge.linear import Merger, merger, weighted_sum
from jaxmerge.models.deferred import Deferred
from jaxmerge.trees import PyTree, map_named


def rematerialising(
    trees: Sequence[Mapping[str, PyTree]], layers: str, groups: Groups | None = None
) -> Merger:
    """Merges all of C candidates but their layers, which are `Deferred`.

    Args:
        trees: K trees in memory, on a mesh.
        layers: see `models.model.Model`.
        groups: of leaves that share their weights, see `linear.ResidentMerger`.
    """
    others = merger([without(tree, layers) for tree in trees], groups)
    stacked = jax.tree.leaves(trees[0][layers])
    mesh, count = stacked[0].sharding.mesh, stacked[0].shape[0]
    over_pop = NamedSharding(mesh, PartitionSpec("pop"))

    def by_layer(name: str, weights_CxK: np.ndarray) -> Array:
        """Weights of a leaf, `[C, L, K]`."""
        if groups:
            weights_CxK = groups.weights(f"{layers}/{name}", weights_CxK)
        if weights_CxK.ndim == 2:
            weights_CxK = np.repeat(weights_CxK[:, None], count, axis=1)
        return processes.place(weights_CxK, over_pop)

    def merged(weights_CxK: Float[np.ndarray, "C *G K"]) -> PyTree:
        weights_CxK = weights_CxK.astype(np.float32)
        if groups:
            weights_CxK = groups.lifted(weights_CxK)
            each = map_named(lambda name, _: by_layer(name, weights_CxK), trees[0][layers])
        else:
            shared = by_layer("", weights_CxK)
            each = jax.tree.map(lambda _: shared, trees[0][layers])
        return {**others(weights_CxK), layers: deferred([tree[layers] for tree in trees], each)}

    return merged


def without(tree: Mapping[str, PyTree], layers: str) -> dict[str, PyTree]:
    """The part of a tree that is merged once."""
    return {name: branch for name, branch in tree.items() if name != layers}


def deferred(stacked: Sequence[PyTree], weights: PyTree) -> PyTree:
    """The layers of K trees as one tree of `Deferred`; arrays, or `ShapeDtypeStruct` of them.

    Args:
        stacked: the layers of each tree.
        weights: a tree like these, of each leaf's weights `[C, L, K]`.
    """
    return jax.tree.map(
        lambda weights, *leaves: Deferred(_layer, leaves, weights), weights, *stacked
    )


def _layer(leaves: Sequence[Array], weights_K: Float[Array, " K"]) -> Array:
    """`weighted_sum`, rounded to the leaf's type as when it is stored."""
    total = weighted_sum(leaves, weights_K)
    if not jnp.issubdtype(total.dtype, jnp.floating):
        return total
    # Compilers may leave out a rounding whose result is widened again, but not this one.
    kind = jnp.finfo(total.dtype)
    rounded = jax.lax.reduce_precision(total, exponent_bits=kind.nexp, mantissa_bits=kind.nmant)
    return jax.lax.optimization_barrier(rounded)
