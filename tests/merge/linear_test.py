"""Merge methods, all from one table: values, bits, shardings, compilations and collectives."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxmerge.errors import JaxmergeError
from jaxmerge.merge import linear
from jaxmerge.models.decoder import SHARDING_RULES
from jaxmerge.sharding import make_mesh, shardings

K, P = 3, 4
MESHES = [
    {"pop": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 2, "tensor": 4},  # not square: transposed leaves are cut differently
    {"fsdp": 4, "tensor": 2},
    {"tensor": 8},
    {"pop": 4, "data": 2},
]
COLLECTIVE = re.compile(
    r"\b(all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast|reduce-scatter)"
)


def _linear_reference(leaves: list[np.ndarray], weights_K: np.ndarray) -> np.ndarray:
    return np.tensordot(weights_K.astype(np.float64), np.stack(leaves).astype(np.float64), axes=1)


def _linear_error(leaves: list[np.ndarray], weights_K: np.ndarray) -> np.ndarray:
    """K products and K - 1 sums in float32: no term is rounded more than K times (Higham, 3.1)."""
    magnitude = np.tensordot(np.abs(weights_K), np.abs(np.stack(leaves).astype(np.float64)), axes=1)
    u = 2.0**-24
    return K * u / (1 - K * u) * magnitude


class Method(NamedTuple):
    """How a method is called, what it should compute, and how far float32 may be off."""

    name: str
    merge: Callable[[Any, Any], Any]
    program: Callable[..., Any]
    leaf: Callable[[Any, Any], Any]
    reference: Callable[[list[np.ndarray], np.ndarray], np.ndarray]
    error: Callable[[list[np.ndarray], np.ndarray], np.ndarray]


METHODS = [
    Method(
        "linear",
        linear.linear,
        linear.program,
        linear.weighted_sum,
        _linear_reference,
        _linear_error,
    )
]
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
each_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])


def make_trees(dtype: str = "float32") -> list[Any]:
    """K trees of every kind of leaf: odd sizes, a scalar, q and o of one shape, an integer."""

    def tree(k: int) -> Any:
        rng = np.random.default_rng(k)

        def leaf(*shape: int) -> jax.Array:
            return jnp.asarray(rng.normal(size=shape), dtype)

        return {
            "layers": {
                "query": leaf(2, 8, 8, 8),
                "out": leaf(2, 8, 8, 8),
                "gate": leaf(2, 8, 16),
                "scale": leaf(2, 8),
            },
            "odd": leaf(7, 5),
            "temperature": leaf(),
            "step": jnp.arange(3),
        }

    return [tree(k) for k in range(K)]


def make_weights() -> jax.Array:
    """P candidates: ordinary, uniform, one with a zero, one that extrapolates."""
    return jnp.array([[0.2, 0.5, 0.3], [1 / 3] * 3, [0.7, 0.0, 0.3], [1.5, -0.9, 0.4]])


def place(trees: list[Any], **sizes: Any) -> list[Any]:
    """The trees on a mesh, by the decoder's rules."""
    mesh = make_mesh(**sizes)
    return [jax.device_put(tree, shardings(tree, SHARDING_RULES, mesh)) for tree in trees]


def bits(x: Any) -> np.ndarray:
    """A float array as the integers that stand for it: tells -0.0 from 0.0, and NaN equals NaN."""
    x = np.asarray(x)
    return x.view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


def assert_same_bits(tree: Any, other: Any) -> None:
    """Equal structure, dtypes and bits."""
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for one, two in zip(jax.tree.leaves(tree), jax.tree.leaves(other)):
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(bits(one), bits(two))


