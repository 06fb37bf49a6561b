"""Models as people have them, merged from file to file: heads, buffers, indexes, weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from jaxmerge.errors import JaxmergeError
from jaxmerge.experiment.merge import merge
from tests.streaming.streaming_test import assert_bits, config_of, reference, save, tensors_of

WEIGHTS = (0.25, 0.75)
BOTH = ("orbax", "huggingface")
LLAMA = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
BERT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def other_models() -> dict[str, Any]:
    """Models that are no causal language models, some of families that have a decoder."""
    llama = transformers.LlamaConfig.from_dict({**LLAMA, "num_labels": 1, "pad_token_id": 0})
    bert = transformers.BertConfig.from_dict(BERT)
    return {
        "reward": lambda: transformers.LlamaForSequenceClassification(llama),
        "embedding": lambda: transformers.LlamaModel(llama),
        "BERT": lambda: transformers.BertForMaskedLM(bert),
    }


@pytest.mark.parametrize("kind", ["reward", "embedding", "BERT"])
def test_models_that_are_no_causal_language_models(tmp_path, kind):
    """In both formats: by the names of their tensors, which transformers loads again."""
    for k in range(2):
        torch.manual_seed(k)
        model = other_models()[kind]()
        model.save_pretrained(tmp_path / "models" / f"m{k}")
    config = config_of(tmp_path / "models", WEIGHTS, formats=BOTH)
    paths = merge(config, str(tmp_path / "run"))
    assert [path.name for path in paths] == list(BOTH)
    assert_bits(tensors_of(paths[1]), reference(tmp_path / "models", WEIGHTS))
    assert type(model).from_pretrained(paths[1]).state_dict().keys() == model.state_dict().keys()


def two(directory: Path, *tensors: dict[str, np.ndarray], **said: Any) -> Path:
    """Two members of a type that is not known, whose configs say this."""
    for k, each in enumerate(tensors):
        save(directory / f"m{k}", each)
        text = json.dumps({"model_type": "unheard of", **said})
        (directory / f"m{k}" / "config.json").write_text(text)
    return directory


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.int32, np.bool_])
def test_buffers_that_are_no_floats(tmp_path, dtype):
    """Equal ones are copied bit for bit, of 64 bits too; those that differ are refused by name."""
    large = np.array([[0, 1, 2**62 + 1]]).astype(dtype)
    members = [
        {"w": numbers(5, 4, seed=k), "ids": large, "seen": np.asarray(large[0, 2])} for k in (0, 1)
    ]
    models = two(tmp_path / "models", *members)
    config = config_of(models, WEIGHTS, formats=BOTH, shard_bytes=40)
    _, path = merge(config, str(tmp_path / "run"))
    found = tensors_of(path)
    for name in ("ids", "seen"):
        assert (found[name].dtype, found[name].shape) == (dtype, members[0][name].shape)
        assert found[name].tobytes() == members[0][name].tobytes()
    members[1]["ids"] = large[:, ::-1].copy()
    models = two(tmp_path / "others", *members)
    with pytest.raises(JaxmergeError, match="leaf ids is not floating point and differs"):
        merge(config_of(models, WEIGHTS), str(tmp_path / "refused"))


@pytest.mark.parametrize(
    ("embedding", "head"),
    [
        ("model.embed_tokens.weight", "lm_head.weight"),
        ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
        ("transformer.wte.weight", "lm_head.weight"),
    ],
)
def test_a_tied_head_that_one_member_has(tmp_path, embedding, head):
    """It is left out if it is the embedding, and refused if it is not, or nothing ties them."""
    table = numbers(7, 4)
    members = [{embedding: numbers(7, 4, seed=1)}, {embedding: table, head: table}]
    for order in (members, members[::-1]):
        models = two(tmp_path / f"models{order is members}", *order, tie_word_embeddings=True)
        (path,) = merge(config_of(models, WEIGHTS), str(tmp_path / f"run{order is members}"))
        assert tensors_of(path).keys() == {embedding}
    members[1][head] = table + 1
    for tied, said in ((True, "differs from the embedding"), (False, "is not in m0")):
        models = two(tmp_path / f"other{tied}", *members, tie_word_embeddings=tied)
        with pytest.raises(JaxmergeError, match=said):
            merge(config_of(models, WEIGHTS), str(tmp_path / "refused"))


def test_buffers_that_transformers_computes(tmp_path):
    """Old versions wrote them out; a member without them is the same model."""
    members: list[dict[str, np.ndarray]] = [{"w": numbers(5, 4)}, {"w": numbers(5, 4, seed=1)}]
    members[0] |= {"bert.embeddings.position_ids": np.arange(5)[None]}
    members[1] |= {"h.0.attn.bias": np.tril(np.ones((1, 1, 3, 3), np.float32))}
    (path,) = merge(config_of(two(tmp_path / "models", *members), WEIGHTS), str(tmp_path / "run"))
    assert tensors_of(path).keys() == {"w"}


@pytest.mark.parametrize("formats", [("huggingface",), ("orbax",)])
def test_what_a_sharded_trainer_left(tmp_path, formats):
    """Tensors of shape [0], by their names, though all members have them."""
    members = [{"w": numbers(5, 4), "layer.w": numbers(0), "v": numbers(0)} for _ in range(2)]
    config = config_of(two(tmp_path / "models", *members), WEIGHTS, formats=formats)
    with pytest.raises(JaxmergeError, match=r"shape \[0\]") as caught:
        merge(config, str(tmp_path / "run"))
    assert "2 of 3: layer.w, v" in caught.value.found
    assert "zero_to_fp32.py" in caught.value.expected


@pytest.mark.parametrize("stale", [True, False])
def test_an_index_beside_the_single_file(tmp_path, stale):
    """One that names that file, or shards that are gone, is not looked at, as in transformers."""
    models = two(tmp_path / "models", {"w": numbers(5, 4)}, {"w": numbers(5, 4, seed=1)})
    expected = reference(models, WEIGHTS)
    file = "model-00001-of-00002.safetensors" if stale else "model.safetensors"
    index = {"metadata": {}, "weight_map": {"w": file, "gone": file} if stale else {"w": file}}
    (models / "m0" / "model.safetensors.index.json").write_text("\ufeff" + json.dumps(index))
    (path,) = merge(config_of(models, WEIGHTS), str(tmp_path / "run"))
    assert_bits(tensors_of(path), expected)


def test_an_index_with_more_than_the_single_file(tmp_path):
    """Both are there: which of them is meant can't be known."""
    models = two(tmp_path / "models", {"w": numbers(5, 4)}, {"w": numbers(5, 4, seed=1)})
    for k in (0, 1):
        index = {"weight_map": {"w": "model.safetensors", "v": "more.safetensors"}}
        (models / f"m{k}" / "model.safetensors.index.json").write_text(json.dumps(index))
        save_file({"v": numbers(3)}, models / f"m{k}" / "more.safetensors")
    with pytest.raises(JaxmergeError, match="lacks tensors that the index has") as caught:
        merge(config_of(models, WEIGHTS), str(tmp_path / "run"))
    assert "1 of them: v" in caught.value.found


