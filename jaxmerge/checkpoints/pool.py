"""The pool: K checkpoints of one architecture, restored into their places on the mesh.

The pool is kept as K trees rather than stacked `[K, ...]` leaves: each checkpoint is restored into
the very arrays that the merge reads, nothing is copied to stack it, and the merge of K separate
leaves runs at the memory's speed on every platform measured (docs/decisions/separate-trees.md).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from jaxmerge import sharding
from jaxmerge.checkpoints import digest, mergers
from jaxmerge.checkpoints.digest import LeafDigest, check_digests, fingerprint
from jaxmerge.checkpoints.source import Source
from jaxmerge.checkpoints.survey import READERS
from jaxmerge.checkpoints.unchanged import Unchanged, files_of
from jaxmerge.errors import JaxmergeError, check_choice
from jaxmerge.merge import kinship, linear
from jaxmerge.merge.by_method import ByMethod
from jaxmerge.merge.differences import BITS, QuantisedMerger, quantised
from jaxmerge.merge.groups import Groups
from jaxmerge.merge.leafwise import LeafwiseMerger
from jaxmerge.merge.linear import Merger
from jaxmerge.merge.rematerialised import RematerialisingMerger
from jaxmerge.merge.searched import Searched
from jaxmerge.trees import PyTree, byte_count, named_leaves, parameter_count


@dataclasses.dataclass(frozen=True)
class Record:
    """What `pool.json` says of a checkpoint."""

    name: str
    source: str
    format: str
    bytes: int
    parameters: int
    dtype: str  # of the stored leaves, comma separated where there are several
    fingerprint: str  # of names, shapes, dtypes and values; see digest.fingerprint


class Pool(NamedTuple):
    """K checkpoints, wherever they live.

    Attributes:
        names: of the checkpoints.
        trees: their parameters; on disk, `ShapeDtypeStruct` of them.
        records: what `pool.json` says of them, and at last of the base where a method takes one.
        architecture: of all of them.
        merge: gives the merges of C candidates on the devices, from weights `[C, K]`, or by a
            method from rows of `merge.searched`.
        residency: where they live; see `load`.
        storage: how; see `load`.
        groups: of leaves that share their weights; None: all do.
        base: parameters of the base where a method takes one.
    """

    names: tuple[str, ...]
    trees: tuple[PyTree, ...]
    records: tuple[Record, ...]
    architecture: Mapping[str, Any]
    merge: Merger
    residency: str
    storage: str = "exact"
    groups: Groups | None = None
    base: PyTree | None = None

    @property
    def count(self) -> int:
        """G, the number of groups."""
        return len(self.groups.names) if self.groups else 1

    def traffic(self, since: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Where the pool lives, and what merging it has read, for results.json.

        Args:
            since: an earlier answer; None: the loading of the pool.
        """
        before = since or {"bytes_read": 0, "seconds": 0.0}
        merge = self.merge
        moved = isinstance(merge, LeafwiseMerger)
        read, seconds = (merge.bytes_read, merge.seconds) if moved else (0, 0.0)
        return {
            "kind": self.residency,
            "bytes_read": read - before["bytes_read"],
            "seconds": round(seconds - before["seconds"], 3),
        }

    def kinship(self) -> dict[str, Any]:
        """How alike the checkpoints are, for results.json; {} where leaves are not at hand."""
        if self.residency != "device" or self.storage != "exact":
            return {}
        gram = kinship.products(self.trees, self.base)
        norms, cosines = kinship.norms_and_cosines(gram)
        origin = "base" if self.base is not None else "mean"
        said = {"origin": origin, "norms": norms.tolist(), "cosines": cosines.tolist()}
        return {"kinship": said}

    def stored_error(self, weights_K: Float[np.ndarray, "*G K"]) -> dict[str, Any] | None:
        """How far a merge of what is stored is from that of the exact checkpoints.

        Returns:
            The relative Frobenius norm of the difference, of the worst leaf and in the mean over
            leaves; None where the storage is exact.
        """
        if not isinstance(self.merge, QuantisedMerger):
            return None
        errors = self.merge.errors(weights_K)
        worst = max(errors, key=lambda name: errors[name])
        mean = sum(errors.values()) / len(errors)
        return {"kind": self.storage, "worst": errors[worst], "leaf": worst, "mean": mean}

    def merged(
        self, weights_K: Float[np.ndarray, "*G K"] | Sequence[float]
    ) -> Callable[[str], jax.Array]:
        """One merge, by the names of its leaves; each is made when it is asked for.

        It is of the exact checkpoints, however they are stored.

        Args:
            weights_K: one for each checkpoint; `[G, K]` where groups have their own. Of a method a
                row, see `merge.searched`.
        """
        weights_K = np.asarray(weights_K, np.float32)
        if isinstance(self.merge, ByMethod):
            return functools.partial(self.merge.leaf, row=weights_K)
        groups = self.groups if weights_K.ndim == 2 else None
        exact = self.merge.exact if isinstance(self.merge, QuantisedMerger) else self.merge
        if isinstance(exact, LeafwiseMerger):
            return functools.partial(exact.leaf, weights_K=weights_K)
        leaves = [named_leaves(tree) for tree in self.trees]

        def leaf(name: str) -> jax.Array:
            return linear.linear([{name: each[name]} for each in leaves], weights_K, groups)[name]

        return leaf


