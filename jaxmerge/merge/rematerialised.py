"""The linear merge of a model of which no more than a layer is merged at a time.

For pools on the devices where not even one merged model fits besides: the layers of the checkpoints
go through the model's scan, which merges each just before it is used and forgets it, as gradient
checkpointing does with activations (arXiv 1604.06174). It takes a merge for each layer of each pass
through the model, so for each token that is written: a pass reads K checkpoints instead of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxmerge.hosts import processes
from jaxmerge.merge.linear import Merger, merger, weighted_sum
from jaxmerge.models.deferred import Deferred
from jaxmerge.trees import PyTree


def rematerialising(trees: Sequence[Mapping[str, PyTree]], layers: str) -> Merger:
    """Merges all of C candidates but their layers, which are `Deferred`.

    Args:
        trees: K trees in memory, on a mesh.
        layers: see `models.model.Model`.
    """
    others = merger([without(tree, layers) for tree in trees])
    stacked = jax.tree.leaves(trees[0][layers])
    mesh, count = stacked[0].sharding.mesh, stacked[0].shape[0]

    def merged(weights_CxK: Float[np.ndarray, "C K"]) -> PyTree:
        of_layers = np.repeat(weights_CxK.astype(np.float32)[:, None], count, axis=1)
        weights_CxLxK = processes.place(of_layers, NamedSharding(mesh, PartitionSpec("pop")))
        return {
            **others(weights_CxK),
            layers: deferred([tree[layers] for tree in trees], weights_CxLxK),
        }

    return merged


def without(tree: Mapping[str, PyTree], layers: str) -> dict[str, PyTree]:
    """The part of a tree that is merged once."""
    return {name: branch for name, branch in tree.items() if name != layers}


def deferred(stacked: Sequence[PyTree], weights: Any) -> PyTree:
    """The layers of K trees as one tree of `Deferred`; arrays, or `ShapeDtypeStruct` of them."""
    return jax.tree.map(lambda *leaves: Deferred(_layer, leaves, weights), *stacked)


def _layer(leaves: Sequence[Array], weights_K: Float[Array, " K"]) -> Array:
    """`weighted_sum`, rounded to the leaf's type as when it is stored."""
    total = weighted_sum(leaves, weights_K)
    if not jnp.issubdtype(total.dtype, jnp.floating):
        return total
    # Compilers may leave out a rounding whose result is widened again, but not this one.
    kind = jnp.finfo(total.dtype)
    rounded = jax.lax.reduce_precision(total, exponent_bits=kind.nexp, mantissa_bits=kind.nmant)
    return jax.lax.optimization_barrier(rounded)
