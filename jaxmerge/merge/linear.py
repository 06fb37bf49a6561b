"""The linear merge: theta = sum_k w_k theta_k.

Soups (arXiv 2203.05482), weighted averages and every search of jaxmerge are this one sum. It is
written per leaf and lifted once: over the leaves of a tree, over a population of candidates, and
over the shards of a mesh. Leaves may have weights of their own: see `merge.groups`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxmerge.errors import JaxmergeError
from jaxmerge.hosts import processes
from jaxmerge.merge.groups import Groups
from jaxmerge.merge.pullback import pullback
from jaxmerge.trees import PyTree, named_leaves


def weighted_sum(
    leaves: Sequence[Array], weights_K: Float[Array, "*L K"], *, dense: bool = False
) -> Array:
    """sum_k w_k x_k for one leaf, accumulated in float32 (or wider) and rounded once, to nearest.

    The terms are added in the order of the leaves, and each product and each sum is rounded, as
    NumPy does it: all platforms and all ways to compile this agree on every bit.
    A weight of exactly 0 leaves its checkpoint out, NaN and all, and a single weight of 1 copies
    its checkpoint: arithmetic would turn subnormal values into 0 on most devices. So one-hot
    weights return x_k bit for bit.
    Leaves that are not floating point are copied from the first checkpoint.

    Args:
        leaves: of K checkpoints.
        weights_K: one for each; `[L, K]` where each of L slices along the first axis has its own.
        dense: whether it is known that there are several weights and none of them is 0: then the
            compiled program need not provide for the others.
    """
    dtype = leaves[0].dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        return leaves[0]
    wide = jnp.promote_types(dtype, jnp.float32)
    alone = over(jnp.sum(weights_K != 0, axis=-1) == 1, leaves[0])
    total = jnp.array(ZERO, wide)
    for leaf, weight in zip(leaves, jnp.moveaxis(weights_K.astype(wide), -1, 0)):
        value, weight = leaf.astype(wide), over(weight, leaf)
        total = total + product(weight, value) if dense else plus(total, value, weight, alone)
    return total.astype(dtype)


def over(weight: Array, leaf: Array) -> Array:
    """A scalar as it is; `[L]` with as many axes as the leaf, so that it goes along the first."""
    return weight.reshape(-1, *(1 for _ in leaf.shape[1:])) if weight.ndim else weight


_ON_CHIP = 2**23  # bytes of K leaves in float32 that a TPU's vector memory has room for
_TILE = 32  # rows that lie together on a TPU, at most: those of one-byte types

ZERO = -0.0  # what sums start from: +0.0 is not neutral, since -0.0 + 0.0 = 0.0


def plus(total: Array, value: Array, weight: Array, alone: Array) -> Array:
    """The sum with one more checkpoint's term; see `weighted_sum`.

    Args:
        total: the sum so far, from `ZERO` on; float32 or wider.
        value: the checkpoint's leaf, of the same dtype.
        weight: scalar; of the same dtype.
        alone: scalar; whether it is the only weight that is not 0.
    """
    added = jnp.where(alone & (weight == 1), value, total + product(weight, value))
    return jnp.where(weight == 0, total, added)


def product(weight: Array, value: Array) -> Array:
    """weight * value, rounded by itself.

    Compilers like to make one fused operation of a product and the sum that it goes into, and of
    two products that are added they choose which. Integer arithmetic in between keeps them apart.
    """
    bits = {4: jnp.uint32, 8: jnp.uint64}[value.dtype.itemsize]
    zero = (weight != weight).astype(bits)  # but for NaN, which no compiler can leave out
    product = jax.lax.bitcast_convert_type(weight * value, bits)
    return jax.lax.bitcast_convert_type(product + zero, value.dtype)


def of_population(
    merge: Callable[[Any, Array], Array],
    stored: PyTree,
    weights_PxK: Float[Array, "P *L K"],
    rows: int = 0,
    spare: Array | None = None,
) -> Array:
    """`merge(stored, weights_K)` for P weight vectors, `[P, ...]`.

    Args:
        merge: the merge of a leaf for one candidate.
        stored: what it is made of: arrays with the axes of the leaf, the last of any size; the
            first array is like what is made.
        weights_PxK: of the candidates; `[P, L, K]` where slices of the leaf have weights of their
            own.
        rows: of the leaf, axes but the last taken as one, that are merged at a time; 0: all. Where
            slices have weights of their own, a number that divides the rows of a slice.
        spare: an array like the result that may be written over.
    """
    of_candidates = jax.vmap(merge, in_axes=(None, 0))
    if not rows:
        return of_candidates(stored, weights_PxK)
    *axes, D = jax.tree.leaves(stored)[0].shape
    P, R = len(weights_PxK), math.prod(axes)
    stored = jax.tree.map(lambda each: each.reshape(R, each.shape[-1]), stored)
    if spare is None:
        # Of a row and of weights rather than zeros: it varies over the axes of the mesh that the
        # result varies over. Not a merged row: a TPU tiles a whole 8-bit array anew to cut a row.
        first = jax.tree.leaves(stored)[0][:1]
        row = (weights_PxK.reshape(P, -1)[:, :1, None] * first[None]).astype(first.dtype)
        spare = jnp.broadcast_to(row, (P, R, D))

    def some_rows(i: Array, merged_PxRxD: Array) -> Array:
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=i * rows, slice_size=rows)
        these_PxK = weights_PxK
        if weights_PxK.ndim == 3:
            slice_of = i * rows // (R // weights_PxK.shape[1])
            these_PxK = jax.lax.dynamic_index_in_dim(weights_PxK, slice_of, 1, keepdims=False)
        made = of_candidates(jax.tree.map(cut, stored), these_PxK)
        return jax.lax.dynamic_update_slice_in_dim(merged_PxRxD, made, i * rows, axis=1)

    merged_PxRxD = spare.reshape(P, R, D)
    merged_PxRxD = jax.lax.fori_loop(0, R // rows, some_rows, merged_PxRxD)
    return merged_PxRxD.reshape(P, *axes, D)


def rows_at_a_time(
    shape: tuple[int, ...], checkpoints: int, mesh: Mesh | AbstractMesh | None
) -> int:
    """How many rows of a leaf `of_population` had best merge at a time; 0: all of them.

    On a TPU, XLA converts all K leaves to float32 before it merges several candidates of them, and
    writes that to memory. Of a few rows it stays in the chip's vector memory.

    Args:
        shape: of a shard of the leaf.
        checkpoints: K.
        mesh: where it lies.
    """
    on_tpu = isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "tpu"
    # Axes before the last two can be taken as one without moving anything.
    if not on_tpu or len(shape) < 2 or shape[-2] % _TILE:
        return 0
    rows = math.prod(shape[:-1])
    most = _ON_CHIP // (4 * checkpoints * shape[-1])
    if rows <= most:
        return 0
    fitting = (each for each in range(most // _TILE * _TILE, _TILE, -_TILE) if rows % each == 0)
    return next(fitting, _TILE)


def linear(
    trees: Sequence[PyTree],
    weights: Float[Array | np.ndarray, "*P K"] | Sequence[float],
    groups: Groups | None = None,
) -> PyTree:
    """The linear merge of K trees that are alike, on the devices where they lie.

    Args:
        trees: K pytrees of arrays with the same structure, shapes, dtypes and shardings.
        weights: `[K]`, or `[P, K]` for a population; with groups `[G, K]`, or `[P, G, K]`.
        groups: of leaves that share their weights; None: all do.

    Returns:
        A tree like the others; for a population every leaf has a leading axis P, spread over the
        mesh axis `pop` when the leaves lie on a mesh that has one.

    Raises:
        JaxmergeError: the number of weights is not the number of trees, or leaves that are not
            floating point differ.

    >>> linear([{"x": jnp.zeros(2)}, {"x": jnp.ones(2)}], jnp.array([0.25, 0.75]))["x"]
    Array([0.75, 0.75], dtype=float32)
    """
    weights = jnp.asarray(weights)
    one = (len(groups.names), len(trees)) if groups else (len(trees),)
    if weights.ndim not in (len(one), len(one) + 1) or weights.shape[-len(one) :] != one:
        raise JaxmergeError(
            "a linear merge takes one weight per checkpoint",
            where="weights",
            expected=f"shape {one} or (P, {', '.join(map(str, one))})",
            found=str(weights.shape),
        )
    placed = tuple(jax.tree.map(jnp.asarray, tree) for tree in trees)
    check_equal_integers([named_leaves(tree) for tree in placed])
    return program(placed[0], population=weights.ndim > len(one), groups=groups)(placed, weights)


def check_equal_integers(trees: Sequence[dict[str, Array]]) -> None:
    """Raises `JaxmergeError` unless leaves that can't be averaged are the same in all trees."""
    for name, leaf in trees[0].items():
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        for k, tree in enumerate(trees[1:], start=1):
            if not np.array_equal(leaf, tree[name]):
                raise JaxmergeError(
                    "a leaf that is not floating point differs, so it can't be merged",
                    where=name,
                    expected="the same values in every checkpoint",
                    found=f"{leaf.dtype} values that differ between checkpoints 0 and {k}",
                )