@each_method
@each_dtype
def test_equals_the_float64_reference(method, dtype):
    """Every value is the float64 one rounded once, but for what float32 accumulation may add.

    Rounding is monotonic, so the result lies between the two ends of the float32 error, each
    rounded to the dtype. In 16 bits the ends are the same number but for ties, which a third of the
    sum of three such numbers meets in one case of six.
    """
    trees, weights_PxK = make_trees(dtype), np.asarray(make_weights())
    merged = method.merge(trees, jnp.asarray(weights_PxK))
    sharp, total = 0, 0
    for leaves in zip(*map(jax.tree.leaves, trees), jax.tree.leaves(merged)):
        *checkpoints, found = map(np.asarray, leaves)
        if not jnp.issubdtype(found.dtype, jnp.floating):
            continue
        for weights_K, values in zip(weights_PxK, found):
            exact = method.reference(checkpoints, weights_K)
            error = method.error(checkpoints, weights_K)
            low, high = ((exact + e).astype(np.float32).astype(dtype) for e in (-error, error))
            assert (low <= values).all()
            assert (values <= high).all()
            sharp += (low == high).sum()
            total += high.size
    if dtype != "float32":
        assert sharp > 0.9 * total  # else the bound would hide a second rounding


@each_method
@each_dtype
def test_one_hot_weights_return_the_checkpoint_bit_for_bit(method, dtype):
    """Signed zeros, subnormals, infinities and NaN too, whatever the other checkpoints hold."""
    info = jnp.finfo(dtype)
    special = [0.0, info.smallest_subnormal, info.tiny, 1.0, 1 / 3, info.max, np.inf, np.nan]
    values = np.array([*special, *(-value for value in special)], dtype)
    for chosen in range(K):
        trees = [
            {"x": jnp.asarray(np.full_like(values, other))} for other in (np.nan, np.inf, -np.inf)
        ]
        trees[chosen] = {"x": jnp.asarray(values)}
        one_hot = jnp.eye(K)
        expected = bits(values)
        np.testing.assert_array_equal(bits(method.merge(trees, one_hot[chosen])["x"]), expected)
        population = method.merge(trees, one_hot[jnp.array([(chosen + 1) % K, chosen])])["x"]
        np.testing.assert_array_equal(bits(population[1]), expected)


@each_method
def test_a_weight_of_zero_leaves_a_checkpoint_out(method):
    """Its NaN and infinities do not reach the merge of the others; with a small weight they do."""
    trees = [{"x": jnp.full(3, value)} for value in (2.0, np.nan, 4.0)]
    np.testing.assert_array_equal(method.merge(trees, jnp.array([0.5, 0, 0.5]))["x"], 3.0)
    np.testing.assert_array_equal(method.merge(trees, jnp.array([0.5, -0.0, 0.5]))["x"], 3.0)
    assert np.isnan(method.merge(trees, jnp.array([0.5, 1e-6, 0.5]))["x"]).all()


@each_method
@each_dtype
def test_jit_equals_eager(method, dtype):
    """Operation by operation gives the same but for products that XLA fuses into sums."""
    trees, weights_K = make_trees(dtype), make_weights()[3]
    compiled = method.merge(trees, weights_K)
    assert_same_bits(
        jax.jit(method.program(trees[0], population=False))(tuple(trees), weights_K), compiled
    )
    # A fused multiply-add leaves out one rounding: both are within the float32 error of the exact
    # value, so within twice that of each other before the one rounding to the dtype.
    half_ulp = float(jnp.finfo(dtype).eps) / 2
    for leaves in zip(*map(jax.tree.leaves, trees), jax.tree.leaves(compiled)):
        *checkpoints, found = leaves
        with jax.disable_jit():
            eager = method.leaf(checkpoints, weights_K)
        assert eager.dtype == found.dtype
        if jnp.issubdtype(found.dtype, jnp.floating):
            error = method.error(list(map(np.asarray, checkpoints)), np.asarray(weights_K))
            exact = np.abs(np.asarray(eager, np.float64))
            apart = np.abs(np.asarray(eager, np.float64) - np.asarray(found, np.float64))
            assert (apart <= 2 * error + 2 * half_ulp * exact * (dtype != "float32")).all()


@each_method
@each_dtype
def test_population_equals_loop(method, dtype):
    """The same bits: each value is the same chain of operations."""
    trees, weights_PxK = make_trees(dtype), make_weights()
    population = method.merge(trees, weights_PxK)
    for p in range(P):
        alone = method.merge(trees, weights_PxK[p])
        assert_same_bits(jax.tree.map(lambda leaf, p=p: leaf[p], population), alone)