def test_a_byte_order_mark_before_the_config(tmp_path):
    """It is read, and not written: transformers would refuse it."""
    models = two(tmp_path / "models", {"w": numbers(5, 4)}, {"w": numbers(5, 4, seed=1)})
    for k in (0, 1):
        file = models / f"m{k}" / "config.json"
        file.write_text("\ufeff" + file.read_text())
    (path,) = merge(config_of(models, WEIGHTS), str(tmp_path / "run"))
    assert json.loads((path / "config.json").read_text()) == {"model_type": "unheard of"}


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ((0.5, 0.8), "sum to 1.3, not 1: they are used as they are"),
        ((1.0, -1.0), "sum to 0: they are used as they are"),
        (((0.33, 0.33), (0.5, 0.5)), "the weights of merged/0 sum to 0.66"),
        ((0.3333, 0.6667), ""),
        ((2.0, -1.0), ""),
    ],
)
def test_weights_that_make_no_average_are_said(tmp_path, capsys, weights, said):
    """They are not scaled."""
    models = two(tmp_path / "models", {"w": numbers(5, 4)}, {"w": numbers(5, 4, seed=1)})
    path = merge(config_of(models, weights), str(tmp_path / "run"))[0]
    err = capsys.readouterr().err
    assert said in err
    assert ("jaxmerge:" in err) == bool(said)
    row = weights[0] if isinstance(weights[0], tuple) else weights
    assert (
        load_file(path / "model.safetensors")["w"].tobytes()
        == reference(models, row)["w"].tobytes()
    )
