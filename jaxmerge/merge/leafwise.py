"""The linear merge of a pool that is not on the devices: a leaf of a checkpoint at a time."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxmerge.merge.groups import Groups
from jaxmerge.merge.linear import ZERO, over, plus
from jaxmerge.merge.pullback import by_group, product
from jaxmerge.trees import PyTree, map_named, named_leaves

# read(k, name) puts a leaf of checkpoint k on the devices.
Read = Callable[[int, str], Array]


class LeafwiseMerger:
    """Merges C candidates in one pass over the pool; the same bits as `linear.Merger`.

    On the devices there are the merged leaves so far, the float32 sum of one leaf of each
    candidate, and two leaves of checkpoints: one is added while the next is read. Checkpoints that
    no candidate gives a weight are not read.

    Args:
        like: tree of the leaves' `ShapeDtypeStruct`, with `NamedSharding` on a mesh that has `pop`.
        read: see `Read`; the leaves have the dtypes and shardings of `like`.
        checkpoints: K.
        groups: of leaves that share their weights, see `linear.ResidentMerger`.

    Attributes:
        bytes_read: by all merges so far, to the devices of this process.
        seconds: that all merges so far took.
    """

    def __init__(self, like: PyTree, read: Read, checkpoints: int, groups: Groups | None = None):
        self._like, self._read, self._K, self._groups = like, read, checkpoints, groups
        self.bytes_read, self.seconds = 0, 0.0

    def __call__(self, weights_CxK: Float[np.ndarray, "C *G K"]) -> PyTree:
        """The merged models, `[C, ...]` spread over the mesh axis `pop`."""
        started = time.perf_counter()
        weights_CxK = weights_CxK.astype(np.float32)
        merged = map_named(lambda name, like: self._merged(name, like, weights_CxK), self._like)
        jax.block_until_ready(merged)
        self.seconds += time.perf_counter() - started
        return merged

    def pullback(self, gradients: PyTree, _: Float[np.ndarray, "C *G K"]) -> Float[Array, "C G K"]:
        """See `linear.Merger`; one pass over the pool too."""
        started = time.perf_counter()
        of_leaf = self._groups.of_leaf if self._groups else {}
        found = {}
        for name, gradient in named_leaves(gradients).items():
            by_slice = len(of_leaf.get(name, (0,))) > 1
            each = [
                jax.block_until_ready(_product(gradient, self._leaf(k, name), by_slice=by_slice))
                for k in range(self._K)
            ]
            found[name] = jnp.stack(each, axis=-1)
        by_weights = by_group(found, of_leaf, len(self._groups.names) if self._groups else 1)
        self.seconds += time.perf_counter() - started
        return by_weights

    def leaf(self, name: str, weights_K: Float[np.ndarray, "*G K"]) -> Array:
        """A leaf of one merge, with the sharding of the pool's."""
        like = named_leaves(self._like)[name]
        pop = like.sharding.mesh.shape["pop"]  # every place of the axis makes the same one
        merged = self._merged(name, like, np.repeat(weights_K[None], pop, axis=0))
        return _first(like.sharding)(merged)

    def leaves(self, name: str) -> list[Array]:
        """That leaf of every checkpoint."""
        return [self._leaf(k, name) for k in range(self._K)]

    def programs(self, count: int) -> list[str]:
        """The compiled text of what adds a checkpoint's leaf for `count` candidates, by leaf."""
        added = [adding(like, count) for like in named_leaves(self._like).values()]
        return [add.lower(*arguments).compile().as_text() for add, arguments in added]

    def _merged(self, name: str, like: jax.ShapeDtypeStruct, weights_CxK: np.ndarray) -> Array:
        if self._groups:
            weights_CxK = self._groups.weights(name, self._groups.lifted(weights_CxK))
        by_slice = weights_CxK.ndim == 3  # of a leaf whose slices have weights of their own
        start, add, finish, repeat = _programs(like.sharding, like.shape, like.dtype, by_slice)
        count = len(weights_CxK)
        if not jnp.issubdtype(like.dtype, jnp.floating):
            return repeat(self._leaf(0, name), count)
        alone_C = np.sum(weights_CxK != 0, axis=-1) == 1
        total = start(count)
        for k in np.flatnonzero(np.any(weights_CxK != 0, axis=tuple(range(by_slice + 1)))):
            leaf = self._leaf(int(k), name)
            total = add(jax.block_until_ready(total), leaf, weights_CxK[..., k], alone_C)
            del leaf  # which is given up when it has been added, not when the next has been read
        return finish(total)

    def _leaf(self, k: int, name: str) -> Array:
        leaf = self._read(k, name)
        self.bytes_read += sum(shard.data.nbytes for shard in leaf.addressable_shards)
        return leaf


