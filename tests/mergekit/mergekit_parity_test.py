"""The same merges as mergekit 0.1.5 makes, from the same YAML: see `tools/mergekit_yaml.py`."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer

from jaxmerge import config as configs
from jaxmerge.experiment import mergekit
from tests import mergekit_models

CASES = {path.stem: path for path in mergekit_models.cases()}
DRAWN = "dare_ties"  # at random, and elsewhere than mergekit


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    mergekit_models.make(directory)
    return directory


@pytest.fixture
def merged(models, monkeypatch):
    """Makes the merge of a case, once."""
    monkeypatch.chdir(models)

    def make(name: str) -> Path:
        out = models / "merged" / name
        config = configs.default()
        config.compilation_cache = ""
        if not out.exists():
            mergekit.merge(config, str(CASES[name]), str(models / f"run {name}"), "", str(out))
        return out

    return make


def kept(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    """What mergekit made: config and tokenizer, and the tensors."""
    said = json.loads(CASES[name].with_suffix(".json").read_text())
    with np.load(CASES[name].with_suffix(".npz")) as stored:
        return said, {
            key: values.view(jnp.bfloat16) if values.dtype == np.uint16 else values
            for key, values in stored.items()
        }


def by_token(tensors: dict, ids: dict) -> dict:
    """Embeddings in the order of tokens: in mergekit, the ids of a union come out of a set."""
    order = [ids[token] for token in sorted(ids)]
    return {
        name: np.concatenate([values[order], values[len(order) :]])
        if name.startswith(("model.embed", "lm_head"))
        else values
        for name, values in tensors.items()
    }


@pytest.mark.parametrize("name", [name for name in CASES if name != DRAWN])
def test_the_tensors_are_those_of_mergekit(merged, name):
    """Equal up to four roundings of the largest value: those of products, sums and a division."""
    said, expected = kept(name)
    out = merged(name)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    ours = by_token(mergekit_models.load(out), tokenizer.get_vocab(with_added_tokens=True))
    theirs = by_token(expected, said["tokenizer"]["ids"])
    assert set(ours) == set(theirs)
    document = list(yaml.safe_load_all(CASES[name].read_text()))[-1]
    named = {each for key in ("dtype", "out_dtype") if (each := document.get(key))}
    for tensor, values in ours.items():
        assert values.dtype == theirs[tensor].dtype, tensor
        assert values.shape == theirs[tensor].shape, tensor
        step = max(float(jnp.finfo(each).eps) for each in {str(values.dtype), *named})
        wide, other = values.astype(np.float64), theirs[tensor].astype(np.float64)
        assert np.abs(wide - other).max() <= 4 * step * max(np.abs(other).max(), 0.1), tensor


def test_what_is_drawn_has_the_same_statistics(merged):
    """How many values stay those of the base, and how far the others move."""
    base = mergekit_models.load(merged(DRAWN).parents[1] / "mistral" / "base")
    _, theirs = kept(DRAWN)
    ours = mergekit_models.load(merged(DRAWN))

    def statistics(tensors: dict) -> tuple[float, float, int]:
        moved = np.concatenate(
            [
                (values.astype(np.float32) - base[name].astype(jnp.bfloat16).astype(np.float32))
                for name, values in tensors.items()
                if "layers" in name and values.ndim == 2
            ],
            axis=None,
        )
        return float((moved == 0).mean()), float(np.abs(moved).mean()), moved.size

    (stay, far, n), (their_stay, their_far, _) = statistics(ours), statistics(theirs)
    expected = (1 - 0.53) ** 2  # where both are dropped
    assert abs(stay - expected) < 4 * np.sqrt(expected / n)
    # Two independent samples of n values, whose standard deviation is about their mean.
    assert abs(far - their_far) < 4 * np.sqrt(2 / n) * their_far
    assert abs(stay - their_stay) < 4 * np.sqrt(2 * expected / n)


@pytest.mark.parametrize("name", CASES)
def test_the_config_is_that_of_mergekit(merged, name):
    said, _ = kept(name)
    ours = AutoConfig.from_pretrained(merged(name)).to_dict()
    for key, value in said["config"].items():
        if key not in ("transformers_version", "dtype"):
            assert ours[key] == value, key
    assert str(ours["dtype"]).removeprefix("torch.") == said["config"]["dtype"]


@pytest.mark.parametrize("name", CASES)
def test_the_tokenizer_reads_as_that_of_mergekit(merged, name):
    said, _ = kept(name)
    tokenizer = Tokenizer.from_file(str(merged(name) / "tokenizer.json"))
    ids = tokenizer.get_vocab(with_added_tokens=True)
    assert set(ids) == set(said["tokenizer"]["ids"])
    assert sorted(ids.values()) == list(range(len(ids)))
    read = [tokenizer.encode(text).tokens for text in mergekit_models.SAMPLES]
    assert read == said["tokenizer"]["samples"]
    loaded = AutoTokenizer.from_pretrained(merged(name))
    assert loaded.get_vocab() == ids


def test_chat_templates(merged):
    messages = [{"role": "user", "content": "Hi"}]
    tokens, base = (
        AutoTokenizer.from_pretrained(merged(name)) for name in ("tokens", "tokenizer_base")
    )
    said = tokens.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert said == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    # auto: that of the one model that has any
    said = base.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert said == "[user]Hi[assistant]"
