"""Layers merged when the model comes to them: the same bits, and no whole merged model anywhere."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from jaxmerge import config as configs
from jaxmerge.errors import JaxmergeError
from jaxmerge.evaluation.batches import Limits
from jaxmerge.evaluation.respond import Responder
from jaxmerge.evaluation.tokenizer import Bytes
from jaxmerge.experiment.prepare import prepare
from jaxmerge.merge.linear import merger
from jaxmerge.merge.rematerialised import RematerialisingMerger
from jaxmerge.planning.compiled import collectives
from jaxmerge.sharding import make_mesh, shardings
from jaxmerge.tasks.requests import Generate, Likelihood, Prompt
from jaxmerge.trees import byte_count
from tests import tiny

# Ordinary, one-hot, with a zero, and one that extrapolates.
WEIGHTS_CxK = np.array(
    [[0.2, 0.3, 0.5], [0.0, 1.0, 0.0], [0.6, 0.0, 0.4], [1.4, -0.7, 0.3]], np.float32
)
WRITE = [Generate(Prompt(text), 6) for text in ("letters", "figures", "nothing", "is said")]
SCORE = [Likelihood(request.prompt, " it is") for request in WRITE]


def _both(mesh, dtype="float32", config=tiny.DECODER):
    """A step's candidates, merged whole and merged late."""
    rules = tiny.model(config).sharding_rules
    trees = [
        jax.device_put(jax.tree.map(lambda x: x.astype(dtype), tree), shardings(tree, rules, mesh))
        for tree in tiny.trees(3, config)
    ]
    mergers = merger(trees), RematerialisingMerger(trees, tiny.model(config).layers)
    return [merge(WEIGHTS_CxK) for merge in mergers], trees


def _responder(mesh, vmap_candidates, config=tiny.DECODER):
    limits = Limits(rows=4)
    return Responder(tiny.model(config), Bytes(), mesh, limits, vmap_candidates=vmap_candidates)


@pytest.mark.parametrize(
    ("sizes", "dtype", "vmap_candidates"),
    [({}, "float32", 1), ({"pop": 2, "fsdp": 2, "tensor": 2}, "bfloat16", 2)],
    ids=str,
)
def test_the_same_bits(sizes, dtype, vmap_candidates):
    """The merge is exact, and what follows is the same program: there is nothing to tolerate."""
    mesh = make_mesh(**sizes)
    (whole, late), _ = _both(mesh, dtype)
    responder = _responder(mesh, vmap_candidates)
    prepared = responder.prepare([*WRITE, *SCORE])
    expected, found = (
        jax.tree.leaves(jax.block_until_ready(responder.launch(prepared, merged)))
        for merged in (whole, late)
    )
    for one, other in zip(found, expected, strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    answers = responder.answers(prepared, responder.launch(prepared, late), len(WEIGHTS_CxK))
    assert len(set(answers.responses)) == len(WEIGHTS_CxK)


def test_no_whole_merged_model_and_no_collective_of_the_merge():
    """Of 16 layers of a candidate no more than two are held, on each device its share of them."""
    config = dataclasses.replace(tiny.DECODER, layers=16, width=32, feed_forward=256, vocab=256)
    mesh = make_mesh(fsdp=2, tensor=2)
    (whole, late), trees = _both(mesh, config=config)
    layer = byte_count(trees[0]["layers"]) // 16 // 4
    (group,) = _responder(mesh, 1, config).encode(WRITE).groups
    arrays = group.microbatches[0].arrays
    program: Any = group.program
    ordinary, rematerialised = (
        program.lower(merged, *arrays).compile() for merged in (whole, late)
    )
    one, other = (each.memory_analysis().temp_size_in_bytes for each in (ordinary, rematerialised))
    # Of the merged models that are there, a map takes one out at a time: all of its 16 layers.
    assert other - (one - 16 * layer) < 2 * layer
    assert collectives(rematerialised.as_text()) == collectives(ordinary.as_text())


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config on a tiny pool."""
    config = tiny.run_config(configs.default(), tiny.pool(tmp_path_factory.mktemp("pool")))
    config.objective.tasks, config.heldout = ("generation",), ()
    return config


def test_a_run_scores_and_exports_the_same(config, tmp_path):
    """By the config alone; on a mesh, from prepared evaluators and leaves for the export."""
    config.mesh.fsdp = 2
    found = []
    for late in (False, True):
        config.merge.rematerialise = late
        prepared = prepare(config, str(tmp_path))  # the directory may be gone on with either way
        prepared.directory.close()
        leaf = prepared.pool.merged(WEIGHTS_CxK[0])("layers/query")
        steps = prepared.evaluators["search"].steps(WEIGHTS_CxK[[0, 3]])
        scores = np.concatenate([step.scores["generation"] for step in steps])
        found.append((scores.tobytes(), np.asarray(leaf).tobytes()))
    assert found[0] == found[1]


def test_what_cannot_be_merged_late_is_refused(config, tmp_path):
    config.merge.rematerialise, config.pool.residency = True, "disk"
    with pytest.raises(JaxmergeError, match="from a pool on the device only"):
        prepare(config, str(tmp_path))
    config.pool.residency, config.pool.model = "device", "tests.tiny:plain_apply"
    with pytest.raises(JaxmergeError, match="needs all its parameters at once"):
        prepare(config, str(tmp_path))