_product = jax.jit(product, static_argnames="by_slice")


@functools.cache
def _first(sharding: NamedSharding) -> Callable[[Array], Array]:
    return jax.jit(lambda leaf: leaf[0], out_shardings=sharding)


def adding(
    like: jax.ShapeDtypeStruct, count: int, *, by_slice: bool = False
) -> tuple[Any, tuple[Any, ...]]:
    """The program that adds a checkpoint's leaf for `count` candidates, and abstract arguments.

    Args:
        like: the leaf.
        count: of the candidates.
        by_slice: whether slices along the leaf's first axis have weights of their own.
    """
    assert isinstance(like.sharding, NamedSharding)
    _, add, *_ = _programs(like.sharding, like.shape, like.dtype, by_slice)
    over_pop = NamedSharding(like.sharding.mesh, _of_weights(like.sharding.spec, by_slice))
    of_row = (count, *like.shape[:by_slice])
    lifted = NamedSharding(like.sharding.mesh, PartitionSpec("pop", *like.sharding.spec))
    wide = jnp.promote_types(like.dtype, jnp.float32)
    total = jax.ShapeDtypeStruct((count, *like.shape), wide, sharding=lifted)
    row = jax.ShapeDtypeStruct(of_row, np.float32, sharding=over_pop)
    alone = jax.ShapeDtypeStruct(of_row, bool, sharding=over_pop)
    return add, (total, like, row, alone)


def _of_weights(spec: PartitionSpec, by_slice: bool) -> PartitionSpec:
    return PartitionSpec("pop", *(spec[:1] if by_slice else ()))


@functools.cache
def _programs(
    sharding: NamedSharding, shape: tuple[int, ...], dtype: Any, by_slice: bool
) -> tuple[Any, ...]:
    """The sum of a leaf over checkpoints, for C candidates: its start, a step, its end."""
    mesh, spec = sharding.mesh, sharding.spec
    of_candidates = PartitionSpec("pop", *spec)
    wide = jnp.promote_types(dtype, jnp.float32)
    lifted = NamedSharding(mesh, of_candidates)

    def local(total: Array, leaf: Array, weights_C: Array, alone_C: Array) -> Array:
        value = leaf.astype(wide)
        return jax.vmap(
            lambda total, weight, alone: plus(total, value, over(weight, leaf), over(alone, leaf))
        )(total, weights_C.astype(wide), alone_C)

    # Said with shard_map that no shard needs another, as in `linear`.
    of_weights = _of_weights(spec, by_slice)
    in_specs = (of_candidates, spec, of_weights, of_weights)
    step = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=of_candidates)

    @functools.partial(jax.jit, static_argnums=0, out_shardings=lifted)
    def start(count: int) -> Array:
        return jnp.full((count, *shape), ZERO, wide)

    @functools.partial(jax.jit, static_argnums=1, out_shardings=lifted)
    def repeat(leaf: Array, count: int) -> Array:
        return jnp.broadcast_to(leaf[None], (count, *shape))

    finish = jax.jit(lambda total: total.astype(dtype), donate_argnums=0)
    return start, jax.jit(step, donate_argnums=0), finish, repeat
