"""The linear merge of a pool that is stored as one checkpoint and differences in 8 or 4 bits.

The first checkpoint is the base and stays exact. Of the others the difference from it is kept,
rounded to whole multiples of a scale that each block of neighbours along the last axis has of its
own: x_k - x_0 ~ scale_kb q_k. A merge is sum_k w_k x_k ~ (sum_k w_k) x_0 + sum_{k>0} w_k scale_kb
q_k, in one pass over what is stored.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxmerge.hosts import processes
from jaxmerge.merge.groups import Groups
from jaxmerge.merge.leafwise import LeafwiseMerger
from jaxmerge.merge.linear import of_population, over, product, rows_at_a_time, weighted_sum
from jaxmerge.merge.pullback import pullback
from jaxmerge.trees import PyTree, map_named, named_leaves

BITS = {"int8": 8, "int4": 4}  # by the name of the storage
_MOST, _LEAST = 64, 16  # values of a block; shorter ones would be mostly scales


class Difference(NamedTuple):
    """A leaf's difference from the base's.

    Attributes:
        values: int8; or uint8 with two values of 4 bits, those of a block's first half in the lower
            bits and those of its second half in the upper ones.
        scales: of the blocks, float32.
    """

    values: Any
    scales: Any


Stored = Array | Difference


def block_size(like: Any) -> int:
    """Values of a block: the most that divide a shard's last axis; 0: the leaf is kept exact.

    Args:
        like: array or `ShapeDtypeStruct`, with a sharding or without.
    """
    floating = jnp.issubdtype(like.dtype, jnp.floating)
    sharding = getattr(like, "sharding", None)
    shape = sharding.shard_shape(like.shape) if sharding else like.shape
    if not floating or not shape:
        return 0
    block = int(np.gcd(shape[-1], _MOST))
    return block if block >= _LEAST else 0


def stored_bytes(like: Any, checkpoints: int, storage: str) -> int:
    """Bytes that a leaf of K checkpoints takes on a device; `storage`: see `BITS`, or `exact`."""
    sharding = getattr(like, "sharding", None)
    size = int(np.prod(sharding.shard_shape(like.shape) if sharding else like.shape))
    whole, block = size * like.dtype.itemsize, block_size(like)
    if storage == "exact" or not block:
        return checkpoints * whole
    return whole + (checkpoints - 1) * (size * BITS[storage] // 8 + size // block * 4)


def quantised(leaf: Array, base: Array, storage: str) -> Stored:
    """What is kept of a leaf of a checkpoint that is not the base; see `block_size`."""
    block = block_size(base)
    return _quantise(BITS[storage], block, leaf, base) if block else leaf


@functools.partial(jax.jit, static_argnums=(0, 1))
def _quantise(bits: int, block: int, leaf: Array, base: Array) -> Difference:
    most = 2 ** (bits - 1) - 1
    blocks = (leaf.astype(jnp.float32) - base.astype(jnp.float32)).reshape(
        *leaf.shape[:-1], -1, block
    )
    scales = jnp.max(jnp.abs(blocks), axis=-1) / most
    values = jnp.round(blocks / jnp.where(scales == 0, 1, scales)[..., None])
    values = jnp.clip(values, -most, most).astype(jnp.int8)
    if bits == 4:
        low, high = values[..., : block // 2], values[..., block // 2 :]
        values = (low.astype(jnp.uint8) & 15) | (high.astype(jnp.uint8) << 4)
    return Difference(values.reshape(*leaf.shape[:-1], -1), scales)


def dequantised(difference: Difference) -> Array:
    """scale_b q, in float32."""
    values, scales = difference
    blocks = values.reshape(*scales.shape, -1)
    if values.dtype == jnp.uint8:
        signed = jax.lax.bitcast_convert_type(blocks, jnp.int8)
        blocks = jnp.concatenate([jnp.left_shift(signed, 4) >> 4, signed >> 4], axis=-1)
    wide = blocks.astype(jnp.float32) * scales[..., None]
    return wide.reshape(*scales.shape[:-1], -1)


def stored_sum(base: Array, others: Sequence[Stored], weights_K: Float[Array, "*L K"]) -> Array:
    """(sum_k w_k) x_0 + sum_{k>0} w_k scale_kb q_k, in float32 (or wider) and rounded once.

    Every product and every sum is rounded, in the order of the checkpoints, as in `weighted_sum`.
    Weights that sum to 1 take the base as it is, and a weight of 0 leaves its checkpoint out: so
    the base alone is exact bit for bit.
    """
    differences = [other for other in others if isinstance(other, Difference)]
    if not differences:
        return weighted_sum([base, *(x for x in others if isinstance(x, jax.Array))], weights_K)
    wide = jnp.promote_types(base.dtype, jnp.float32)
    weights = [over(weight, base) for weight in jnp.moveaxis(weights_K.astype(wide), -1, 0)]
    whole = functools.reduce(jnp.add, weights)
    value = base.astype(wide)
    total = jnp.where(whole == 1, value, product(whole, value))
    for weight, other in zip(weights[1:], differences):
        term = product(weight, dequantised(other).astype(wide))
        total = jnp.where(weight == 0, total, total + term)
    return total.astype(base.dtype)


class QuantisedMerger:
    """The merge of C candidates of a pool that is stored so; `linear.Merger`.

    Args:
        base: the first checkpoint, a tree of arrays on the devices.
        others: for each other checkpoint what is kept of its leaves, by name; see `quantised`.
        exact: the merge of the exact checkpoints.
        groups: of leaves that share their weights, see `linear.ResidentMerger`.

    Attributes:
        exact: see above.
    """

    def __init__(
        self,
        base: PyTree,
        others: Sequence[Mapping[str, Stored]],
        exact: LeafwiseMerger,
        groups: Groups | None = None,
    ):
        self._like, self._base, self._groups = base, named_leaves(base), groups
        self._others, self.exact = tuple(map(dict, others)), exact
        self.program = program(self._base, self._others, groups)

    @property
    def stored(self) -> tuple[dict[str, Array], tuple[dict[str, Stored], ...]]:
        """The base's leaves, and what is kept of the others': the program's arguments."""
        return self._base, self._others

    def __call__(self, weights_CxK: Float[np.ndarray, "C *G K"]) -> PyTree:
        """The merged models, `[C, ...]` spread over the mesh axis `pop`."""
        if self._groups:
            weights_CxK = self._groups.lifted(weights_CxK)
        weights = jnp.asarray(weights_CxK, jnp.float32)
        sharding = next(iter(self._base.values())).sharding
        if isinstance(sharding, NamedSharding):
            over_pop = NamedSharding(sharding.mesh, PartitionSpec("pop"))
            weights = processes.place(np.asarray(weights_CxK, np.float32), over_pop)
        merged = self.program(*self.stored, weights)
        return map_named(lambda name, _: merged[name], self._like)

    def pullback(self, gradients: PyTree, _: Float[np.ndarray, "C *G K"]) -> Float[Array, "C G K"]:
        """See `linear.Merger`; of what is stored."""
        return pullback([self._base, *self._others], gradients, self._groups, _leaf)

    def errors(self, weights_K: Float[np.ndarray, "*G K"]) -> dict[str, float]:
        """How far a merge is from that of the exact checkpoints, ||m - e|| / ||e||, by leaf."""
        sharding = next(iter(self._base.values())).sharding
        rows = sharding.mesh.shape["pop"] if isinstance(sharding, NamedSharding) else 1
        weights_CxK = np.repeat(weights_K[None], rows, axis=0)
        if self._groups:
            weights_CxK = self._groups.lifted(weights_CxK)
        merged = self.program(*self.stored, weights_CxK)
        return {
            name: float(_distance(leaf, self.exact.leaf(name, weights_K)))
            for name, leaf in merged.items()
            if jnp.issubdtype(leaf.dtype, jnp.floating)
        }


