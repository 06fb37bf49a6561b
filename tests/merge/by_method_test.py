"""The merge of a population by every method that has something to search, on a mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxmerge.errors import JaxmergeError
from jaxmerge.merge import linear
from jaxmerge.merge.by_method import CombinationMerger, LeafMerger, every_place
from jaxmerge.merge.groups import Groups
from jaxmerge.merge.leafwise import LeafwiseMerger
from jaxmerge.merge.methods import METHODS, merge_tensor
from jaxmerge.merge.searched import Searched, searched
from jaxmerge.sharding import make_mesh
from jaxmerge.trees import named_leaves
from tests.merge.linear_test import COLLECTIVE
from tests.merge.methods_reference import REFERENCES

L, SHAPE, C = 2, (8, 16), 2
GROUPS = Groups(("first", "second"), {"layers/up": (0, 1)})
# What leaves only the tolerances or choices: there is one such merge, and nothing to search.
ONE_MERGE = {"karcher", "model_stock", "metagpt", "arcee_fusion"}


def tree_of(rng: np.random.Generator, dtype: str = "bfloat16") -> dict:
    return {"layers": {"up": jnp.asarray(rng.normal(size=(L, *SHAPE)), dtype)}}


def on_mesh(tree: dict, **axes: Any) -> dict:
    spec = PartitionSpec(None, "fsdp", "tensor")
    return jax.device_put(tree, NamedSharding(make_mesh(**axes), spec))


def made(
    method: str, dtype: str = "bfloat16", *, with_base: bool | None = None, **fixed: Any
) -> tuple[Searched, list[dict]]:
    """The method; the base where it takes one, then checkpoints that have something in common."""
    row = METHODS[method]
    K, with_base = row.inputs[1] or 2, row.base == "required" if with_base is None else with_base
    rng = np.random.default_rng(3)
    common = tree_of(rng, dtype)
    own = [tree_of(rng, dtype) for _ in range(K + with_base)]
    trees = [jax.tree.map(jnp.add, common, tree) for tree in own]
    return searched(method, fixed, K, with_base=with_base, seed=2**40 + 7), trees


def merger_of(of: Searched, trees: list[dict], groups: Groups | None = None):
    places = every_place(trees[0], "layers")
    if not of.summed:
        return LeafMerger(of, trees, places, groups)
    leaves = [named_leaves(tree) for tree in trees]
    inner = linear.merger(trees, places)
    return CombinationMerger(
        of, inner, lambda name: [each[name] for each in leaves], trees[0], places, groups
    )


def rows_of(of: Searched, seed: int, *shape: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    low = np.array([0.0] * of.checkpoints + [gene.low for gene in of.genes])
    high = np.array([1.0] * of.checkpoints + [gene.high for gene in of.genes])
    drawn = low + (high - low) * rng.random((*shape, len(low)))
    return np.concatenate([drawn, np.ones((*shape, 1))], axis=-1).astype(np.float32)


def by_tensor(of: Searched, trees: list[dict], row: np.ndarray, name: str, layer: int):
    """One tensor at a time, on one device."""
    tensors = [jnp.asarray(np.asarray(named_leaves(tree)[name])[layer]) for tree in trees]
    name = f"{name}/{layer}"
    base, members = (tensors[0], tensors[1:]) if of.with_base else (None, tensors)
    return merge_tensor(of.method, members, base, of.complete(row), name=name, seed=of.seed)


def assert_same_bits(found, expected) -> None:
    one, two = (np.asarray(each).view(np.uint16) for each in (found, expected))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("method", sorted(METHODS.keys() - ONE_MERGE))
def test_a_population_on_eight_devices_is_each_tensor_by_itself(method, compilations):
    """By group too; the second population compiles nothing, nor do weighted sums among it."""
    of, trees = made(method)
    merge = merger_of(of, [on_mesh(tree, pop=2, fsdp=2, tensor=2) for tree in trees], GROUPS)
    one_hot = of.padded(np.eye(of.checkpoints, dtype=np.float32)[0])
    for seed in range(2):
        rows, before = rows_of(of, seed, C, 2), compilations()
        rows[1] = one_hot
        models = merge(rows)
        found = jax.tree.map(np.asarray, named_leaves(models))
        if isinstance(merge, CombinationMerger):
            merge.give_back(models)
    assert compilations() == before
    spec = named_leaves(models)["layers/up"].sharding.spec
    assert spec == PartitionSpec("pop", None, "fsdp", "tensor")
    for layer in range(L):
        expected = by_tensor(of, trees, rows[0, layer], "layers/up", layer)
        assert_same_bits(found["layers/up"][0, layer], expected)
    for name, leaf in named_leaves(trees[of.with_base]).items():
        assert_same_bits(found[name][1], leaf)
    assert_same_bits(merge.leaf("layers/up", rows[0]), found["layers/up"][0])


@pytest.mark.parametrize("method", sorted(ONE_MERGE))
def test_methods_with_one_merge_have_nothing_to_search(method):
    with pytest.raises(JaxmergeError, match="--mode=merge"):
        made(method)


def test_rows_with_coefficients_of_their_own():
    of, trees = made("nuslerp", nuslerp_flatten=False)
    assert not of.summed
    (row,) = rows_of(of, 0, 1)
    found = merger_of(of, trees)(row[None])
    expected = by_tensor(of, trees, row, "layers/up", 1)
    assert_same_bits(found["layers"]["up"][0, 1], expected)


def test_numbers_that_are_given():
    """Constants that the compiler knew would let it fuse products with sums."""
    given: Any = {"lambda": 0.8}
    of, trees = made("ties", dtype="float32", **given)
    trees = [tree["layers"] for tree in trees]  # one candidate of one tensor: no loop is left
    (row,) = rows_of(of, 0, 1)
    (found,) = merger_of(of, trees)(row[None])["up"]
    base, *members = (tree["up"] for tree in trees)
    expected = merge_tensor("ties", members, base, of.complete(row), name="up")
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("method", ["slerp", "task_arithmetic"])
def test_combinations_have_no_collective(method):
    of, trees = made(method)
    trees = [on_mesh(tree, pop=2, fsdp=2, tensor=2) for tree in trees]
    places = every_place(trees[0], "layers")
    weights = merger_of(of, trees).weights(rows_of(of, 0, C))
    program = linear.program(trees[0], population=True, groups=places)
    hlo = program.lower(tuple(trees), weights).compile().as_text()
    assert not COLLECTIVE.search(hlo)


def test_combinations_of_a_pool_on_disk():
    of, trees = made("multislerp")
    trees = [on_mesh(tree, pop=2) for tree in trees]
    places, leaves = every_place(trees[0], "layers"), [named_leaves(tree) for tree in trees]
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), trees[0]
    )
    inner = LeafwiseMerger(like, lambda k, name: leaves[k][name], len(trees), places)
    merge = CombinationMerger(of, inner, inner.leaves, trees[0], places, None)
    rows = rows_of(of, 0, C)
    for name, leaf in named_leaves(merger_of(of, trees)(rows)).items():
        assert_same_bits(named_leaves(merge(rows))[name], leaf)
        assert_same_bits(merge.leaf(name, rows[1]), leaf[1])


def by_differences(of: Searched, trees: list[dict], row: np.ndarray, gradient, layer: int):
    """Derivatives of <gradient, merge of a layer> by its row, in float64 and by the formulas."""
    tensors = [np.asarray(tree["layers"]["up"], np.float64)[layer] for tree in trees]
    base, members = (tensors[0], tensors[1:]) if of.with_base else (None, tensors)

    def value(row: np.ndarray) -> float:
        genes = {name: np.asarray(gene, np.float64) for name, gene in of.fixed}
        genes |= of.choices | {"weight": row[: of.checkpoints]}
        for gene, number in zip(of.genes, row[of.checkpoints :]):
            genes[gene.name] = np.repeat(number, of.checkpoints) if gene.per_checkpoint else number
        return np.vdot(gradient, REFERENCES[of.method](members, base, genes, None))

    step = 1e-6 * np.eye(len(row))
    return [(value(row + each) - value(row - each)) / 2e-6 for each in step]


@pytest.mark.parametrize(
    ("method", "fixed", "axes"),
    [
        ("slerp", {}, {}),
        ("nuslerp", {}, {}),
        ("multislerp", {"with_base": True}, {"pop": 2, "fsdp": 2, "tensor": 2}),
        ("task_arithmetic", {}, {}),
        ("task_arithmetic", {"normalize": True}, {"pop": 2}),
        ("passthrough", {}, {}),
        ("nuslerp", {"with_base": True, "nuslerp_flatten": False}, {"pop": 2, "fsdp": 2}),
    ],
)
def test_derivatives_equal_differences(method, fixed, axes):
    """By every number of each group; layers of one group add up."""
    of, trees = made(method, dtype="float32", **fixed)
    gradients = np.random.default_rng(6).normal(size=(C, L, *SHAPE)).astype(np.float32)
    placed = [on_mesh(tree, **axes) for tree in trees]
    for groups, rows in ((GROUPS, rows_of(of, 5, C, L)), (None, rows_of(of, 5, C, 1))):
        found = merger_of(of, placed, groups).pullback({"layers": {"up": gradients}}, rows)
        expected = np.array(
            [
                [
                    by_differences(of, trees, row[layer % len(row)], g[layer], layer)
                    for layer in (0, 1)
                ]
                for row, g in zip(rows, gradients)
            ]
        )
        expected = expected if groups else expected.sum(axis=1, keepdims=True)
        # Sums of 128 products in float32, and cosines rounded to it.
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("method", ["nuslerp", "multislerp"])
def test_derivatives_of_equal_checkpoints_are_none(method):
    """Where all are alike, or all zero: norms and angles are at the ends of what they can be."""
    of, trees = made(method)
    for tree in (trees[0], jax.tree.map(jnp.zeros_like, trees[0])):
        merge = merger_of(of, [tree] * len(trees))
        found = merge.pullback(jax.tree.map(lambda leaf: leaf[None], tree), rows_of(of, 0, 1))
        assert np.isfinite(found).all()
        # Only the weights' sum would matter, which is divided by.
        np.testing.assert_allclose(found, 0, atol=1e-2 * float(jnp.sum(tree["layers"]["up"] ** 2)))


def test_masks_have_no_derivatives():
    of, trees = made("ties")
    merge = merger_of(of, trees)
    with pytest.raises(JaxmergeError, match="CMA_ES"):
        merge.pullback(jax.tree.map(lambda leaf: leaf[None], trees[0]), rows_of(of, 0, 1))