@runtime_checkable
class Merger(Protocol):
    """The merge of C candidates of a pool, wherever it lives, and its derivatives."""

    def __call__(self, weights_CxK: Float[np.ndarray, "C *G K"], /) -> PyTree:
        """Weights `[C, K]`, or with groups `[C, G, K]`, to leaves `[C, ...]`."""
        ...

    def pullback(
        self, gradients: PyTree, weights_CxK: Float[np.ndarray, "C *G K"], /
    ) -> Float[Array | np.ndarray, "C G K"]:
        """Derivatives by these weights, from those by the leaves; see `merge.pullback`."""
        ...


class ResidentMerger:
    """The merge of K trees in memory.

    Args:
        trees: K pytrees of arrays, as in `linear`.
        groups: of leaves that share their weights, which are then `[C, G, K]`, or `[C, K]` where
            all groups have the same; None: all leaves do.
    """

    def __init__(self, trees: Sequence[PyTree], groups: Groups | None = None):
        self._trees, self._spare, self._started = tuple(trees), None, False
        self._groups = groups
        self._sharding = jax.tree.leaves(trees[0])[0].sharding

    def __call__(self, weights_CxK: Float[np.ndarray, "C *G K"]) -> PyTree:
        """The merged models, spread over the mesh axis `pop` where there is one."""
        weights_CxK = weights_CxK.astype(np.float32)
        if self._groups:
            weights_CxK = self._groups.lifted(weights_CxK)
        if isinstance(self._sharding, NamedSharding):
            mesh = self._sharding.mesh
            over_pop = PartitionSpec("pop" if "pop" in mesh.axis_names else None)
            weights = processes.place(weights_CxK, NamedSharding(mesh, over_pop))
        else:
            weights = jnp.asarray(weights_CxK)
        spare, self._spare = self._spare, None
        if not self._started:
            # Something to write over too: nothing is to be compiled after the first merge.
            spare, self._started = _zeros(self._trees[0], len(weights_CxK)), True
        if spare is None or len(jax.tree.leaves(spare)[0]) != len(weights_CxK):
            return self._program(into=False)(self._trees, weights)
        return self._program(into=True)(self._trees, weights, spare)

    def pullback(self, gradients: PyTree, _: Float[np.ndarray, "C *G K"]) -> Float[Array, "C G K"]:
        """See `Merger`; they are the same at all weights."""
        return pullback(self._named, gradients, self._groups)

    @functools.cached_property
    def _named(self) -> list[dict[str, Array]]:
        return [named_leaves(tree) for tree in self._trees]

    def _program(self, *, into: bool) -> Callable[..., PyTree]:
        return program(self._trees[0], population=True, into=into, groups=self._groups)

    def give_back(self, merged: PyTree) -> None:
        """Lets the next merge write over models that an earlier one made.

        Programs that read them may still be on their way: JAX has the merge wait for those. New
        memory would have to be faulted in page by page, which takes as long as the merge.
        """
        self._spare = merged