@each_method
@each_dtype
@pytest.mark.parametrize("population", [False, True], ids=["one", "population"])
def test_sharded_equals_unsharded(method, dtype, population):
    """The same bits, since no value is computed from more than its own place in the checkpoints."""
    trees = make_trees(dtype)
    weights = make_weights() if population else make_weights()[3]
    sharded = method.merge(place(trees, pop=2, fsdp=2, tensor=2), weights)
    assert_same_bits(jax.device_get(sharded), jax.device_get(method.merge(trees, weights)))


@each_method
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_output_shardings(method, sizes):
    """A merged leaf lies where its checkpoints lie; a population is spread over `pop` besides."""
    trees = place(make_trees(), **sizes)
    one = method.merge(trees, make_weights()[0])
    population = method.merge(trees, make_weights())
    for leaf, alone, many in zip(*map(jax.tree.leaves, (trees[0], one, population))):
        assert alone.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
        spread = NamedSharding(leaf.sharding.mesh, PartitionSpec("pop", *leaf.sharding.spec))
        assert many.sharding.is_equivalent_to(spread, leaf.ndim + 1)
        assert many.shape == (P, *leaf.shape)


@each_method
@pytest.mark.parametrize("population", [False, True], ids=["one", "population"])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_no_collective(method, sizes, population):
    """Nothing moves between devices; q and o have one shape and transposed shardings."""
    trees = place(make_trees(), **sizes)
    weights = make_weights() if population else make_weights()[0]
    program: Any = method.program(trees[0], population=population)
    hlo = program.lower(tuple(trees), weights).compile().as_text()
    assert not COLLECTIVE.findall(hlo)


def test_a_collective_would_be_seen():
    """The search of the test above finds one in a program that has to move data."""
    (tree,) = place(make_trees()[:1], fsdp=2, tensor=4)
    query = tree["layers"]["query"]
    moved = jax.jit(lambda x: 2 * x, out_shardings=tree["layers"]["out"].sharding)
    assert COLLECTIVE.search(moved.lower(query).compile().as_text() or "")


@each_method
def test_second_call_compiles_nothing(method, compilations):
    """Nor do other weights, or another pool of the same shapes."""
    for trees in (make_trees(), place(make_trees(), pop=2, fsdp=2, tensor=2)):
        others = jax.tree.map(jnp.copy, trees)
        for weights in (make_weights(), make_weights()[0]):
            reversed_weights = jnp.flip(weights, -1)
            method.merge(trees, weights)
            before = compilations()
            method.merge(trees, reversed_weights)
            method.merge(others, weights)
            assert compilations() == before


@each_method
def test_first_call_compiles(method, compilations):
    """The counter of the test above counts."""
    method.merge([{"new": jnp.zeros(11)}] * 2, jnp.array([0.5, 0.5]))
    assert compilations() > 0


