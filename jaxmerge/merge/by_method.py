"""The merge of a population by any method of the table, a program per leaf.

Coefficients of combinations come from norms and cosines of the checkpoints, which are computed once
when the pool is there; the sum is then that of `merge.linear`, whichever merger of it the pool has.
Masks, and combinations whose rows have coefficients of their own, go leaf by leaf on the devices:
candidates are spread over the mesh axis `pop`, and a threshold or norm of a leaf that is sharded
adds up over its shards. Either way the bits are those of `methods.merge_tensor`, on any mesh.

Coefficients are differentiable in the genes, and norms and cosines do not depend on them. So what
depends on the merge has derivatives by the genes of every combination: those by its coefficients,
from `merge.pullback`, through `jax.vjp` of the map from genes to coefficients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxmerge.hosts import processes
from jaxmerge.merge import draws
from jaxmerge.merge.combinations import Geometry, geometry
from jaxmerge.merge.groups import Groups
from jaxmerge.merge.leafwise import LeafwiseMerger
from jaxmerge.merge.linear import Merger, ResidentMerger, linear, weighted_sum
from jaxmerge.merge.methods import METHODS, coefficients, merged, rule, vector_axis
from jaxmerge.merge.pullback import by_group
from jaxmerge.merge.searched import Searched, check_differentiable
from jaxmerge.trees import PyTree, map_named, named_leaves

# leaves(name) gives a leaf of the base, where there is one, and then of the K checkpoints.
Leaves = Callable[[str], Sequence[Array]]


def every_place(like: PyTree, layers: str) -> Groups:
    """Each leaf, and each layer of one that is stacked, as a group of its own.

    Args:
        like: tree of arrays or `ShapeDtypeStruct`.
        layers: the top-level entry whose leaves are stacked; "": none are.
    """
    names: list[str] = []
    of_leaf: dict[str, tuple[int, ...]] = {}
    for name, leaf in named_leaves(like).items():
        stacked = bool(layers) and name.startswith(f"{layers}/")
        own = [f"{name}/{layer}" for layer in range(leaf.shape[0])] if stacked else [name]
        of_leaf[name] = tuple(range(len(names), len(names) + len(own)))
        names += own
    return Groups(tuple(names), of_leaf)


class CombinationMerger:
    """The merge by a method whose results are weighted sums.

    Args:
        of: the method.
        inner: the weighted sum of the base, where there is one, and K checkpoints, whose groups are
            `places`.
        leaves: see `Leaves`.
        like: tree of the leaves, or of their `ShapeDtypeStruct`.
        places: see `every_place`.
        groups: of leaves that share their numbers; None: all do.
    """

    def __init__(
        self,
        of: Searched,
        inner: Merger,
        leaves: Leaves,
        like: PyTree,
        places: Groups,
        groups: Groups | None,
    ):
        self.of, self._inner, self._leaves, self._places = of, inner, leaves, places
        numbers = {name: _spread(groups, name, len(own)) for name, own in places.of_leaf.items()}
        self._groups = groups
        self._group_of = np.concatenate([numbers[name] for name in places.of_leaf])
        self.geometry = None
        if METHODS[of.method].geometry:
            each = [
                place_geometry(leaves(name), stacked=len(own) > 1, with_base=of.with_base)
                if jnp.issubdtype(leaf.dtype, jnp.floating)
                else _no_geometry(of.checkpoints, len(own))
                for (name, leaf), own in zip(named_leaves(like).items(), places.of_leaf.values())
            ]
            whole: Any = [np.concatenate(parts) for parts in zip(*each)]
            self.geometry = Geometry(*whole)

    def __call__(self, rows_CxR: Float[np.ndarray, "C *G R"]) -> PyTree:
        """The merged models, as `inner` gives them."""
        return self._inner(self.weights(rows_CxR))

    def weights(self, rows_CxR: Float[np.ndarray, "C *G R"]) -> Float[np.ndarray, "C N K"]:
        """What `inner` adds up: of each of N places, that of the base first where there is one."""
        rows = _lifted(self.of, self._groups, rows_CxR)[:, self._group_of]
        with _on_host():
            return np.asarray(_coefficients(self.of)(rows, self.geometry))

    def give_back(self, merged: PyTree) -> None:
        """See `linear.ResidentMerger`."""
        if isinstance(self._inner, ResidentMerger):
            self._inner.give_back(merged)

    def pullback(
        self, gradients: PyTree, rows_CxR: Float[np.ndarray, "C *G R"]
    ) -> Float[np.ndarray, "C G R"]:
        """See `linear.Merger`: by all that a row has."""
        by_CxNxK = processes.fetch(self._inner.pullback(gradients, self.weights(rows_CxR)))
        rows = _lifted(self.of, self._groups, rows_CxR)
        with _on_host():
            found = _by_genes(self.of)(rows[:, self._group_of], self.geometry, by_CxNxK)
            numbers = {"": tuple(self._group_of.tolist())}
            return np.asarray(by_group({"": found}, numbers, rows.shape[1]))

    def leaf(self, name: str, row: Float[np.ndarray, "*G R"]) -> Array:
        """A leaf of one merge, with the sharding of the pool's."""
        weights = self.weights(row[None])[0]
        if isinstance(self._inner, LeafwiseMerger):
            return self._inner.leaf(name, weights)
        trees = [{name: leaf} for leaf in self._leaves(name)]
        return linear(trees, weights, self._places)[name]