def _zeros(like: PyTree, count: int) -> PyTree:
    """A leading axis of `count` on leaves that lie where those of `like` do."""

    def lifted(sharding: Any) -> Any:
        if not isinstance(sharding, NamedSharding):
            return sharding
        axis = "pop" if "pop" in sharding.mesh.axis_names else None
        return NamedSharding(sharding.mesh, PartitionSpec(axis, *sharding.spec))

    def make() -> PyTree:
        return jax.tree.map(lambda leaf: jnp.zeros((count, *leaf.shape), leaf.dtype), like)

    return jax.jit(make, out_shardings=jax.tree.map(lambda leaf: lifted(leaf.sharding), like))()


def merger(trees: Sequence[PyTree], groups: Groups | None = None) -> ResidentMerger:
    """The merge of C candidates of K trees in memory; see `ResidentMerger`."""
    return ResidentMerger(trees, groups)


def program(
    like: PyTree, *, population: bool, into: bool = False, groups: Groups | None = None
) -> Callable[..., PyTree]:
    """The compiled merge `(K trees, weights) -> tree` for trees that lie where `like` does.

    Args:
        like: a tree of arrays, or of `ShapeDtypeStruct` with shardings.
        population: whether weights are `[P, K]` rather than `[K]`.
        into: whether there is a third argument, a tree that an earlier call returned; its memory
            becomes that of the result.
        groups: of leaves that share their weights, which are then `[P, G, K]` or `[G, K]`.
    """
    leaves, structure = jax.tree.flatten(like)
    placed = [leaf.sharding for leaf in leaves if isinstance(leaf.sharding, NamedSharding)]
    numbers = tuple(groups.of_leaf[name] for name in named_leaves(like)) if groups else ()
    if len(placed) < len(leaves):
        return _program(None, structure, (), numbers, population, into)
    specs = tuple(sharding.spec for sharding in placed)
    return _program(placed[0].mesh, structure, specs, numbers, population, into)


