"""The merge of one tensor by every method of the table."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxmerge.errors import JaxmergeError
from jaxmerge.merge import draws, geometry, methods, selection, task_vectors
from jaxmerge.merge.methods import METHODS, merge_tensor
from jaxmerge.sharding import make_mesh
from tests.merge.methods_reference import REFERENCES, threefry
from tests.merge.methods_reference import draws as reference_draws

SHAPE, NAME, SEED = (16, 24), "model.layers.3.mlp.up_proj.weight", 2**40 + 7
COLLECTIVE = re.compile(r"\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)")

# Genes other than the defaults; names of cases after the method's.
CASES: dict[str, Mapping[str, Any]] = {
    "linear": {"weight": (0.5, 0.3, 0.4)},
    "linear free": {"weight": (1.5, -0.9, 0.4), "normalize": False},
    "slerp": {"t": 0.3},
    "nuslerp": {"weight": (0.5, 0.3)},
    "nuslerp rows": {"weight": (0.5, 0.3), "nuslerp_flatten": False},
    "nuslerp columns": {"weight": (1, 3), "nuslerp_flatten": False, "nuslerp_row_wise": True},
    "multislerp": {"weight": (0.5, 0.3, 0.4)},
    "karcher": {},
    "task_arithmetic": {"weight": (0.5, 0.3, -0.4), "lambda": 1.3},
    "task_arithmetic mean": {"weight": (0.5, 0.3, 0.4), "normalize": True},
    "ties": {"weight": (0.5, 0.3, 0.4), "density": (0.5, 0.2, 0.7), "lambda": 1.3},
    "ties sum": {"weight": (0.5, 0, -0.4), "density": 0.4, "normalize": False, "rescale": True},
    "dare_linear": {"weight": (0.5, 0.3, 0.4), "density": (0.5, 0.2, 0.7)},
    "dare_ties": {"weight": (0.5, 0.3, 0.4), "density": 0.6},
    "della": {"weight": (0.5, 0.3, 0.4), "density": (0.5, 0.2, 0.7), "epsilon": 0.4},
    "della_linear": {"weight": (0.5, 0.3, 0.4), "density": 0.9, "epsilon": 0.3},
    "breadcrumbs": {"weight": (0.5, 0.3, 0.4), "density": (0.5, 0.2, 0.97), "gamma": 0.1},
    "breadcrumbs_ties": {"weight": (0.5, 0.3, 0.4), "density": 0.6, "gamma": (0.001, 0.1, 0)},
    "sce": {"select_topk": 0.3},
    "sce all": {},
    "ram": {"epsilon": 0.05},
    "ramplus_tl": {"epsilon": 0.1, "alpha": 0.9, "r": 0.5},
    "model_stock": {},
    "model_stock rows": {"filter_wise": True},
    "metagpt": {},
    "nearswap": {"t": 0.05},
    "arcee_fusion": {},
    "passthrough": {"scale": 1.25},
}
# What is merged as deltas where a base may be given.
WITH_BASE = {"nuslerp", "nuslerp rows", "multislerp"}
each_case = pytest.mark.parametrize("case", CASES)
each_method = pytest.mark.parametrize("case", METHODS)  # the case of the same name


def method_of(case: str) -> str:
    return case.split()[0]


def make_tensors(case: str, dtype: str = "float32") -> tuple[list[Any], Any]:
    """As many as the method takes, and the base where it takes one."""
    row = METHODS[method_of(case)]
    rng = np.random.default_rng(3)
    base = rng.normal(size=SHAPE)
    # Fine-tunes that have something in common.
    common = rng.normal(size=SHAPE)
    tensors = [
        base + 0.1 * common + 0.1 * rng.normal(size=SHAPE) for _ in range(row.inputs[1] or 3)
    ]
    with_base = row.base == "required" or case in WITH_BASE
    return [jnp.asarray(x, dtype) for x in tensors], jnp.asarray(base, dtype) if with_base else None


def merge(case: str, tensors: Any, base: Any, **rest: Any) -> jax.Array:
    rest = {"name": NAME, "seed": SEED, **rest}
    return merge_tensor(method_of(case), tensors, base, CASES[case], **rest)


def full_genes(case: str) -> dict[str, Any]:
    """All genes as the reference takes them: the given float64 ones, those of a checkpoint [K]."""
    row = METHODS[method_of(case)]
    genes: dict[str, Any] = {gene.name: gene.default for gene in row.genes} | dict(CASES[case])
    count = row.inputs[1] or 3
    return {
        gene.name: np.broadcast_to(genes[gene.name], count)
        if gene.per_checkpoint
        else genes[gene.name]
        for gene in row.genes
    }


def on_mesh(values: Any) -> Any:
    place = NamedSharding(make_mesh(fsdp=4, tensor=2), PartitionSpec("fsdp", "tensor"))
    return jax.device_put(values, place)


def assert_same_bits(found: Any, expected: Any) -> None:
    assert found.dtype == expected.dtype
    one, two = (np.asarray(x).view(np.uint8) for x in (found, expected))
    np.testing.assert_array_equal(one, two)


def test_every_method_has_a_case():
    assert {method_of(case) for case in CASES} == set(METHODS) == set(REFERENCES)
    assert set(METHODS) <= set(CASES)


@each_case
def test_equals_the_float64_reference(case):
    """Up to 16 roundings of the largest float32 value that goes into a place.

    A mask that differs at one place would be off by a delta, about 0.1.
    """
    tensors, base = make_tensors(case)
    found = merge(case, tensors, base)
    wide = [np.asarray(x, np.float64) for x in tensors]
    wide_base = None if base is None else np.asarray(base, np.float64)
    draw = reference_draws(SEED, NAME)
    expected = REFERENCES[method_of(case)](wide, wide_base, full_genes(case), draw)
    largest = max(np.abs(x).max() for x in [*wide, expected])
    np.testing.assert_allclose(
        np.asarray(found, np.float64), expected, rtol=0, atol=largest * 2**-20
    )
    inputs = wide if wide_base is None else [*wide, wide_base]
    assert case == "arcee_fusion" or all(np.abs(expected - x).max() > 0.01 for x in inputs)


@each_method
def test_one_program_on_a_mesh_equals_eager_on_one_device(case):
    """The same bits: thresholds, draws, norms and angles too."""
    tensors, base = make_tensors(case, "bfloat16")
    numbers, choices = methods.complete(method_of(case), CASES[case], len(tensors))

    @jax.jit
    def program(tensors: Any, base: Any, numbers: Any) -> Any:
        genes = {**numbers, **choices}
        return merge_tensor(method_of(case), tensors, base, genes, name=NAME, seed=SEED)

    found = program(*on_mesh((tensors, base)), numbers)
    assert_same_bits(found, merge(case, tensors, base))


@each_method
def test_second_call_compiles_nothing(case, compilations):
    """Nor do other genes, another name, another seed."""
    tensors, base = make_tensors(case)
    genes = full_genes(case)
    other = {
        name: gene if isinstance(gene, bool) else np.asarray(gene) * 0.75
        for name, gene in genes.items()
    }
    merge_tensor(method_of(case), tensors, base, genes, name="one")
    before = compilations()
    merge_tensor(method_of(case), tensors, base, other, name="two", seed=5)
    assert compilations() == before


@pytest.mark.parametrize("case", ["slerp", "multislerp", "ties", "sce", "nearswap"])
def test_rounds_once(case):
    """What float32 gives for the same values, rounded."""
    tensors, base = make_tensors(case, "bfloat16")
    wide = [x.astype(jnp.float32) for x in tensors]
    exact = merge(case, wide, None if base is None else base.astype(jnp.float32))
    assert_same_bits(merge(case, tensors, base), exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "slerp", "nuslerp", "multislerp"])
def test_one_hot_weights_return_the_checkpoint_bit_for_bit(method, dtype):
    """With the base at 0, and whatever the other one holds."""
    tensors, base = make_tensors(method, dtype)
    count = len(tensors)
    for k in range(count):
        one_hot = np.eye(count)[k]
        genes = {"t": float(k)} if method == "slerp" else {"weight": one_hot}
        assert_same_bits(merge_tensor(method, tensors, base, genes, name=NAME), tensors[k])
    (kept,) = make_tensors("passthrough", dtype)[0]
    assert_same_bits(merge_tensor("passthrough", [kept], None, {}, name=NAME), kept)


@pytest.mark.parametrize("case", ["linear", "model_stock", "nuslerp rows"])
def test_combinations_have_no_collective(case):
    """The sum itself; the geometry has to add up over the mesh."""
    tensors, base = on_mesh(make_tensors(case))
    genes = full_genes(case)
    found = methods.coefficients(method_of(case), "paper", _arrays(genes), tensors, base)
    axis = methods.vector_axis(genes, 2)
    program: Any = methods._combined
    hlo = program.lower(tuple(tensors), base, found, axis=axis).compile().as_text()
    assert not COLLECTIVE.findall(hlo)
    if METHODS[method_of(case)].geometry:
        program = geometry._anywhere
        hlo = program.lower(tuple(tensors), base, axis=axis).compile().as_text()
        assert COLLECTIVE.search(hlo)


def _arrays(genes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: gene if isinstance(gene, bool) else jnp.asarray(gene, jnp.float32)
        for name, gene in genes.items()
    }


def test_thresholds_and_draws_keep_no_copy_of_the_tensor():
    """On CPUs, too."""
    leaf, size = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16), 512 * 512
    key = jnp.asarray(draws.key(SEED, NAME))

    def found(tensor: Any, base: Any, chance: Any) -> Any:
        def magnitude(stored: Any) -> Any:
            return jnp.abs(stored[0].astype(jnp.float32) - stored[1].astype(jnp.float32))

        largest = selection.largest(magnitude, (tensor, base), selection.share(chance, size))
        drawn = draws.drawn(chance, key, jnp.uint32(1), (512, 512))
        return jnp.where(drawn & largest(magnitude((tensor, base))), tensor, base)

    chance = jax.ShapeDtypeStruct((), jnp.float32)
    memory: Any = jax.jit(found).lower(leaf, leaf, chance).compile().memory_analysis()
    assert memory.temp_size_in_bytes < size  # bytes: half of the tensor's own


def test_draws_are_threefry_of_seed_name_checkpoint_and_place():
    """Every value by itself, so that a part of a tensor has the same."""
    # The known answer of Random123's tests for zeros, and for ones.
    assert threefry(0, 0, 0, 0) == (0x6B200159, 0x99BA4EFE)
    assert threefry(*[2**32 - 1] * 4) == (0x1CB996FC, 0xBB002BE7)
    key = draws.key(SEED, NAME)
    drawn = jax.jit(lambda chance: draws.drawn(chance, jnp.asarray(key), jnp.uint32(2), SHAPE))
    found = drawn(np.float32(0.4))
    np.testing.assert_array_equal(found, reference_draws(SEED, NAME)(2, SHAPE) < np.float32(0.4))
    assert not drawn(np.float32(0)).any()
    assert drawn(np.float32(1)).all()


def test_draws_have_the_mean_of_the_deltas():
    """Both DARE and DELLA, whose rows are of unlike size: over 400 seeds within five deviations."""
    tensors, base = make_tensors("dare_linear")
    assert base is not None
    seeds = range(400)
    for case in ("dare_linear", "della_linear"):
        genes = {"weight": (1, 0, 0), "density": 0.4}
        merged = [
            np.asarray(merge_tensor(case, tensors, base, genes, name=NAME, seed=seed))
            for seed in seeds
        ]
        delta = np.asarray(tensors[0] - base)
        # Of each value: delta / p with probability p, which is 0.325 at least.
        deviation = np.abs(delta) * np.sqrt(1 / 0.325 - 1) / np.sqrt(len(seeds))
        assert (np.abs(np.mean(merged, axis=0) - np.asarray(tensors[0])) < 5 * deviation).all()


def test_equal_deltas_share_their_rank():
    """In a row, from 0 to 1."""
    values = jnp.array([[3.0, 1, 1, 2, 0], [5, 5, 5, 5, 5]])
    np.testing.assert_array_equal(
        jax.jit(task_vectors.rank)(values), [[1, 0.375, 0.375, 0.75, 0], [0.5] * 5]
    )


@pytest.mark.parametrize("case", ["multislerp", "nuslerp", "karcher", "ties", "sce", "metagpt"])
def test_unchanged_tensors_stay(case):
    """Where nothing was trained the result is the base, not NaN."""
    tensors, base = make_tensors(case, "bfloat16")  # float32 sums of equal values round
    kept = tensors[0] if base is None else base
    np.testing.assert_array_equal(merge(case, [kept] * len(tensors), base), kept)


@pytest.mark.parametrize("case", ["ties", "della", "slerp", "arcee_fusion"])
def test_a_number_and_nothing_at_all(case):
    """Tensors of no dimension, and without values."""
    tensors, base = make_tensors(case)
    for cut in (lambda x: x[0, 0], lambda x: x[:0]):
        few = [cut(x) for x in tensors]
        found = merge(case, few, None if base is None else cut(base))
        assert found.shape == few[0].shape
        assert np.isfinite(found).all()


def test_checkpoints_that_pull_apart_give_the_base():
    """By Model Stock; and TIES elects no sign where deltas cancel."""
    _, base = make_tensors("model_stock")
    assert base is not None
    base = jnp.round(4 * base) / 4
    tensors = [base + 1, base - 1]
    for method, genes in (("model_stock", {}), ("ties", {"weight": 1})):
        np.testing.assert_array_equal(merge_tensor(method, tensors, base, genes, name="x"), base)


def test_a_weight_of_zero_has_no_vote():
    tensors, base = make_tensors("ties")
    two = merge_tensor("ties", tensors[:2], base, {"weight": (0.5, 0.3)}, name="x")
    three = merge_tensor("ties", tensors, base, {"weight": (0.5, 0.3, 0)}, name="x")
    np.testing.assert_array_equal(two, three)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("no such", 2, True, {}), "unknown choice"),
        (("slerp", 3, False, {"t": 0.5}), "takes another number of checkpoints"),
        (("ties", 2, False, {"weight": 1}), "differences from a base"),
        (("linear", 2, True, {"weight": 1}), "takes no base"),
        (("ties", 2, True, {}), "merge.genes.weight"),
        (("ties", 2, True, {"weight": (1, 2, 3)}), "one number for each checkpoint"),
        (("ties", 2, True, {"weight": 1, "densty": 1}), "densty"),
        (("ties", 2, True, {"weight": 1, "normalize": 1}), "True or False"),
        (("nearswap", 1, True, {"t": (0.1, 0.2)}), "one number"),
    ],
)
def test_what_can_not_be_is_refused(call, message):
    method, count, with_base, genes = call
    tensors = [jnp.zeros(3)] * count
    with pytest.raises(JaxmergeError, match=re.escape(message)):
        merge_tensor(method, tensors, tensors[0] if with_base else None, genes, name="x")


def test_tensors_that_can_not_be_merged_are_refused():
    unlike, integers, wide = [np.zeros(3), np.zeros(4)], [np.zeros(3, int)] * 2, [np.zeros(3)] * 2
    for tensors in (unlike, integers, wide):
        with pytest.raises(JaxmergeError, match=r"model\.norm"):
            merge_tensor("linear", tensors, None, {"weight": 1}, name="model.norm")


def test_the_table():
    """What its rows promise of each other."""
    for name, row in METHODS.items():
        assert dataclasses.is_dataclass(row)
        assert row.kind == "combination" or row.base == "required", name
        for gene in row.genes:
            assert gene.low < gene.high
            if gene.default is not None:
                assert gene.low <= gene.default <= gene.high, (name, gene.name)
        assert row.rule.__doc__


def test_the_guide_has_the_table():
    """docs/merging.md; where it fails, these are the rows."""
    text = (Path(__file__).parents[2] / "docs" / "merging.md").read_text()
    for name, row in METHODS.items():
        assert in_words(name, row) in text, in_words(name, row)


def in_words(name: str, row: methods.Method) -> str:
    """A row of the guide: checkpoints, base, genes with their defaults, source."""
    least, most = row.inputs
    count = str(least) if most == least else f"{least} or more"
    base = {"none": "", "optional": "if there is one", "required": "yes"}[row.base]
    genes = [
        gene.name
        if gene.default is None
        else f"{gene.name} {gene.default:g}"
        if not isinstance(gene.default, bool)
        else f"{gene.name} {gene.default}"
        for gene in row.genes
        if gene.name != "weight"
    ]
    weights = "yes" if any(gene.name == "weight" for gene in row.genes) else ""
    return f"| `{name}` | {count} | {base} | {weights} | {', '.join(genes)} | {row.paper} |"
