"""Weights by group of leaves: which group a leaf is in, and merges against NumPy, by all ways."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge.errors import JaxmergeError
from jaxmerge.merge import differences, linear
from jaxmerge.merge.groups import Groups, groups
from jaxmerge.merge.leafwise import LeafwiseMerger
from jaxmerge.merge.rematerialised import RematerialisingMerger
from jaxmerge.models.deferred import Deferred, made
from jaxmerge.sharding import make_mesh, shardings
from jaxmerge.trees import named_leaves
from tests import tiny
from tests.merge.linear_test import COLLECTIVE

K, P = 3, 4
TREES = tiny.trees(K)
GRANULARITIES = [
    ("layer", ()),
    ("2", ()),
    ("1", ()),
    ("kind", ()),
    ("leaf", ()),
    ("patterns", ("query|key", "layers/.*/1$")),
]


def made_groups(granularity: str, patterns: tuple[str, ...] = ()) -> Groups:
    found = groups(TREES[0], granularity, patterns=patterns, layers="layers")
    assert found
    return found


def weights_of(of: Groups, population: int = P) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.dirichlet(np.ones(K), (population, len(of.names))).astype(np.float32)


def reference(of: Groups, weights_GxK: np.ndarray) -> dict[str, np.ndarray]:
    """In float64, slice by slice."""
    leaves = [named_leaves(tree) for tree in TREES]
    found = {}
    for name, numbers in of.of_leaf.items():
        values = [np.asarray(each[name], np.float64) for each in leaves]
        slices = numbers if len(numbers) > 1 else numbers * len(values[0])
        found[name] = np.stack(
            [
                sum(weights_GxK[g, k].astype(np.float64) * values[k][i] for k in range(K))
                for i, g in enumerate(slices)
            ]
        )
    return found


FINEST = made_groups("leaf")


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(pop=2, data=1, fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def placed(mesh):
    where = shardings(TREES[0], tiny.model().sharding_rules, mesh)
    return [jax.device_put(tree, where) for tree in TREES]


def leafwise_merger(placed) -> LeafwiseMerger:
    leaves = [named_leaves(tree) for tree in placed]
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), placed[0]
    )
    return LeafwiseMerger(like, lambda k, name: leaves[k][name], len(leaves), FINEST)


@pytest.mark.parametrize(
    ("granularity", "patterns", "names"),
    [
        ("layer", (), ("rest", "layer 0", "layer 1")),
        ("1", (), ("rest", "layers 0-1")),
        (
            "patterns",
            ("query|key", "layers/.*/1$"),
            ("rest", "query|key", "layers/.*/1$"),
        ),
    ],
)
def test_names(granularity, patterns, names):
    assert made_groups(granularity, patterns).names == names


def test_each_leaf_and_layer_of_its_own():
    of = made_groups("leaf")
    assert len(of.names) == 2 + 9 * 2
    assert of.names[of.of_leaf["layers/up"][1]] == "layers/up 1"
    assert of.names[of.of_leaf["embedding"][0]] == "embedding"


def test_layers_that_are_numbers_in_names():
    """As in the trees of others: a layer is the first number among the parts of a name."""
    tree = {"blocks": {"0": {"w": jnp.zeros(2)}, "1": {"w": jnp.zeros(2)}}, "head": jnp.zeros(2)}
    by_layer, by_kind = groups(tree, "layer"), groups(tree, "kind")
    assert by_layer
    assert by_layer.names == ("rest", "layer 0", "layer 1")
    assert by_layer.of_leaf == {"blocks/0/w": (1,), "blocks/1/w": (2,), "head": (0,)}
    assert by_kind
    assert by_kind.of_leaf == {"blocks/0/w": (1,), "blocks/1/w": (1,), "head": (0,)}


def test_one_group_is_none():
    assert groups(TREES[0], "model", layers="layers") is None


@pytest.mark.parametrize(
    ("granularity", "patterns", "said"),
    [
        ("leafs", (), "space.granularity"),
        ("3", (), "at most 2"),
        ("0", (), "at most 2"),
        ("patterns", (), "space.patterns"),
        ("layer", ("up",), "space.patterns"),
        ("patterns", ("(",), "no regular expression"),
        ("patterns", ("quary",), "quary"),
    ],
)
def test_groups_that_can_not_be(granularity, patterns, said):
    with pytest.raises(JaxmergeError, match=re.escape(said)):
        groups(TREES[0], granularity, patterns=patterns, layers="layers")


@pytest.mark.parametrize(("granularity", "patterns"), GRANULARITIES)
def test_equals_numpy(granularity, patterns):
    of = made_groups(granularity, patterns)
    weights = weights_of(of)
    merged = named_leaves(linear.linear(TREES, weights, of))
    for p in range(P):
        for name, expected in reference(of, weights[p]).items():
            # Three products and sums in float32, each rounded.
            np.testing.assert_allclose(merged[name][p], expected, rtol=1e-5, atol=1e-5)


def test_the_same_weights_in_all_groups_are_the_merge_of_one_group():
    weights = np.random.default_rng(1).dirichlet(np.ones(K), P).astype(np.float32)
    alike = linear.merger(TREES, FINEST)(weights)
    jax.tree.map(np.testing.assert_array_equal, alike, linear.linear(TREES, weights))


def test_one_hot_weights_return_each_layer_bit_for_bit():
    """Frankenmerges too: each group from another checkpoint."""
    chosen = np.random.default_rng(2).integers(0, K, len(FINEST.names))
    merged = named_leaves(linear.linear(TREES, np.eye(K, dtype=np.float32)[chosen], FINEST))
    for name, numbers in FINEST.of_leaf.items():
        for i, g in enumerate(numbers):
            own = named_leaves(TREES[chosen[g]])[name]
            same = (merged[name][i], own[i]) if len(numbers) > 1 else (merged[name], own)
            np.testing.assert_array_equal(*same)


def test_all_ways_agree_on_every_bit(mesh, placed):
    """One by one, on 8 devices, from off the devices, and of layers that are merged late."""
    weights = weights_of(FINEST)
    expected, check = linear.linear(TREES, weights, FINEST), np.testing.assert_array_equal
    for p in range(P):
        alone = linear.linear(TREES, weights[p], FINEST)
        jax.tree.map(check, alone, jax.tree.map(lambda leaf, p=p: leaf[p], expected))
    jax.tree.map(check, linear.merger(placed, FINEST)(weights), expected)
    leafwise = leafwise_merger(placed)
    jax.tree.map(check, leafwise(weights), expected)
    one = named_leaves(expected)
    for name in one:
        check(leafwise.leaf(name, weights[1]), one[name][1])
    late = RematerialisingMerger(placed, "layers", FINEST)(weights)["layers"]
    for p in range(P):
        for layer in range(2):
            own = jax.tree.map(
                lambda leaf, at=(p, layer): Deferred(
                    leaf.make, tuple(each[at[1]] for each in leaf.sources), leaf.weights[at]
                ),
                late,
                is_leaf=lambda leaf: isinstance(leaf, Deferred),
            )
            of_layer = jax.tree.map(lambda leaf, at=(p, layer): leaf[at], expected["layers"])
            jax.tree.map(check, made(own), of_layer)


@pytest.mark.parametrize("storage", differences.BITS)
def test_differences_in_a_few_bits(storage, placed):
    """The same sums as those of what is stored, leaf by leaf and slice by slice."""
    weights = weights_of(FINEST)
    base = named_leaves(placed[0])
    others = [
        {name: differences.quantised(leaf, base[name], storage) for name, leaf in tree.items()}
        for tree in map(named_leaves, placed[1:])
    ]
    merge = differences.QuantisedMerger(placed[0], others, leafwise_merger(placed), FINEST)
    merged = named_leaves(merge(weights))
    for name, numbers in FINEST.of_leaf.items():
        for i, g in enumerate(numbers):
            whole = differences.stored_sum(
                base[name], [other[name] for other in others], jnp.asarray(weights[1, g])
            )
            same = (merged[name][1, i], whole[i]) if len(numbers) > 1 else (merged[name][1], whole)
            np.testing.assert_array_equal(*same)


def test_no_collective_and_no_compilation_on_the_second_call(placed, compilations):
    merge = linear.merger(placed, FINEST)
    weights = weights_of(FINEST)
    merge.give_back(merge(weights))
    before = compilations()
    merge.give_back(merge(weights[::-1]))
    merge(weights[:, :, ::-1])
    assert compilations() == before
    program = linear.program(placed[0], population=True, groups=FINEST)
    assert not re.search(COLLECTIVE, program.lower(tuple(placed), weights).compile().as_text())


def test_rows_at_a_time_as_on_a_tpu():
    """A loop over rows gives the same bits where slices have weights of their own."""
    rng = np.random.default_rng(3)
    leaves = [jnp.asarray(rng.normal(size=(3, 8, 4)), jnp.bfloat16) for _ in range(K)]
    weights = jnp.asarray(rng.dirichlet(np.ones(K), (P, 3)), jnp.float32)
    whole = linear.of_population(linear.weighted_sum, leaves, weights)
    for rows in (2, 4, 8):
        parts = linear.of_population(linear.weighted_sum, leaves, weights, rows)
        np.testing.assert_array_equal(parts, whole)