def load(
    sources: Sequence[Source],
    mesh: Mesh,
    rules: sharding.Rules,
    *,
    dtype: str = "",
    residency: str = "device",
    storage: str = "exact",
    rematerialise: str = "",
    groups: Groups | None = None,
    method: Searched | None = None,
    layers: str = "",
    on_loaded: Callable[[Record], None] = lambda record: None,
) -> Pool:
    """Restores the checkpoints one after the other, each straight into its shards, and checks them.

    What is merged is the same bit for bit, wherever the pool lives.

    Args:
        sources: from `survey.survey`; at last that of the base, where the method takes one.
        mesh: where the pool lies; need not be the mesh that saved it.
        rules: see `sharding.shardings`.
        dtype: cast floating-point leaves to this; "" keeps each as stored.
        residency: where the pool lives from then on: on the `device`; in the `host`'s memory,
            pinned; or on `disk`, from where each merge takes a leaf of a checkpoint at a time.
        storage: `exact`; or `int8` or `int4`: of all but the first checkpoint the differences from
            it in so many bits, see `merge.differences`. The pool must live on the device.
        rematerialise: the `Model.layers` that are merged when the model comes to them, which takes
            a pool on the device; "": whole models are merged.
        groups: of leaves that share their weights, see `linear.ResidentMerger`.
        method: that candidates are merged by; None: they are weighted sums.
        layers: of the model, whose leaves are stacked, see `Model.layers`; methods want to know.
        on_loaded: called after each checkpoint.

    Raises:
        JaxmergeError: a file is missing or cut short; a checksum differs from the one written with
            the checkpoint; a value is NaN or infinite; leaves that can't be averaged differ.
    """
    where = sharding.shardings(sources[0].abstract, rules, mesh)
    keep = _KEEP[residency]
    trees, records, base = [], [], {}
    first_digests: dict[str, LeafDigest] = {}
    for source in sources:
        if trees and storage != "exact":
            keep = functools.partial(_keep_difference, base, storage)
        tree, found = _restore(source, where, dtype, keep)
        base = base or named_leaves(tree)
        first_digests = first_digests or found
        check_values(source, source.abstract, found, first_digests)
        records.append(record(source, source.abstract, found))
        trees.append(tree)
        on_loaded(records[-1])
    members = len(sources) - bool(method and method.with_base)
    if method:
        merge = mergers.by_method(method, sources, trees, where, residency, groups, layers)
    elif storage != "exact":
        merge, trees = mergers.quantised_merger(sources, trees, where, groups)
    else:
        merge = _exact_merger(sources, trees, where, residency, rematerialise, groups)
    return Pool(
        names=tuple(source.name for source in sources[:members]),
        trees=tuple(trees[:members]),
        records=tuple(records),
        architecture=sources[0].architecture,
        merge=merge,
        residency=residency,
        storage=storage,
        groups=groups,
        base=trees[members] if members < len(sources) else None,
    )


def _exact_merger(
    sources: Sequence[Source],
    trees: Sequence[PyTree],
    where: PyTree,
    residency: str,
    rematerialise: str,
    groups: Groups | None,
) -> Merger:
    if rematerialise:
        return RematerialisingMerger(trees, rematerialise, groups)
    if residency == "device":
        return linear.merger(trees, groups)
    return mergers.leafwise(sources, trees, where, groups)


