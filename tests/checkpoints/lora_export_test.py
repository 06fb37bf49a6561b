"""Merges of adapters as one adapter: what our own reader and peft make of it is the merge."""

from pathlib import Path

import numpy as np
import pytest
from etils import epath

from jaxmerge import config as configs
from jaxmerge.checkpoints import lora_export
from jaxmerge.checkpoints.survey import READERS, survey
from jaxmerge.errors import JaxmergeError
from jaxmerge.experiment.merge import merge
from jaxmerge.merge.groups import groups
from jaxmerge.trees import named_leaves
from tests.checkpoints.lora_test import describe, make_adapter, make_base, merged_by_peft

# Float32 factors of rank up to 12, and the members' own products, in other orders: see lora_test.
TOLERANCE = 6e-6
MEMBERS = {
    "attention": {"target_modules": ["q_proj", "v_proj"], "r": 4},
    "wide": {"target_modules": ["q_proj", "up_proj", "lm_head"], "r": 8, "use_rslora": True},
    "saved": {"target_modules": ["k_proj"], "r": 2, "modules_to_save": ["norm"]},
    "pissa": {"target_modules": ["up_proj"], "r": 2, "init_lora_weights": "pissa"},
}


@pytest.fixture(scope="module")
def top(tmp_path_factory) -> Path:
    top = tmp_path_factory.mktemp("adapters")
    make_base(top / "base")
    for name, options in MEMBERS.items():
        make_adapter(top / "base", top / name, **options)
    return top


def load(source):
    return READERS[source.format].restore(source, source.abstract)


def weighted(sources, weights, of=None):
    """sum_k w_k theta_k in float64, of what the members are as whole models."""
    trees, found = [named_leaves(load(source)) for source in sources], {}
    for name, leaf in trees[0].items():
        own = of.weights(name, weights) if of else weights
        found[name] = sum(
            np.asarray(tree[name], np.float64)
            * np.reshape(own[..., k], (-1, *[1] * (leaf.ndim - 1)) if own.ndim == 2 else ())
            for k, tree in enumerate(trees)
        )
    return found


def write(path, sources, weights, of=None, **options):
    return lora_export.write(
        path, sources, np.asarray(weights), of, card=lambda _, said: str(said), **options
    )


def close(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, leaf in found.items():
        np.testing.assert_allclose(leaf, expected[name], rtol=0, atol=TOLERANCE, err_msg=name)


@pytest.mark.parametrize("grain", ["model", "leaf"])
def test_an_adapter_is_the_merge(top, tmp_path, grain):
    """Of other targets, ranks and scales; with weights by leaf and layer; beside the base."""
    sources = survey([str(top / name) for name in ("base", *MEMBERS)], base=str(top / "base"))
    of = groups(sources[0].abstract, grain, layers="layers")
    weights = np.random.default_rng(0).normal(size=(len(of.names), 5) if of else 5)
    weights += (1 - weights.sum(axis=-1, keepdims=True)) / 5
    written = write(tmp_path / "merged", sources, weights, of)
    assert written
    assert written.error == 0
    expected = weighted(sources, weights, of)
    close(named_leaves(load(describe(tmp_path / "merged"))), expected)
    by_peft = merged_by_peft(top / "base", tmp_path / "merged", tmp_path / "whole")
    close(named_leaves(by_peft), expected)


def test_the_best_of_a_rank(top, tmp_path):
    """As a decomposition of the whole change has it; and the error is as stated."""
    sources = survey([str(top / name) for name in ("attention", "wide")], base=str(top / "base"))
    written = write(tmp_path / "merged", sources, (0.75, 0.25), rank=3)
    assert written
    assert (written.rank, written.exact) == (3, 12)
    base = named_leaves(survey_base(top))
    exact = weighted(sources, np.array((0.75, 0.25)))
    found = named_leaves(load(describe(tmp_path / "merged")))
    lost, changed = 0.0, 0.0
    for name, leaf in exact.items():
        change = leaf - np.asarray(base[name], np.float64)
        lost += np.square(np.asarray(found[name], np.float64) - leaf).sum()
        changed += np.square(change).sum()
        if name == "layers/up":
            s = np.linalg.svd(change, compute_uv=False)
            kept = np.linalg.svd(np.asarray(found[name] - base[name], np.float64), compute_uv=False)
            np.testing.assert_allclose(kept[:, :3], s[:, :3], rtol=1e-4)
            assert kept[:, 3:].max() < 1e-4 * kept.max()
    assert 0.1 < written.error < 1
    assert written.error == pytest.approx(np.sqrt(lost / changed), rel=1e-4)
    assert (
        f"{written.error:.3g} (Frobenius norm)" in (tmp_path / "merged" / "README.md").read_text()
    )


def survey_base(top):
    return load(survey([str(top / "base"), str(top / "wide")], base=str(top / "base"))[0])


def test_a_merge_with_given_weights(top, tmp_path, capsys):
    config = configs.default()
    config.pool.checkpoints = (str(top / "attention"), str(top / "wide"))
    config.merge.weights, config.export.formats = (0.5, 0.5), ("lora",)
    config.export.lora_rank, config.compilation_cache = 4, ""
    (path,) = merge(config, str(tmp_path / "run"))
    assert path == tmp_path / "run" / "merged" / "lora"
    card = (path / "README.md").read_text()
    assert f'base_model: "{top / "base"}"' in card
    assert "one adapter of rank 4, of 12 that the merge has" in card
    assert "rank 4" in capsys.readouterr().err
    assert (tmp_path / "run" / "pool.json").exists()
    assert merge(config, str(tmp_path / "run")) == [path]
    config.merge.weights = (0.5, 0.4)
    with pytest.raises(JaxmergeError, match="weights that sum to 1"):
        merge(config, str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target_modules": ["q_proj"], "use_dora": True}, "DoRA"),
        ({"target_modules": ["q_proj"], "bias": "all"}, "biases were trained"),
    ],
)
def test_what_is_no_product_is_refused(top, tmp_path, options, said):
    adapter = make_adapter(top / "base", tmp_path / "adapter", r=2, **options)
    with pytest.raises(JaxmergeError, match=said) as caught:
        lora_export.check([describe(top / "wide"), describe(adapter)])
    assert caught.value.where == str(epath.Path(adapter))
    assert "huggingface" in caught.value.expected


def test_whole_models_are_refused(top):
    sources = [describe(top / "wide"), describe(top / "wide")._replace(base="/elsewhere")]
    with pytest.raises(JaxmergeError, match="adapters of one base"):
        lora_export.check(sources)
