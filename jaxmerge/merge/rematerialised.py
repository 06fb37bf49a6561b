"""The linear merge of a model of which no more than a layer is merged at a time.

For pools on the devices where not even one merged model fits besides: the layers of the checkpoints
go through the model's scan, which merges each just before it is used and forgets it, as gradient
checkpointing does with activations (arXiv 1604.06174). It takes a merge for each layer of each pass
through the model, so for each token that is written: a pass reads K checkpoints instead of one.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxmerge.hosts import processes
from jaxmerge.merge.groups import Groups
from jaxmerge.merge.linear import merger, weighted_sum
from jaxmerge.merge.pullback import by_group
from jaxmerge.models.deferred import Deferred
from jaxmerge.trees import PyTree, map_named, named_leaves


class RematerialisingMerger:
    """Merges all of C candidates but their layers, which are `Deferred`.

    Args:
        trees: K trees in memory, on a mesh.
        layers: see `models.model.Model`.
        groups: of leaves that share their weights, see `linear.ResidentMerger`.
    """

    def __init__(
        self, trees: Sequence[Mapping[str, PyTree]], layers: str, groups: Groups | None = None
    ):
        self._others = merger([without(tree, layers) for tree in trees], groups)
        self._stacked, self._name, self._groups = [tree[layers] for tree in trees], layers, groups
        first = jax.tree.leaves(self._stacked[0])[0]
        self._over_pop = NamedSharding(first.sharding.mesh, PartitionSpec("pop"))
        self._L = first.shape[0]

    def __call__(self, weights_CxK: Float[np.ndarray, "C *G K"]) -> PyTree:
        """The merged models, spread over the mesh axis `pop`."""
        weights_CxK = weights_CxK.astype(np.float32)
        if self._groups:
            weights_CxK = self._groups.lifted(weights_CxK)
            each = map_named(lambda name, _: self._by_layer(name, weights_CxK), self._stacked[0])
        else:
            shared = self._by_layer("", weights_CxK)
            each = jax.tree.map(lambda _: shared, self._stacked[0])
        return {**self._others(weights_CxK), self._name: deferred(self._stacked, each)}

    def pullback(
        self, gradients: Mapping[str, PyTree], weights_CxK: Float[np.ndarray, "C *G K"]
    ) -> Float[Array, "C G K"]:
        """See `linear.Merger`; of layers the derivatives are by the weights `[C, L, K]` already."""
        by_others = self._others.pullback(without(gradients, self._name), weights_CxK)
        names = named_leaves(self._stacked[0])
        of_leaf = self._groups.of_leaf if self._groups else {}
        found = {}
        for name, of_layers in zip(names, jax.tree.leaves(gradients[self._name]), strict=True):
            whole = f"{self._name}/{name}"
            by_slice = len(of_leaf.get(whole, (0,))) > 1
            found[whole] = of_layers if by_slice else of_layers.sum(1, keepdims=True)
        return by_others + by_group(found, of_leaf, by_others.shape[1])

    def _by_layer(self, name: str, weights_CxK: np.ndarray) -> Array:
        """Weights of a leaf, `[C, L, K]`."""
        if self._groups:
            weights_CxK = self._groups.weights(f"{self._name}/{name}", weights_CxK)
        if weights_CxK.ndim == 2:
            weights_CxK = np.repeat(weights_CxK[:, None], self._L, axis=1)
        return processes.place(weights_CxK, self._over_pop)


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


@jax.custom_jvp
def _layer(leaves: Sequence[Array], weights_K: Float[Array, " K"]) -> Array:
    """`weighted_sum`, rounded to the leaf's type as when it is stored."""
    total = weighted_sum(leaves, weights_K)
    if not jnp.issubdtype(total.dtype, jnp.floating):
        return total
    # Compilers may leave out a rounding whose result is widened again, but not this one.
    kind = jnp.finfo(total.dtype)
    rounded = jax.lax.reduce_precision(total, exponent_bits=kind.nexp, mantissa_bits=kind.nmant)
    return jax.lax.optimization_barrier(rounded)


def _derivative(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Array, Any]:
    """sum_k dw_k x_k: what `weighted_sum` does for every bit of a sum hides it from JAX."""
    leaves, weights_K = primals
    of_leaves, of_weights_K = tangents
    if not all(map(_zero, jax.tree.leaves(of_leaves, is_leaf=_zero))):
        raise TypeError("a merge has derivatives by its weights alone, not by its checkpoints")
    made = _layer(leaves, weights_K)
    if _zero(of_weights_K) or not jnp.issubdtype(made.dtype, jnp.floating):
        return made, SymbolicZero(jax.typeof(made).to_tangent_aval())
    wide = jnp.promote_types(made.dtype, jnp.float32)
    terms = [of_weights_K[k].astype(wide) * leaf.astype(wide) for k, leaf in enumerate(leaves)]
    return made, functools.reduce(jnp.add, terms).astype(made.dtype)


def _zero(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero)


_layer.defjvp(_derivative, symbolic_zeros=True)
