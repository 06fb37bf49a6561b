"""The pool leaf by leaf: for merges that hold no whole model in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from jaxmerge.checkpoints.digest import LeafDigest, digests
from jaxmerge.checkpoints.pool import FORMATS, Record, check_values, record
from jaxmerge.checkpoints.source import Source
from jaxmerge.trees import PyTree, map_named, named_leaves


class LeafStream:
    """Reads one leaf of every checkpoint at a time, with the checks of `pool.load`.

    Args:
        sources: from `pool.survey`.
        device: where the leaves are put.
        dtype: cast floating-point leaves to this; "" keeps each as stored.

    Attributes:
        abstract: tree of the leaves as `ShapeDtypeStruct`, with the dtype that they are given in.
    """

    def __init__(self, sources: Sequence[Source], device: Any, *, dtype: str = ""):
        self._sources, self._dtype = sources, dtype
        self.abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, self._cast_to(leaf)), sources[0].abstract
        )
        self._sharding = SingleDeviceSharding(device)
        self._digests: list[dict[str, LeafDigest]] = [{} for _ in sources]

    def __call__(self, name: str) -> list[jax.Array]:
        """The leaf of this name, of each checkpoint.

        Raises:
            JaxmergeError: data are missing, damaged or not finite; a leaf that can't be averaged
                differs from that of the first checkpoint.
        """
        leaves = []
        for source, known in zip(self._sources, self._digests):
            leaf = self._read(source, name)
            known |= digests({name: leaf})
            checksums = {each: source.checksums[each] for each in {name} & source.checksums.keys()}
            alone = source._replace(checksums=checksums)
            check_values(alone, {name: leaf}, {name: known[name]}, self._digests[0])
            leaves.append(leaf.astype(self._cast_to(leaf)))
        return leaves

    def records(self) -> tuple[Record, ...]:
        """What `pool.json` says of the checkpoints, after all leaves have been read."""
        return tuple(
            record(source, source.abstract, known)
            for source, known in zip(self._sources, self._digests)
        )

    def _cast_to(self, leaf: Any) -> Any:
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jnp.dtype(self._dtype) if self._dtype and floating else leaf.dtype

    def _read(self, source: Source, name: str) -> jax.Array:
        placed = map_named(
            lambda _, leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._sharding),
            _branch(source.abstract, name.split("/")),
        )
        return named_leaves(FORMATS[source.format].restore(source, placed))[name]


def _branch(tree: PyTree, path: Sequence[str]) -> PyTree:
    """The part of a tree of dicts that leads to one leaf."""
    if not path or not isinstance(tree, Mapping):
        return tree
    return {path[0]: _branch(tree[path[0]], path[1:])}
