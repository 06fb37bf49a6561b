"""Pools stored as a base and quantised differences: values, bits, shardings, what a run says."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest

from jaxmerge import config as configs
from jaxmerge.checkpoints import orbax
from jaxmerge.checkpoints.pool import load
from jaxmerge.checkpoints.survey import survey
from jaxmerge.errors import JaxmergeError
from jaxmerge.experiment import evaluate as scoring
from jaxmerge.experiment.search import search as run
from jaxmerge.merge.differences import (
    BITS,
    Difference,
    QuantisedMerger,
    block_size,
    dequantised,
    quantised,
    stored_bytes,
    stored_sum,
)
from jaxmerge.merge.leafwise import LeafwiseMerger
from jaxmerge.planning.estimate import arithmetic
from jaxmerge.planning.work import Step, placed
from jaxmerge.sharding import make_mesh
from jaxmerge.trees import named_leaves
from tests import tiny
from tests.checkpoints.pool_test import SHARDING_RULES, make_tree
from tests.command import ROOT
from tests.merge.linear_test import (
    COLLECTIVE,
    assert_same_bits,
    bits,
    make_trees,
    make_weights,
    place,
)

each_storage = pytest.mark.parametrize("storage", BITS)
SHAPE = (3, 4, 256)  # blocks of 64, also where the last axis is cut in four


def make_pool(storage: str, *, placed: bool = False) -> tuple[list[Any], QuantisedMerger]:
    """Three trees with a leaf of several blocks beside those that are kept exact, and the merge."""
    trees = make_trees("bfloat16")
    for k, tree in enumerate(trees):
        values = np.random.default_rng(10 + k).normal(size=SHAPE)
        values[0, 0, :64] = 1 / 3  # a block without a difference
        tree["layers"]["gate"] = jnp.asarray(values, "bfloat16")
    trees = place(trees, pop=2, fsdp=2, tensor=2) if placed else trees
    named = [named_leaves(tree) for tree in trees]
    others = [
        {name: quantised(leaf, named[0][name], storage) for name, leaf in tree.items()}
        for tree in named[1:]
    ]
    exact = LeafwiseMerger(trees[0], lambda k, name: named[k][name], len(trees))
    return trees, QuantisedMerger(trees[0], others, exact)


@each_storage
def test_differences_are_off_by_half_a_step(storage):
    """Of their block's scale; what is written is made of whole steps of the right width."""
    rng = np.random.default_rng(0)
    leaf, base = (jnp.asarray(rng.normal(size=SHAPE), jnp.float32) for _ in range(2))
    kept = quantised(leaf, base, storage)
    assert isinstance(kept, Difference)
    step = np.repeat(np.asarray(kept.scales), 64, axis=-1)
    exact = np.asarray(leaf, np.float64) - np.asarray(base, np.float64)
    # Half a step, and the rounding in float32 of the difference and of scale times value.
    assert (abs(np.asarray(dequantised(kept), np.float64) - exact) <= step / 2 + 1e-6).all()
    most = 2 ** (BITS[storage] - 1) - 1
    np.testing.assert_allclose(
        kept.scales, abs(exact).reshape(*SHAPE[:-1], -1, 64).max(-1) / most, rtol=1e-6
    )
    stored = stored_bytes(leaf, 2, storage) - stored_bytes(leaf, 1, storage)
    assert kept.values.nbytes + kept.scales.nbytes == stored


@each_storage
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equals_the_float64_sum_of_what_is_stored(storage, dtype):
    """Rounded once, but for the 2 K + 1 roundings to float32 on the way."""
    rng = np.random.default_rng(1)
    base, *rest = (jnp.asarray(rng.normal(size=SHAPE), dtype) for _ in range(3))
    kept = [quantised(leaf, base, storage) for leaf in rest]
    parts = [np.asarray(dequantised(e), np.float64) for e in kept if isinstance(e, Difference)]
    for weights_K in np.asarray(make_weights()):
        terms = [weights_K.astype(np.float64).sum() * np.asarray(base, np.float64)]
        terms += [w * part for w, part in zip(weights_K[1:].astype(np.float64), parts)]
        error = 7 * 2.0**-24 * (sum(map(abs, terms)) + abs(weights_K).sum() * abs(terms[0]))
        found = np.asarray(stored_sum(base, kept, jnp.asarray(weights_K)))
        low, high = ((sum(terms) + e).astype(np.float32).astype(dtype) for e in (-error, error))
        assert (low <= found).all()
        assert (found <= high).all()


@each_storage
def test_the_base_alone_is_exact_and_the_others_are_what_is_stored(storage):
    """Bit for bit: subnormal values and a NaN in what has no weight do not matter."""
    special = np.array([1e-40, -0.0, np.finfo(np.float32).max, 1 / 3] * 16, np.float32)
    base, other = jnp.asarray(special), jnp.ones(64, jnp.float32)
    kept = quantised(other, base * 0, storage)
    assert isinstance(kept, Difference)
    found = stored_sum(base, [kept._replace(scales=kept.scales * np.nan)], jnp.array([1.0, 0.0]))
    np.testing.assert_array_equal(bits(found), bits(special))
    found = stored_sum(base * 0, [kept], jnp.array([0.0, 1.0]))
    np.testing.assert_array_equal(found, dequantised(kept))


@each_storage
def test_sharded_equals_unsharded(storage, compilations):
    """The same bits on 8 devices, without a collective, and nothing is compiled a second time."""
    weights = np.asarray(make_weights())
    _, alone = make_pool(storage)
    _, spread = make_pool(storage, placed=True)
    expected, found = alone(weights), spread(weights)
    assert_same_bits(jax.device_get(found), jax.device_get(expected))
    text = spread.program.lower(*spread.stored, jnp.asarray(weights)).compile().as_text()
    assert not COLLECTIVE.findall(text)
    before = compilations()
    assert_same_bits(jax.device_get(spread(weights[::-1]))["odd"][::-1], found["odd"])
    assert compilations() == before


