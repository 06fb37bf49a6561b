"""Derivatives of something by merge weights, from its derivatives by the merged model.

theta_l = sum_k w_{g(l) k} theta_{l k}, so dS/dw_gk = sum over the leaves l of group g of
<dS/dtheta_l, theta_{l k}>: one backward pass through the model gives all G x K of them, for K inner
products of a gradient with the pool.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmerge.merge.groups import Groups
from jaxmerge.trees import PyTree, named_leaves


def pullback(
    trees: Sequence[PyTree], gradients: PyTree, groups: Groups | None = None
) -> Float[Array, "C G K"]:
    """dS/dw of C candidates, in float32.

    Args:
        trees: K pytrees of arrays, as they were merged.
        gradients: dS/dtheta, leaves `[C, ...]`, where the merged leaves lie.
        groups: of leaves that share their weights; None: all do, and G is 1.
    """
    numbers = tuple(groups.of_leaf.items()) if groups else ()
    return _program(numbers, len(groups.names) if groups else 1)(tuple(trees), gradients)


@functools.lru_cache(maxsize=8)
def _program(numbers: tuple[tuple[str, tuple[int, ...]], ...], groups: int) -> Any:
    of_leaf = dict(numbers)

    def products(trees: tuple[PyTree, ...], gradients: PyTree) -> Array:
        pools = [named_leaves(tree) for tree in trees]
        found = []
        for name, gradient in named_leaves(gradients).items():
            if jnp.issubdtype(pools[0][name].dtype, jnp.floating):
                leaves = [pool[name] for pool in pools]
                found.append(_of_leaf(gradient, leaves, of_leaf.get(name, (0,)), groups))
        return functools.reduce(jnp.add, found)

    return jax.jit(products)


def _of_leaf(
    gradient: Array, leaves: Sequence[Array], numbers: tuple[int, ...], groups: int
) -> Array:
    """<dS/dtheta, theta_k> of one leaf in the rows of its groups, `[C, G, K]`."""
    wide, kept = gradient.astype(jnp.float32), 2 if len(numbers) > 1 else 1
    summed = tuple(range(kept, wide.ndim))
    products = [(wide * leaf.astype(jnp.float32)[None]).sum(summed) for leaf in leaves]
    rows = jnp.stack(products, axis=-1).reshape(len(wide), len(numbers), len(leaves))
    return jnp.zeros((len(wide), groups, len(leaves))).at[:, np.array(numbers)].add(rows)