class LeafMerger:
    """The merge by any method of K trees in memory, leaf by leaf.

    Args:
        of: the method.
        trees: of the base, where there is one, and then of the K checkpoints; alike.
        places: see `every_place`.
        groups: of leaves that share their numbers; None: all do.
    """

    def __init__(
        self, of: Searched, trees: Sequence[PyTree], places: Groups, groups: Groups | None
    ):
        self.of, self._like, self._groups = of, trees[0], groups
        self._trees = [named_leaves(tree) for tree in trees]
        self._keys = {
            name: np.stack([draws.key(of.seed, places.names[i]) for i in own])
            for name, own in places.of_leaf.items()
        }
        self._stacked = {name: places.names[own[0]] != name for name, own in places.of_leaf.items()}
        first = next(iter(self._trees[0].values())).sharding
        self._mesh: Any = first.mesh if isinstance(first, NamedSharding) else None

    def __call__(self, rows_CxR: Float[np.ndarray, "C *G R"]) -> PyTree:
        """The merged models, `[C, ...]` spread over the mesh axis `pop`."""
        return map_named(lambda name, _: self._merged(name, rows_CxR), self._like)

    def pullback(
        self, gradients: PyTree, rows_CxR: Float[np.ndarray, "C *G R"]
    ) -> Float[Array, "C G R"]:
        """See `linear.Merger`: by all that a row of a combination has.

        Raises:
            JaxmergeError: the method has thresholds or draws, and so no derivatives.
        """
        check_differentiable(self.of.method, "search.strategy")
        found, numbers = {}, {}
        for name, gradient in named_leaves(gradients).items():
            leaves, where, rows_CxLxR = self._arguments(name, rows_CxR)
            program = _derivatives(self.of, self._stacked[name], where)
            by_row = program(leaves, self._placed(rows_CxLxR), gradient)
            found[name] = jax.block_until_ready(by_row)
            numbers[name] = tuple(_spread(self._groups, name, rows_CxLxR.shape[1]).tolist())
        return by_group(found, numbers, len(self._groups.names) if self._groups else 1)

    def leaf(self, name: str, row: Float[np.ndarray, "*G R"]) -> Array:
        """A leaf of one merge, with the sharding of the pool's."""
        places = self._mesh.shape["pop"] if self._mesh else 1
        found = self._merged(name, np.repeat(row[None], places, axis=0))
        return jax.jit(lambda leaf: leaf[0], out_shardings=self._trees[0][name].sharding)(found)

    def _merged(self, name: str, rows_CxR: np.ndarray) -> Array:
        """By the method, as weighted sums, or both where there are candidates of both kinds.

        Which kind a candidate is of is never asked on the devices: those of a mesh would go
        different ways, and wait for each other where a leaf is sharded.
        """
        leaves, where, rows_CxLxR = self._arguments(name, rows_CxR)
        by_method_C = rows_CxLxR[:, 0, -1] == 1
        kinds = [kind for kind in (True, False) if np.any(by_method_C == kind)]
        found = []
        for kind in kinds:
            program = _program(self.of, self._stacked[name], where, by_method=kind)
            found.append(program(leaves, self._keys[name], self._placed(rows_CxLxR)))
            # Between CPU devices, collectives of programs that queue up can wait for each other.
            if self._mesh and self._mesh.devices.flat[0].platform == "cpu":
                jax.block_until_ready(found[-1])
        return found[0] if len(found) == 1 else _either(self._placed(by_method_C), *found)

    def _arguments(self, name: str, rows_CxR: np.ndarray) -> tuple[tuple[Array, ...], Any, Any]:
        """A leaf of all trees, where it lies, and the rows of each of its layers."""
        leaves = tuple(tree[name] for tree in self._trees)
        numbers = _spread(self._groups, name, len(self._keys[name]))
        rows_CxLxR = _lifted(self.of, self._groups, rows_CxR)[:, numbers]
        return leaves, leaves[0].sharding if self._mesh else None, rows_CxLxR

    def _placed(self, array: np.ndarray) -> Array:
        if self._mesh is None:
            return jnp.asarray(array)
        return processes.place(array, NamedSharding(self._mesh, PartitionSpec("pop")))


