"""Hugging Face directories as they are written: as transformers does, and whole or not at all."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file

from jaxmerge.checkpoints import huggingface
from jaxmerge.errors import JaxmergeError
from jaxmerge.trees import named_leaves
from tests import huggingface_models
from tests.checkpoints.huggingface_test import (
    INDEX,
    WEIGHTS,
    assert_same,
    copied,
    load,
    rewrite,
    sharded,
)


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> Path:
    """A model with all that belongs to it, and things that must not be copied."""
    path = copied("llama", tmp_path_factory.mktemp("complete") / "model")
    words = {f"w{i}": i for i in range(huggingface_models.VOCAB - 1)} | {"[UNK]": 95}
    whole: Any = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    whole.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="[UNK]")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(path)
    for name in ("pytorch_model.bin", "modeling.py", "adapter_model.safetensors", "optimizer.pt"):
        (path / name).write_bytes(b"no")
    (path / "LICENSE").write_text("free")
    return path


def save(path: Path, like: Path, **options: Any) -> list[str]:
    """Exports a directory's own weights; the names of the leaves in the order they were asked."""
    tree = load(like, fsdp=2, tensor=2)
    asked: list[str] = []

    def leaf(name: str) -> jax.Array:
        asked.append(name)
        return named_leaves(tree)[name]

    layout = huggingface.layout(str(like))
    huggingface.save(path, layout, leaf, abstract=tree, like=str(like), **options)
    return asked


@pytest.mark.parametrize(
    "variant",
    ["llama biases", "smollm2", "mistral", "smollm3", "qwen2", "qwen3", "gemma2", "gemma3"]
    + ["cohere", "cohere2", "olmo2", "olmo3", "granite hybrid", "phi3", "mixtral", "qwen3 moe"],
)
def test_the_bytes_of_transformers(tmp_path, variant):
    """Read and written again, the file is what transformers itself had written."""
    directory = Path(huggingface_models.tiny(variant).directory)
    asked = save(tmp_path / "out", directory)
    for name in (WEIGHTS, "config.json", "generation_config.json"):
        if (directory / name).exists():
            assert (tmp_path / "out" / name).read_bytes() == (directory / name).read_bytes()
    assert len(asked) == len(set(asked)) == len(huggingface.layout(str(directory)).leaves)


def test_in_several_files(tmp_path):
    """Transformers reads them: the same logits, tensors and config; and the index is as its own."""
    directory = Path(huggingface_models.tiny("llama").directory)
    asked = save(tmp_path / "out", directory, shard_bytes=20_000)
    assert len(asked) == len(set(asked))
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert len(files) > 3
    # The embedding alone is 12 KiB, a layer 35: no file has more than the limit and its header.
    assert max(file.stat().st_size for file in files) < 20_000 + 8_000
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    theirs = sharded("llama", tmp_path / "theirs")
    assert index["metadata"] == json.loads((theirs / INDEX).read_text())["metadata"]
    tiny = huggingface_models.tiny("llama")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    )
    tokens = np.arange(1, 25).reshape(2, 12)
    expected = huggingface_models.logits(tiny.model, tokens)
    np.testing.assert_array_equal(huggingface_models.logits(again.eval(), tokens), expected)
    assert_same(load(tmp_path / "out"), tiny.params)


def test_all_that_belongs_to_a_model(tmp_path, complete):
    """Config, tokenizer, template and licence; no pickles, adapters or code; the card at last."""
    written: list[str] = []

    def card() -> str:
        written.append("card")
        return "# Merged"

    save(tmp_path / "out", complete, card=card)
    assert written == ["card"]
    assert (tmp_path / "out" / "README.md").read_text() == "# Merged"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in complete.iterdir()} - {
        "pytorch_model.bin",
        "modeling.py",
        "adapter_model.safetensors",
        "optimizer.pt",
    } | {"README.md"}
    assert {"tokenizer.json", "chat_template.jinja", "LICENSE", "config.json"} <= names
    theirs, ours = (
        transformers.AutoTokenizer.from_pretrained(path) for path in (complete, tmp_path / "out")
    )
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.chat_template == theirs.chat_template
    configs = [
        transformers.AutoConfig.from_pretrained(path).to_dict() | {"_name_or_path": ""}
        for path in (complete, tmp_path / "out")
    ]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cast_when_written(tmp_path, complete, dtype):
    """Rounded to nearest even, in the weights as in the config."""
    save(tmp_path / "out", complete, dtype=dtype)
    before, after = tensors_of_model(complete), tensors_of_model(tmp_path / "out")
    for name, value in after.items():
        assert torch.equal(value, before[name].to(getattr(torch, dtype)))
    configs = [
        json.loads((path / "config.json").read_text()) for path in (complete, tmp_path / "out")
    ]
    assert configs[1] == configs[0] | {"dtype": dtype}
    assert list(configs[1]) == list(configs[0])


def tensors_of_model(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / WEIGHTS)


def test_a_value_that_does_not_fit(tmp_path):
    """float16 ends at 65504: the leaf is named, and nothing is left behind."""
    path = copied("llama", tmp_path / "x")
    rewrite(path, lambda x: x["model.layers.1.mlp.up_proj.weight"][0].fill_(70_000))
    with pytest.raises(JaxmergeError, match="leaf layers/up has values that are too large"):
        save(tmp_path / "out", path, dtype="float16")
    assert [each.name for each in tmp_path.iterdir()] == ["x"]


def test_whole_or_not_at_all(tmp_path, complete):
    """An error on the way leaves nothing; what is there already is never written to."""
    layout, tree = huggingface.layout(str(complete)), load(complete)

    def fails(name: str) -> jax.Array:
        if name == "layers/up":
            raise KeyboardInterrupt
        return named_leaves(tree)[name]

    arguments: dict[str, Any] = {"abstract": tree, "like": str(complete)}
    with pytest.raises(KeyboardInterrupt):
        huggingface.save(tmp_path / "out", layout, fails, **arguments)
    assert not list(tmp_path.iterdir())
    leaf = named_leaves(tree).__getitem__
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "empty").mkdir()
    for name in ("mine", "dangling", "empty"):
        with pytest.raises(JaxmergeError, match="something here"):
            huggingface.save(tmp_path / name, layout, leaf, **arguments)
    assert (tmp_path / "mine").read_text() == "mine"
    with pytest.raises(JaxmergeError, match="can't be written") as caught:
        huggingface.save(tmp_path / "mine" / "x", layout, leaf, **arguments)
    assert caught.value.where == str(tmp_path / "mine" / "x")


def test_leaves_of_another_model(tmp_path, complete):
    """Every difference, before anything is written."""
    tree = load(complete)
    tree["layers"]["up"] = jnp.ones((2, 3))
    tree["more"] = jnp.ones(1)
    del tree["final_norm"]
    layout = huggingface.layout(str(complete))
    with pytest.raises(JaxmergeError) as caught:
        huggingface.save(tmp_path / "out", layout, lambda name: jnp.ones(1), abstract=tree, like="")
    assert caught.value.what.splitlines()[1:] == [
        "  final_norm/scale is missing, not (32,)",
        "  layers/up is (2, 3), not (2, 48, 32)",
        "  more is not known",
    ]
