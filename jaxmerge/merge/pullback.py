"""Derivatives of something by merge weights, from its derivatives by the merged model.

theta_l = sum_k w_{g(l) k} theta_{l k}, so dS/dw_gk = sum over the leaves l of group g of
<dS/dtheta_l, theta_{l k}>: one backward pass through the model gives all G x K of them, for K inner
products of a gradient with the pool. Each merger has a `pullback` of its own, since only it knows
how its pool is stored; all are made of the functions here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmerge.merge.groups import Groups
from jaxmerge.trees import PyTree, named_leaves

# (what is stored of a leaf of a checkpoint, that leaf of the first) -> the leaf
Widen = Callable[[Any, Array], Array]


def _as_it_is(stored: Array, _: Array) -> Array:
    return stored


def pullback(
    pools: Sequence[Mapping[str, Any]],
    gradients: PyTree,
    groups: Groups | None = None,
    widen: Widen = _as_it_is,
) -> Float[Array, "C G K"]:
    """dS/dw of C candidates, in float32.

    Args:
        pools: what is stored of the leaves of K checkpoints, by name.
        gradients: dS/dtheta, leaves `[C, ...]`, where the merged leaves lie; None of those that are
            not floating point.
        groups: of leaves that share their weights; None: all do, and G is 1.
        widen: gives a leaf from what is stored of it.
    """
    of_leaf = tuple(groups.of_leaf.items()) if groups else ()
    G = len(groups.names) if groups else 1
    return _program(widen)(tuple(pools), named_leaves(gradients), of_leaf, G)


def product(gradient: Array, leaf: Array, *, by_slice: bool) -> Float[Array, "C R"]:
    """<dS/dtheta, theta_k> of a leaf, in float32.

    Args:
        gradient: `[C, ...]`.
        leaf: `[...]`.
        by_slice: whether each slice along the leaf's first axis is by itself, and R their number;
            else R is 1.
    """
    wide = gradient.astype(jnp.float32) * leaf.astype(jnp.float32)[None]
    return wide.sum(tuple(range(1 + by_slice, wide.ndim))).reshape(len(gradient), -1)


def by_group(
    products: Mapping[str, Float[Array, "C _ K"]], of_leaf: Mapping[str, tuple[int, ...]], G: int
) -> Float[Array, "C G K"]:
    """The products of all leaves, added up in the rows of their groups; see `Groups.of_leaf`."""
    C, _, K = next(iter(products.values())).shape
    total = jnp.zeros((C, G, K))
    for name, rows in products.items():
        total = total.at[:, np.array(of_leaf.get(name, (0,)))].add(rows)
    return total


@functools.cache
def _program(widen: Widen) -> Any:
    def products(pools: Any, gradients: Mapping[str, Array], of_leaf: Any, G: int) -> Array:
        numbers, found = dict(of_leaf), {}
        for name, gradient in gradients.items():
            by_slice = len(numbers.get(name, (0,))) > 1
            leaves = [widen(pool[name], pools[0][name]) for pool in pools]
            each = [product(gradient, leaf, by_slice=by_slice) for leaf in leaves]
            found[name] = jnp.stack(each, axis=-1)
        return by_group(found, numbers, G)

    return jax.jit(products, static_argnums=(2, 3))