def check_values(
    source: Source,
    tree: PyTree,
    found: Mapping[str, LeafDigest],
    first: Mapping[str, LeafDigest],
) -> None:
    """Raises `JaxmergeError` unless leaves are sound and can be merged with the first's.

    Args:
        source: the checkpoint.
        tree: its leaves, or their `ShapeDtypeStruct`.
        found: their digests.
        first: digests of the same leaves of the pool's first checkpoint.
    """
    check_digests(source, found)
    not_finite = [name for name, digest in found.items() if not digest.finite]
    if not_finite:
        raise JaxmergeError(
            f"the checkpoint holds NaN or infinite values, in leaf {', '.join(not_finite)}",
            where=source.path,
            expected="finite values; take an earlier checkpoint, or leave this one out",
        )
    for name, leaf in named_leaves(tree).items():
        same = found[name].checksum == first[name].checksum
        if not jnp.issubdtype(leaf.dtype, jnp.floating) and not same:
            raise JaxmergeError(
                f"leaf {name} is not floating point and differs, so it can't be merged",
                where=source.path,
                expected="the same values as in the first checkpoint of the pool",
            )


def record(source: Source, tree: PyTree, found: dict[str, LeafDigest]) -> Record:
    """What `pool.json` says of a checkpoint, from all its leaves as stored and their digests."""
    return Record(
        name=source.name,
        source=source.path,
        format=source.format,
        bytes=byte_count(tree),
        parameters=parameter_count(tree),
        dtype=",".join(sorted({str(leaf.dtype) for leaf in jax.tree.leaves(tree)})),
        fingerprint=fingerprint(tree, found),
    )


def _restore(
    source: Source, where: PyTree, dtype: str, keep: Callable[[str, jax.Array], Any]
) -> tuple[PyTree, dict[str, LeafDigest]]:
    """What is kept of the checkpoint, cast leaf by leaf, and the digests of what was stored.

    A leaf is digested while the next one is read.
    """
    placed = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        source.abstract,
        where,
    )
    computing: dict[str, digest.Computing] = {}

    def digested(name: str, leaf: jax.Array) -> Any:
        computing[name] = digest.start(leaf)
        if not dtype or leaf.dtype == dtype or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return keep(name, leaf)
        # What was stored is given up before the next leaf is read.
        cast, _ = jax.block_until_ready((leaf.astype(dtype), computing[name]))
        return keep(name, cast)

    read = (file for path in (source.path, source.base) if path for file in files_of(path))
    unchanged = Unchanged(read, source.path)
    tree = READERS[source.format].restore(source, placed, digested)
    found = digest.finish(computing)
    unchanged.check()
    return tree, found


def _to_host(_: str, leaf: jax.Array) -> jax.Array:
    pinned = leaf.sharding.with_memory_kind("pinned_host")
    return jax.block_until_ready(jax.device_put(leaf, pinned))


# By residency: what `load` keeps of a leaf.
_KEEP = {
    "device": lambda _, leaf: leaf,
    "host": _to_host,
    "disk": lambda _, leaf: mergers.forgotten(leaf),
}
RESIDENCIES = tuple(_KEEP)
STORAGES = ("exact", *BITS)


def check(residency: str, storage: str) -> None:
    """Raises `JaxmergeError`, which names the field of a config, unless a pool can be so.

    Args:
        residency: see `load`; or `auto`.
        storage: see `load`.
    """
    check_choice("pool.residency", residency, ("auto", *RESIDENCIES))
    check_choice("pool.storage", storage, STORAGES)
    if storage != "exact" and residency != "device":
        raise JaxmergeError(
            "differences in a few bits are merged on the devices",
            where="pool.storage",
            expected='"exact", or pool.residency = "device"',
            found=f"{storage} with pool.residency = {residency}",
        )


def check_rematerialise(residency: str, storage: str) -> None:
    """Raises `JaxmergeError` unless layers of such a pool can be merged late."""
    if storage != "exact":
        raise JaxmergeError(
            "layers are merged late from exact checkpoints only",
            where="merge.rematerialise",
            expected='pool.storage = "exact"',
            found=storage,
        )
    if residency not in ("device", "auto"):
        raise JaxmergeError(
            "layers are merged late from a pool on the device only",
            where="merge.rematerialise",
            expected='pool.residency = "device"',
            found=residency,
        )


def _keep_difference(
    base: Mapping[str, jax.Array], storage: str, name: str, leaf: jax.Array
) -> Any:
    """What the storage keeps of a leaf; the leaf itself is given up before the next is read."""
    return jax.block_until_ready(quantised(leaf, base[name], storage))
