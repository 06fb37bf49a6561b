"""Adapters with the tokenizer that they were trained with, in merge and evaluate."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file

from jaxmerge import config as configs
from jaxmerge.errors import JaxmergeError
from jaxmerge.evaluation.tokenizer import Pretrained
from jaxmerge.experiment.evaluate import evaluate
from jaxmerge.experiment.merge import merge
from jaxmerge.experiment.sources import find_checkpoints, tokenizer_directory
from tests.evaluation.tokenizer_test import TEMPLATE, make

LETTERS = "0123456789="
AT = "base_model.model.model.layers.0.self_attn.q_proj."


@pytest.fixture(scope="module")
def top(tmp_path_factory) -> Path:
    """A base of 24 rows and 17 tokens, and two adapters with a token more and a chat template."""
    top = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=0,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    transformers.AutoModelForCausalLM.from_config(shape).save_pretrained(top / "base")
    make(top / "base", LETTERS, template=None)
    for k in (0, 1):
        adapter(top / f"adapter{k}", top / "base", seed=k)
        make(top / f"adapter{k}", LETTERS + "x")
    return top


def adapter(path: Path, base: Path, seed: int) -> None:
    path.mkdir()
    rng = np.random.default_rng(seed)
    factors = {"lora_A.weight": (2, 16), "lora_B.weight": (16, 2)}
    tensors = {
        AT + name: rng.normal(size=size).astype(np.float32) for name, size in factors.items()
    }
    save_file(tensors, path / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": str(base)}
    (path / "adapter_config.json").write_text(json.dumps(said))


def config_of(top: Path, *members: str):
    config = configs.default()
    config.pool.checkpoints = tuple(str(top / each) for each in members)
    config.compilation_cache = ""
    return config


@pytest.mark.parametrize("base", [True, False])
def test_the_merge_has_the_adapters_tokenizer(top, tmp_path, base):
    """And the base's config, whether the base is named or not."""
    config = config_of(top, "adapter*")
    config.pool.base = str(top / "base") if base else ""
    config.merge.weights, config.export.formats = (0.5, 0.5), ("huggingface",)
    (path,) = merge(config, str(tmp_path / "run"))
    tokenizer = Pretrained(str(path))
    assert (tokenizer.vocabulary, tokenizer.template) == (18, TEMPLATE)
    for file in ("config.json", "generation_config.json"):
        assert (path / file).read_text() == (top / "base" / file).read_text()


def test_what_is_evaluated_is_in_its_chat_template(top, tmp_path, monkeypatch):
    """Found with pool.chat; texts end where the base's configs say."""
    lines = [{"prompt": f"{n}=", "target": "1"} for n in range(20)]
    (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = config_of(top, "adapter0", "base")
    config.tasks.sums = {"builder": "jsonl", "path": str(tmp_path / "task.jsonl")}
    config.objective.tasks = ("sums",)
    config.pool.chat = True
    with pytest.raises(JaxmergeError, match="no chat template"):  # the base has none
        evaluate(config, str(tmp_path / "refused"))
    config = config.copy_and_resolve_references()
    config.pool.checkpoints = config.pool.checkpoints[:1]
    made = []
    monkeypatch.setattr(
        "jaxmerge.experiment.build.Pretrained",
        lambda *args, **options: made.append(Pretrained(*args, **options)) or made[-1],
    )
    (found,) = evaluate(config, str(tmp_path / "run"))["checkpoints"]
    assert found["name"] == "adapter0"
    assert {tokenizer.vocabulary for tokenizer in made} == {18}
    assert {tokenizer.stops for tokenizer in made} == {(1, 2)}


def test_the_directory_that_is_named_goes_first(top):
    """Whatever it is; adapters that contradict their base are refused without it."""
    config = config_of(top, "adapter*")
    assert tokenizer_directory(config, find_checkpoints(config)) == str(top / "adapter0")
    config.pool.tokenizer = str(top / "base")
    assert tokenizer_directory(config, find_checkpoints(config)) == str(top / "base")
    config.pool.tokenizer = ""
    for k in (0, 1):
        adapter(top / f"other{k}", top / "base", seed=k)
        make(top / f"other{k}", LETTERS[::-1])
    other = config_of(top, "other*")
    with pytest.raises(JaxmergeError, match="nor does it only add"):
        find_checkpoints(other)
    other.pool.tokenizer = str(top / "base")
    assert find_checkpoints(other)