ByMethod = CombinationMerger | LeafMerger


def leaf_program(
    of: Searched, like: jax.ShapeDtypeStruct, count: int, *, stacked: bool
) -> tuple[Any, tuple[Any, ...]]:
    """`LeafMerger`'s program that merges a leaf for `count` candidates, and abstract arguments.

    Args:
        of: the method.
        like: the leaf, with its sharding.
        count: of the candidates.
        stacked: whether the leaf's first axis is that of layers.
    """
    assert isinstance(like.sharding, NamedSharding)
    mesh, layers = like.sharding.mesh, like.shape[0] if stacked else 1
    keys = jax.ShapeDtypeStruct((layers, *draws.key(0, "").shape), np.uint32)
    over_pop = NamedSharding(mesh, PartitionSpec("pop"))
    rows = jax.ShapeDtypeStruct((count, layers, of.width), np.float32, sharding=over_pop)
    leaves = (like,) * (of.checkpoints + of.with_base)
    return _program(of, stacked, like.sharding, by_method=True), (leaves, keys, rows)


def _on_host() -> Any:
    """Candidates are few numbers: what they are merged from is computed on the CPU."""
    return jax.default_device(jax.local_devices(backend="cpu")[0])


def _spread(groups: Groups | None, name: str, count: int) -> np.ndarray:
    """The group of each layer of a leaf."""
    return np.resize(np.array(groups.of_leaf[name] if groups else (0,)), count)


def _lifted(of: Searched, groups: Groups | None, rows_CxR: np.ndarray) -> np.ndarray:
    """Rows `[C, G, R]`, whatever was given."""
    rows = of.padded(np.asarray(rows_CxR, np.float32))
    return groups.lifted(rows) if groups else rows.reshape(len(rows), -1, rows.shape[-1])


def place_geometry(leaves: Sequence[Array], *, stacked: bool, with_base: bool) -> Geometry:
    """Norms `[L, K]` and cosines `[L, K, K]` of a leaf's layers; L is 1 where it has none.

    Of the checkpoints, or with a base of their differences from it. On a mesh K x K numbers are
    added up over the shards, the same bits as without one.

    Args:
        leaves: of the base, where there is one, and then of the checkpoints.
        stacked: whether the first axis is that of layers.
        with_base: whether the first is the base.
    """
    found = _geometry(tuple(leaves), stacked=stacked, with_base=with_base)
    return Geometry(*(processes.fetch(part) for part in found))


@functools.partial(jax.jit, static_argnames=("stacked", "with_base"))
def _geometry(leaves: tuple[Array, ...], *, stacked: bool, with_base: bool) -> Geometry:
    vectors = [leaf.astype(jnp.float32) for leaf in leaves]
    if with_base:
        vectors = [vector - vectors[0] for vector in vectors[1:]]
    found = geometry(vectors, range(stacked, vectors[0].ndim))
    K = len(vectors)
    return Geometry(found.norms.reshape(-1, K), found.cosines.reshape(-1, K, K))


def _no_geometry(checkpoints: int, places: int) -> Geometry:
    """Of leaves that are not merged."""
    shapes = (places, checkpoints), (places, checkpoints, checkpoints)
    zeros: Any = [np.zeros(shape, np.float32) for shape in shapes]
    return Geometry(*zeros)


@functools.cache
def _coefficients(of: Searched) -> Any:
    """`(rows [C, N, R], geometry of N places) -> [C, N, K]`, or K + 1 with a base."""
    return jax.jit(_to_coefficients(of))


@functools.cache
def _by_genes(of: Searched) -> Any:
    """`(rows, geometry, derivatives by the coefficients) -> [C, N, R]`, those by the rows."""
    map_rows = _to_coefficients(of)

    def pulled(rows: Array, geometry: Any, by_coefficients: Array) -> Array:
        _, back = jax.vjp(lambda rows: map_rows(rows, geometry), rows)
        return back(by_coefficients)[0]

    return jax.jit(pulled)


