"""The merge of a pool, by where and how its checkpoints are kept."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Float

from jaxmerge.checkpoints.source import Source
from jaxmerge.checkpoints.survey import READERS
from jaxmerge.merge import kinship
from jaxmerge.merge.by_method import ByMethod, CombinationMerger, LeafMerger, every_place
from jaxmerge.merge.differences import QuantisedMerger
from jaxmerge.merge.groups import Groups
from jaxmerge.merge.leafwise import LeafwiseMerger
from jaxmerge.merge.linear import merger
from jaxmerge.merge.searched import Searched
from jaxmerge.trees import PyTree, map_named, named_leaves, pruned


def forgotten(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    """What a leaf is like, and where it lies."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _stored_leaves(tree: PyTree, base: PyTree) -> dict[str, Any]:
    names = list(named_leaves(base))
    return dict(zip(names, jax.tree.structure(base).flatten_up_to(tree)))


def quantised_merger(
    sources: Sequence[Source], trees: Sequence[PyTree], where: PyTree, groups: Groups | None
) -> tuple[QuantisedMerger, list[PyTree]]:
    """The merge of what is stored, and what the checkpoints are like on disk, as the exact ones."""
    others = [_stored_leaves(tree, trees[0]) for tree in trees[1:]]
    alike = [jax.tree.map(forgotten, trees[0])] * len(trees)
    exact = leafwise(sources, alike, where, groups)
    return QuantisedMerger(trees[0], others, exact, groups), alike


def by_method(
    method: Searched,
    sources: Sequence[Source],
    trees: Sequence[PyTree],
    where: PyTree,
    residency: str,
    groups: Groups | None,
    layers: str,
) -> ByMethod:
    """The merge by a method; the base comes first in it, as in `methods.merged`."""
    if method.with_base:
        sources, trees = [sources[-1], *sources[:-1]], [trees[-1], *trees[:-1]]
    places = every_place(trees[0], layers)
    if not method.summed:
        return LeafMerger(method, trees, places, groups)
    if residency == "device":
        named = [named_leaves(tree) for tree in trees]
        inner = merger(trees, places)
        leaves = functools.partial(_leaves_of, named)
    else:
        inner = leafwise(sources, trees, where, places)
        leaves = inner.leaves
    return CombinationMerger(method, inner, leaves, trees[0], places, groups)


def _leaves_of(named: Sequence[Mapping[str, jax.Array]], name: str) -> list[jax.Array]:
    return [each[name] for each in named]


def leafwise(
    sources: Sequence[Source], trees: Sequence[PyTree], where: PyTree, groups: Groups | None
) -> LeafwiseMerger:
    """The merge of trees that are not on the devices."""
    kept = [named_leaves(tree) for tree in trees]
    places = named_leaves(where)

    def read(k: int, name: str) -> jax.Array:
        leaf = kept[k][name]
        if isinstance(leaf, jax.Array):
            return jax.device_put(leaf, places[name])
        return read_leaf(sources[k], name, places[name]).astype(leaf.dtype)

    like = map_named(
        lambda name, leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[name]),
        trees[0],
    )
    return LeafwiseMerger(like, read, len(sources), groups)


def distances(sources: Sequence[Source], base: Source, where: PyTree) -> Float[np.ndarray, " K"]:
    """|theta_k - theta_0|^2 of K checkpoints; two leaves are read at a time.

    Args:
        sources: of the checkpoints.
        base: that of theta_0.
        where: tree of the shardings that leaves are read into.
    """
    found, leaves = np.zeros(len(sources)), named_leaves(base.abstract)
    for name, place in named_leaves(where).items():
        if jnp.issubdtype(leaves[name].dtype, jnp.floating):
            origin = read_leaf(base, name, place)
            for k, source in enumerate(sources):
                found[k] += kinship.square(read_leaf(source, name, place), origin)
    return found


def read_leaf(source: Source, name: str, where: Sharding) -> jax.Array:
    """One leaf of a checkpoint, as stored; see `load` for what is checked of a whole one."""
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        pruned(source.abstract, name.__eq__),
    )
    return named_leaves(READERS[source.format].restore(source, placed))[name]
