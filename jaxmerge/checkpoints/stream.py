"""The pool leaf by leaf: for merges that hold no whole model in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float

from jaxmerge.checkpoints.digest import LeafDigest, digests
from jaxmerge.checkpoints.mergers import read_leaf
from jaxmerge.checkpoints.pool import Record, check_values, record
from jaxmerge.checkpoints.source import Source
from jaxmerge.merge.groups import Groups
from jaxmerge.merge.leafwise import LeafwiseMerger
from jaxmerge.sharding import make_mesh


class LeafStream:
    """Reads one leaf of every checkpoint at a time, with the checks of `pool.load`.

    Args:
        sources: from `survey.survey`.
        device: where the leaves are put.
        dtype: cast floating-point leaves to this; "" keeps each as stored.

    Attributes:
        abstract: tree of the leaves as `ShapeDtypeStruct`, with the dtype that they are given in.
        read: whether any leaf has been.
    """

    def __init__(self, sources: Sequence[Source], device: Any, *, dtype: str = ""):
        self._sources, self._dtype = sources, dtype
        self.abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, self.cast_to(leaf)), sources[0].abstract
        )
        self._device = device
        self._sharding = NamedSharding(make_mesh(devices=[device]), PartitionSpec())
        self._placed = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._sharding),
            self.abstract,
        )
        self._digests: list[dict[str, LeafDigest]] = [{} for _ in sources]

    def __call__(self, name: str) -> list[jax.Array]:
        """The leaf of this name, of each checkpoint.

        Raises:
            JaxmergeError: data are missing, damaged or not finite; a leaf that can't be averaged
                differs from that of the first checkpoint.
        """
        return [self.one(k, name) for k in range(len(self._sources))]

    def one(self, k: int, name: str) -> jax.Array:
        """That leaf of one checkpoint."""
        if k and name not in self._digests[0]:
            self.one(0, name)  # with whose the others are compared
        source, known = self._sources[k], self._digests[k]
        leaf = read_leaf(source, name, self._sharding)
        known |= digests({name: leaf})
        checksums = {each: source.checksums[each] for each in {name} & source.checksums.keys()}
        alone = source._replace(checksums=checksums)
        check_values(alone, {name: leaf}, {name: known[name]}, self._digests[0])
        return leaf.astype(self.cast_to(leaf))

    def linear(self, name: str, weights_K: Float[np.ndarray, "*G K"], groups: Groups | None) -> Any:
        """That leaf of the linear merge; one leaf of a checkpoint is in memory beside the sum.

        Args:
            name: of the leaf.
            weights_K: of the checkpoints; with groups `[G, K]`.
            groups: of leaves that share their weights; None: all do.
        """
        merged = LeafwiseMerger(self._placed, self.one, len(self._sources), groups).leaf(
            name, np.asarray(weights_K, np.float32)
        )
        for k in range(len(self._sources)):  # those of weight 0 are checked and recorded too
            if name not in self._digests[k]:
                self.one(k, name)
        return jax.device_put(merged, self._device)

    def checksums(self, names: Iterable[str]) -> list[dict[str, str]]:
        """Of leaves that have been read, of each checkpoint."""
        names = [*names]
        return [{name: known[name].checksum for name in names} for known in self._digests]

    def known(self, checksums: Sequence[Mapping[str, str]]) -> None:
        """Leaves that need not be read: these were sound, as an earlier call found."""
        for known, found in zip(self._digests, checksums):
            known |= {name: LeafDigest(each, True) for name, each in found.items()}

    @property
    def read(self) -> bool:
        return any(self._digests)

    def records(self) -> tuple[Record, ...]:
        """What `pool.json` says of the checkpoints, after all leaves have been read."""
        return tuple(
            record(source, source.abstract, known)
            for source, known in zip(self._sources, self._digests)
        )

    def cast_to(self, leaf: Any) -> Any:
        """The dtype that a leaf is given in."""
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jnp.dtype(self._dtype) if self._dtype and floating else leaf.dtype