@functools.cache
def _program(
    mesh: Mesh | None,
    structure: Any,
    specs: tuple[PartitionSpec, ...],
    numbers: tuple[tuple[int, ...], ...],
    population: bool,
    into: bool,
) -> Callable[..., PyTree]:
    def of_leaves(weights: Array) -> PyTree:
        """Each leaf's weights: `[K]`, or `[L, K]` of a stacked leaf; for a population of each."""
        each = [weights[..., of[0] if len(of) == 1 else np.array(of), :] for of in numbers]
        return structure.unflatten(each or [weights] * structure.num_leaves)

    def merge(trees: tuple[PyTree, ...], weights: PyTree, *old: PyTree) -> PyTree:
        def merged(weights: Array, *leaves: Array) -> Array:
            if not population:
                return weighted_sum(leaves, weights)
            pool, spare = leaves[: len(trees)], leaves[len(trees) :]
            dtype = pool[0].dtype
            converted = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
            several = len(weights) > 1
            shape = pool[0].shape if weights.ndim == 2 else pool[0].shape[1:]
            rows = rows_at_a_time(shape, len(pool), mesh) if converted and several else 0
            return of_population(weighted_sum, pool, weights, rows, *spare)

        return jax.tree.map(merged, weights, *trees, *old)

    if mesh is None:
        return _jitted(lambda trees, weights, *old: merge(trees, of_leaves(weights), *old), into)
    # Every output shard is made of the same shard of each input: said so with shard_map, since the
    # partitioner, left to itself, may move whole leaves between the chips.
    axis = "pop" if "pop" in mesh.axis_names else None
    outer = (axis,) if population else ()
    tree_specs = structure.unflatten(specs)
    out_specs = jax.tree.map(
        lambda spec: PartitionSpec(*outer, *spec),
        tree_specs,
        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
    )

    def merge_shards(trees: tuple[PyTree, ...], weights: Array, *old: PyTree) -> PyTree:
        each = of_leaves(weights)
        # A stacked leaf that is sharded over its layers has its weights sharded alike.
        of_weights = jax.tree.map(
            lambda spec, of: PartitionSpec(*outer, *(spec[:1] if of.ndim > 1 + population else ())),
            tree_specs,
            each,
            is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
        )
        in_specs = ((tree_specs,) * len(trees), of_weights, *(out_specs for _ in old))
        local = jax.shard_map(merge, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
        return local(trees, each, *old)

    return _jitted(merge_shards, into)


def _jitted(merge: Callable[..., PyTree], into: bool) -> Any:
    return jax.jit(merge, donate_argnums=2, keep_unused=True) if into else jax.jit(merge)