def _leaf(stored: Stored, base: Array) -> Array:
    """The leaf that is stored so, in float32."""
    if not isinstance(stored, Difference):
        return stored
    return base.astype(jnp.float32) + dequantised(stored)


@jax.jit
def _distance(merged_C: Array, exact: Array) -> Array:
    exact = exact.astype(jnp.float32)
    error, norm = (jnp.sqrt(jnp.sum(x**2)) for x in (merged_C[0] - exact, exact))
    return jnp.where(error == 0, 0, error / norm)


def abstract(like: PyTree, checkpoints: int, storage: str) -> tuple[dict[str, Any], Any]:
    """The arguments of `program` as `ShapeDtypeStruct`, for a pool that lies where `like` does."""

    def kept(leaf: Any) -> Any:
        block = block_size(leaf)
        if not block:
            return leaf
        *rest, last = leaf.shape
        per_byte = 8 // BITS[storage]
        values, scales = (
            jax.ShapeDtypeStruct((*rest, size), dtype, sharding=leaf.sharding)
            for size, dtype in (
                (last // per_byte, jnp.int8 if per_byte == 1 else jnp.uint8),
                (last // block, jnp.float32),
            )
        )
        return Difference(values, scales)

    base = named_leaves(like)
    other = {name: kept(leaf) for name, leaf in base.items()}
    return base, (other,) * (checkpoints - 1)


def program(
    base: Mapping[str, Any], others: Sequence[Mapping[str, Any]], groups: Groups | None = None
) -> Any:
    """The compiled merge `(base, others, weights_CxK) -> leaves [C, ...] by name`.

    Args:
        base: leaves of the first checkpoint, or what they are like, by name.
        others: what is kept of those of the others.
        groups: of leaves that share their weights, which are then `[C, G, K]`; None: all do.
    """

    placed = {name: leaf.sharding for name, leaf in base.items()}
    meshes = [each.mesh for each in placed.values() if isinstance(each, NamedSharding)]

    def of_leaf(stored: tuple[Array, list[Stored]], weights_K: Array) -> Array:
        return stored_sum(*stored, weights_K)

    def merge(base: Any, others: Any, weights: Mapping[str, Array]) -> dict[str, Array]:
        merged = {}
        for name, leaf in base.items():
            kept = [other[name] for other in others]
            differs = any(isinstance(each, Difference) for each in kept)
            mesh = meshes[0] if meshes and differs else None
            shape = leaf.shape if weights[name].ndim == 2 else leaf.shape[1:]
            rows = rows_at_a_time(shape, 1 + len(kept), mesh)
            merged[name] = of_population(of_leaf, (leaf, kept), weights[name], rows)
        return merged

    def of_leaves(weights_CxK: Array) -> dict[str, Array]:
        return {name: groups.weights(name, weights_CxK) if groups else weights_CxK for name in base}

    if not meshes:
        return jax.jit(lambda base, others, weights: merge(base, others, of_leaves(weights)))
    # Blocks lie within shards, so that every shard is made of the same shards of what is stored.
    specs = {name: each.spec for name, each in placed.items() if isinstance(each, NamedSharding)}
    of_others = tuple(
        {name: jax.tree.map(lambda _, name=name: specs[name], kept) for name, kept in other.items()}
        for other in others
    )
    out = {name: PartitionSpec("pop", *spec) for name, spec in specs.items()}

    def merge_shards(base: Any, others: Any, weights_CxK: Array) -> dict[str, Array]:
        weights = of_leaves(weights_CxK)
        of_weights = {
            name: PartitionSpec("pop", *(specs[name][:1] if each.ndim == 3 else ()))
            for name, each in weights.items()
        }
        in_specs = (specs, of_others, of_weights)
        local = jax.shard_map(merge, mesh=meshes[0], in_specs=in_specs, out_specs=out)
        return local(base, others, weights)

    return jax.jit(merge_shards)