def _to_coefficients(of: Searched) -> Callable[[Array, Any], Array]:
    def of_place(row: Array, geometry: Any) -> Array:
        genes = of.complete(row)
        numbers = {name: gene for name, gene in genes.items() if not isinstance(gene, bool)}
        found = rule(of.method, of.variant, tuple(of.choices.items()))(geometry, numbers)
        found = jnp.where(row[-1] == 1, found, row[: of.checkpoints])
        if not of.with_base:
            return found
        own = jnp.where(row[-1] == 1, 1 - jnp.sum(found), 0)
        return jnp.concatenate([own[None], found])

    def of_candidate(rows: Array, geometry: Any) -> Array:
        return jax.lax.map(lambda each: of_place(*each), (rows, geometry))

    # One candidate and place after the other: the bits of each do not depend on its neighbours.
    return lambda rows, geometry: jax.lax.map(lambda row: of_candidate(row, geometry), rows)


@jax.jit
def _either(first_C: Array, one: Array, other: Array) -> Array:
    """Of each candidate that from `one` or that from `other`."""
    return jnp.where(first_C.reshape(-1, *(1 for _ in one.shape[1:])), one, other)


@functools.cache
def _program(of: Searched, stacked: bool, where: Any, *, by_method: bool) -> Any:
    """`(leaves of base and checkpoints, keys [L, 3], rows [C, L, R]) -> [C, ...]`."""

    def of_layer(leaves: tuple[Array, ...], draw: Array, row: Array) -> Array:
        members = leaves[of.with_base :]
        if not by_method:
            return weighted_sum(members, row[: of.checkpoints])
        base = leaves[0] if of.with_base else None
        return merged(of.method, of.variant, members, base, of.complete(row), draw)

    def of_candidate(leaves: tuple[Array, ...], keys: Array, rows_LxR: Array) -> Array:
        if not jnp.issubdtype(leaves[0].dtype, jnp.floating):
            return leaves[0]
        if not stacked:
            return of_layer(leaves, keys[0], rows_LxR[0])
        return jax.lax.map(lambda each: of_layer(*each), (leaves, keys, rows_LxR))

    def of_candidates(leaves: tuple[Array, ...], keys: Array, rows_CxLxR: Array) -> Array:
        return jax.lax.map(lambda rows: of_candidate(leaves, keys, rows), rows_CxLxR)

    if where is None:
        return jax.jit(of_candidates)
    placed = NamedSharding(where.mesh, PartitionSpec("pop", *where.spec))
    shared, own = PartitionSpec(), PartitionSpec("pop")
    return jax.jit(_over_pop(of_candidates, where.mesh, shared, shared, own), out_shardings=placed)


def _over_pop(run: Any, mesh: Any, *in_specs: PartitionSpec) -> Any:
    """By hand over `pop` alone: each place has its own candidates, one after the other."""
    return jax.shard_map(
        run,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=PartitionSpec("pop"),
        axis_names={"pop"},
        check_vma=False,
    )


@functools.cache
def _derivatives(of: Searched, stacked: bool, where: Any) -> Any:
    """`(leaves, rows [C, L, R], derivatives by the merged [C, ...]) -> [C, L, R]`.

    Of a combination whose rows may have coefficients of their own: c_rk has <dS/dtheta_r, theta_kr>
    or with a base <dS/dtheta_r, delta_kr>.
    """

    def of_layer(leaves: tuple[Array, ...], row: Array, gradient: Array) -> Array:
        members = leaves[of.with_base :]
        base = leaves[0] if of.with_base else None
        axis = vector_axis(of.choices, gradient.ndim)

        def product(member: Array) -> Array:
            vector = member.astype(jnp.float32)
            vector = vector if base is None else vector - base.astype(jnp.float32)
            each = gradient.astype(jnp.float32) * vector
            return jnp.sum(each) if axis is None else jnp.sum(each, axis=axis).reshape(-1)

        _, back = jax.vjp(
            lambda row: coefficients(of.method, of.variant, of.complete(row), members, base), row
        )
        return back(jnp.stack([product(member) for member in members], axis=-1))[0]

    def of_candidate(leaves: tuple[Array, ...], rows_LxR: Array, gradient: Array) -> Array:
        if not stacked:
            return of_layer(leaves, rows_LxR[0], gradient)[None]
        return jax.lax.map(lambda each: of_layer(*each), (leaves, rows_LxR, gradient))

    def of_candidates(leaves: tuple[Array, ...], rows_CxLxR: Array, gradients: Array) -> Array:
        return jax.lax.map(lambda each: of_candidate(leaves, *each), (rows_CxLxR, gradients))

    if where is None:
        return jax.jit(of_candidates)
    own = PartitionSpec("pop")
    return jax.jit(_over_pop(of_candidates, where.mesh, PartitionSpec(), own, own))