@each_method
@each_dtype
@pytest.mark.parametrize("sizes", [{}, {"pop": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_a_population_needs_no_temporaries(method, dtype, sizes):
    """Beyond a few scalars per candidate: no wide copy of a leaf, no stack of the checkpoints."""
    leaf = jax.ShapeDtypeStruct((512, 512), dtype)
    placed = shardings({"gate": leaf}, ((".", ("fsdp", "tensor")),), make_mesh(**sizes))
    tree = {"gate": jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed["gate"])}
    program: Any = method.program(tree, population=True)
    weights = jax.ShapeDtypeStruct((P, K), jnp.float32)
    memory = program.lower((tree,) * K, weights).compile().memory_analysis()
    assert memory.output_size_in_bytes >= P * leaf.size * leaf.dtype.itemsize / 8
    # The smallest shard of the smallest dtype is 512 x 512 x 2 / 4 bytes = 128 KiB.
    assert memory.temp_size_in_bytes <= 64 * P * K


@each_dtype
@pytest.mark.parametrize("spare", [False, True])
def test_rows_at_a_time_change_no_bit(dtype, spare):
    """With a zero, a single and an extrapolating weight; all of the memory is written."""
    leaves = [tree["layers"]["gate"] for tree in make_trees(dtype)]
    weights = jnp.concatenate([make_weights(), jnp.eye(K)])
    whole = linear.of_population(linear.weighted_sum, leaves, weights)
    old = [jnp.full((len(weights), *leaves[0].shape), jnp.nan, dtype)] * spare
    for rows in (1, 4, 16):
        merged = linear.of_population(linear.weighted_sum, leaves, weights, rows, *old)
        assert_same_bits(merged, whole)


def test_how_many_rows_at_a_time(monkeypatch):
    """As many as divide the leaf and fit in float32; all where it would gain nothing, or copy."""
    mesh = make_mesh()
    assert linear.rows_at_a_time((32, 11008, 4096), 8, mesh) == 0  # these are CPUs
    monkeypatch.setattr(type(mesh.devices.flat[0]), "platform", "tpu")
    assert linear.rows_at_a_time((32, 11008, 4096), 8, None) == 0
    assert linear.rows_at_a_time((32, 11008, 4096), 8, mesh) == 64  # 8 MiB of float32
    assert linear.rows_at_a_time((3, 96, 2048), 8, mesh) == 96  # 128 would fit, but not into 288
    assert linear.rows_at_a_time((8192, 2**16), 8, mesh) == 32  # the least
    assert linear.rows_at_a_time((64, 256), 8, mesh) == 0
    assert linear.rows_at_a_time((32, 1000, 4096), 8, mesh) == 0
    assert linear.rows_at_a_time((2**24,), 8, mesh) == 0


@each_method
def test_integer_leaves_are_copied(method):
    """Once for one merge, P times for a population; never averaged, whatever the weights."""
    trees = make_trees()
    np.testing.assert_array_equal(method.merge(trees, make_weights()[3])["step"], [0, 1, 2])
    population = method.merge(trees, make_weights())["step"]
    np.testing.assert_array_equal(population, [[0, 1, 2]] * P)
    assert population.dtype == trees[0]["step"].dtype


@each_method
@pytest.mark.parametrize("dtype", ["int32", "bool"])
def test_different_integer_leaves_are_refused(method, dtype):
    """The leaf and the checkpoint are named."""
    trees = [
        {"x": jnp.zeros(2), "steps": {"done": jnp.asarray([0, k == 2], dtype)}} for k in range(K)
    ]
    with pytest.raises(JaxmergeError, match="steps/done") as caught:
        method.merge(trees, jnp.full(K, 1 / K))
    assert "checkpoints 0 and 2" in str(caught.value)


@each_method
@pytest.mark.parametrize("shape", [(2,), (4,), (5, 2), (3, 4), (1,), (1, 1, 3)])
def test_wrong_number_of_weights_is_refused(method, shape):
    """One weight per checkpoint, for one candidate or a population."""
    with pytest.raises(JaxmergeError, match="one weight per checkpoint") as caught:
        method.merge(make_trees(), jnp.ones(shape))
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize("sizes", [{}, {"pop": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_models_given_back_are_written_over(sizes, compilations):
    """The next merge has their memory, none is left of them, and the values are its own."""
    trees = place(make_trees("bfloat16"), **sizes) if sizes else make_trees("bfloat16")
    merge, weights = linear.merger(trees), np.asarray(make_weights())
    first = merge(weights)
    expected = jax.device_get(merge(weights[::-1]))
    before = compilations()
    places = [_addresses(leaf) for leaf in jax.tree.leaves(first)]
    merge.give_back(first)
    second = merge(weights[::-1])
    assert [_addresses(leaf) for leaf in jax.tree.leaves(second)] == places
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
    assert_same_bits(jax.device_get(second), expected)
    merge.give_back(second)
    third = merge(weights)
    assert compilations() == before
    merge.give_back(third)
    assert len(jax.tree.leaves(merge(weights[:2]))[0]) == 2  # of another size: memory of its own
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(third))


def _addresses(leaf: jax.Array) -> list[int]:
    return [shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards]
