"""Wherever the pool lives, merges are the same bit for bit; and what was read is counted."""

import json

import jax
import numpy as np
import pytest

from jaxmerge import config as configs
from jaxmerge.checkpoints import orbax
from jaxmerge.checkpoints.pool import RESIDENCIES, load
from jaxmerge.checkpoints.survey import survey
from jaxmerge.errors import JaxmergeError
from jaxmerge.experiment.search import search as run
from jaxmerge.merge.leafwise import LeafwiseMerger
from jaxmerge.sharding import make_mesh
from jaxmerge.trees import named_leaves
from tests import tiny
from tests.checkpoints.pool_test import SHARDING_RULES, make_tree

ELSEWHERE = [residency for residency in RESIDENCIES if residency != "device"]
WEIGHTS = np.array(
    [[0.2, 0.3, 0.5], [0.0, 1.0, 0.0], [0.5, 0.0, 0.5], [1.5, -0.25, -0.25]], np.float32
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pool")
    for k, name in enumerate("abc"):
        orbax.save(directory / name, make_tree(k), architecture={"model": "toy"})
    return survey([str(directory / "*")])


@pytest.fixture(scope="module", params=[{"fsdp": 2, "tensor": 2}, {"pop": 2, "fsdp": 2}], ids=str)
def mesh(request):
    return make_mesh(**request.param)


def _same(tree, other) -> None:
    for (name, leaf), (_, expected) in zip(
        named_leaves(tree).items(), named_leaves(other).items(), strict=True
    ):
        assert leaf.dtype == expected.dtype, name
        assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim), name
        assert np.asarray(leaf).tobytes() == np.asarray(expected).tobytes(), name


@pytest.mark.parametrize("dtype", ["", "bfloat16"])
@pytest.mark.parametrize("residency", ELSEWHERE)
def test_the_same_bits(sources, mesh, residency, dtype):
    near = load(sources, mesh, SHARDING_RULES, dtype=dtype)
    far = load(sources, mesh, SHARDING_RULES, dtype=dtype, residency=residency)
    assert far.records == near.records
    _same(far.merge(WEIGHTS), near.merge(WEIGHTS))
    merged = far.merged(WEIGHTS[0]), near.merged(WEIGHTS[0])
    for name in named_leaves(near.trees[0]):
        _same({"leaf": merged[0](name)}, {"leaf": merged[1](name)})


@pytest.mark.parametrize("residency", ELSEWHERE)
def test_nothing_stays_on_the_devices(sources, residency):
    pool = load(sources, make_mesh(), SHARDING_RULES, residency=residency)
    for leaf in jax.tree.leaves(pool.trees):
        on_device = isinstance(leaf, jax.Array) and leaf.sharding.memory_kind == "device"
        assert not on_device


def test_what_no_candidate_wants_is_not_read(sources):
    pool = load(sources, make_mesh(), SHARDING_RULES, residency="disk")
    assert pool.traffic() == {"kind": "disk", "bytes_read": 0, "seconds": 0.0}
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(make_tree(0))]
    integers = make_tree(0)["steps"].nbytes
    pool.merge(np.array([[0.0, 1.0, 0.0]], np.float32))
    once = pool.traffic()
    assert once["bytes_read"] == sum(sizes)
    assert once["seconds"] > 0
    pool.merge(np.array([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]], np.float32))
    twice = pool.traffic()["bytes_read"] - once["bytes_read"]
    assert twice == 2 * sum(sizes) - integers  # those are copied from one checkpoint


def test_the_second_merge_compiles_nothing(sources, compilations):
    pool = load(sources, make_mesh(pop=2), SHARDING_RULES, residency="disk")
    pool.merge(WEIGHTS)
    before = compilations()
    pool.merge(WEIGHTS[::-1])
    assert compilations() == before


def test_no_collective(sources, mesh):
    pool = load(sources, mesh, SHARDING_RULES, residency="disk")
    assert isinstance(pool.merge, LeafwiseMerger)
    for text in pool.merge.programs(len(WEIGHTS)):
        for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
            assert collective not in text


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny.pool(tmp_path_factory.mktemp("models"))


def _run(models, workdir, residency):
    config = tiny.run_config(configs.default(), models)
    config.pool.residency = residency
    return run(config, str(workdir))


def test_a_run_is_the_same(models, tmp_path):
    found = {each: _run(models, tmp_path / each, each) for each in RESIDENCIES}
    logs = [tiny.log(tmp_path / each) for each in RESIDENCIES]
    assert logs[1:] == logs[:1] * (len(logs) - 1)
    for residency, results in found.items():
        assert results["residency"]["kind"] == residency
        assert (results["residency"]["bytes_read"] > 0) == (residency != "device")
        assert results["best"] == found["device"]["best"]


def test_a_run_goes_on_from_elsewhere(models, tmp_path):
    _run(models, tmp_path, "device")
    log = tmp_path / "candidates.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:7]))
    found = _run(models, tmp_path, "disk")
    assert [json.loads(line)["weights"] for line in lines] == [
        line["weights"] for line in tiny.log(tmp_path)
    ]
    assert any("pool.residency: 'device' there, 'disk' now" in text for text in found["warnings"])


def test_an_unknown_residency_is_refused(models, tmp_path):
    with pytest.raises(JaxmergeError, match="unknown choice") as caught:
        _run(models, tmp_path, "tape")
    assert caught.value.where == "pool.residency"
    assert caught.value.expected == ", ".join(("auto", *RESIDENCIES))