@each_storage
def test_jit_equals_eager(storage):
    """But for what XLA rounds otherwise within float32, which one rounding to bfloat16 may show."""
    _, merge = make_pool(storage)
    base, others = merge.stored
    weights_K = make_weights()[3]
    found = merge(np.asarray(weights_K)[None])["layers"]["gate"][0]
    with jax.disable_jit():
        name = "layers/gate"
        eager = stored_sum(base[name], [other[name] for other in others], weights_K)
    np.testing.assert_allclose(
        np.asarray(found, np.float32), np.asarray(eager, np.float32), rtol=2**-7, atol=1e-6
    )


def test_what_is_kept_exact():
    """Leaves whose last axis has no blocks, and those that are not floating point."""
    assert block_size(jnp.zeros((2, 48))) == 16
    assert block_size(jnp.zeros((2, 64 * 5))) == 64
    for leaf in (jnp.zeros(()), jnp.zeros((64, 8)), jnp.zeros(64, jnp.int32)):
        assert block_size(leaf) == 0
        assert quantised(leaf, leaf, "int8") is leaf
        assert stored_bytes(leaf, 3, "int4") == 3 * leaf.nbytes
    assert stored_bytes(jnp.zeros((2, 64)), 3, "exact") == 3 * 2 * 64 * 4


@each_storage
def test_a_loaded_pool(tmp_path, storage):
    """Holds what is planned and no checkpoint; records and single merges are of the exact ones."""
    for k in range(3):
        gate = np.random.default_rng(k).normal(size=(8, 256))
        orbax.save(tmp_path / str(k), make_tree(k, gate=jnp.asarray(gate, jnp.bfloat16)))
    sources, mesh = survey([f"{tmp_path}/*"]), make_mesh(pop=2, fsdp=2, tensor=2)
    exact = load(sources, mesh, SHARDING_RULES)
    pool = load(sources, mesh, SHARDING_RULES, storage=storage)
    assert pool.records == exact.records
    assert isinstance(pool.merge, QuantisedMerger)
    assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(pool.trees))
    device = mesh.devices.flat[0]
    held = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(pool.merge.stored)
        for shard in leaf.addressable_shards
        if shard.device == device
    )
    # The base stands in for what is kept exact of the others: integers and leaves without blocks.
    step = Step(placed(sources[0].abstract, SHARDING_RULES, mesh), 3, 2, mesh)
    assert held == arithmetic(step._replace(storage=storage)).pool
    assert held < arithmetic(step).pool

    weights_K = np.array([0.25, -0.5, 1.25], np.float32)
    merged, expected = pool.merged(weights_K), exact.merged(weights_K)
    for name in named_leaves(exact.trees[0]):
        assert_same_bits(jax.device_get(merged(name)), jax.device_get(expected(name)))
    found = pool.merge(np.stack([weights_K] * 2))
    off = np.asarray(found["gate"][0], np.float64) - np.asarray(expected("gate"), np.float64)
    norm = np.linalg.norm(off) / np.linalg.norm(np.asarray(expected("gate"), np.float64))
    error = pool.stored_error(weights_K)
    assert error is not None
    assert (error["kind"], error["leaf"]) == (storage, "gate")
    np.testing.assert_allclose(error["worst"], norm, rtol=1e-5)  # sums of squares in float32
    assert 0 < error["mean"] < error["worst"]
    assert exact.stored_error(weights_K) is None


def test_a_run(tmp_path):
    """Scores merges of what is stored, exports the exact one, and says how far they are apart."""
    config = tiny.run_config(configs.default(), tiny.pool(tmp_path / "models"))
    config.pool.storage, config.search.budget, config.baselines, config.heldout = "int8", 4, (), ()
    config.objective.test_examples = 4
    found = run(config, str(tmp_path / "run"))
    schema = json.loads((ROOT / "jaxmerge/report/results.schema.json").read_text())
    jsonschema.validate(found, schema)
    assert found["storage"]["kind"] == "int8"
    # Differences of leaves of random models are of the size of the leaves; so are half steps.
    assert 0 < found["storage"]["worst"] < 0.05
    assert found["storage"]["scores"].keys() == {*config.objective.tasks}
    config.pool.checkpoints, config.pool.storage = (f"{tmp_path}/run/merged/orbax",), "exact"
    [alone] = scoring.evaluate(config, str(tmp_path / "alone"))["checkpoints"]
    for task, both in found["storage"]["scores"].items():
        assert both == {"stored": found["best"]["test"][task], "exact": alone["test"][task]}
    assert "int8" in (tmp_path / "run" / "report.html").read_text()
    sources = survey([f"{tmp_path}/models/*"])
    exact = load(sources, make_mesh(), ()).merged(list(found["best"]["weights"].values()))
    written = load(survey([f"{tmp_path}/run/merged/orbax", sources[0].path]), make_mesh(), ())
    for name, leaf in named_leaves(written.trees[0]).items():
        assert np.asarray(leaf).tobytes() == np.asarray(exact(name)).tobytes()


def test_elsewhere_than_on_the_devices_is_refused():
    """Before anything is loaded."""
    config = configs.default()
    config.pool.checkpoints, config.objective.tasks = ("a", "b"), ("sorting",)
    config.pool.storage, config.pool.residency = "int4", "disk"
    with pytest.raises(JaxmergeError, match="merged on the devices"):
        configs.check(config)
