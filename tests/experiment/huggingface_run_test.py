"""Whole runs on Hugging Face directories: search, export, merges with given weights, errors."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from jaxmerge import config as configs
from jaxmerge.errors import JaxmergeError
from jaxmerge.experiment.evaluate import evaluate
from jaxmerge.experiment.merge import merge
from jaxmerge.experiment.search import search as run
from tests import tiny
from tests.evaluation import tokenizer_test

NAMES = ("first", "second", "third")
WEIGHTS = (0.5, 0.125, 0.375)


def _save(model_config, directory: Path, seed: int, dtype=torch.float32) -> None:
    """A random model with a tokenizer, as its owner would have saved it."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(model_config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    model.to(dtype).save_pretrained(directory)
    tokenizer_test.make(directory)


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llamas")
    shape = transformers.LlamaConfig(
        vocab_size=40,  # more than the tokenizer has, as is common
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    for seed, name in enumerate(NAMES):
        _save(shape, directory / name, seed)
    return directory


@pytest.fixture(scope="module")
def gpt2s(tmp_path_factory):
    """Models of a type that no decoder here is for."""
    directory = tmp_path_factory.mktemp("gpt2s")
    shape = transformers.GPT2Config(vocab_size=33, n_embd=8, n_layer=2, n_head=2, n_positions=32)
    for seed, name in enumerate(NAMES):
        _save(shape, directory / name, seed)
    return directory


def _config(pool: Path):
    config = configs.default()
    config.pool.checkpoints = (f"{pool}/*",)
    config.pool.chat = True
    config.mesh.pop = 1
    config.tasks.generation = {"builder": "tests.tiny:generation"}
    config.tasks.choice = {"builder": "tests.tiny:choice"}
    config.objective.tasks = ("generation", "choice")
    config.objective.search_examples, config.objective.test_examples = 6, 12
    config.evaluate.batch_size = 8
    config.search.strategy = "CMA_ES"
    config.search.population, config.search.budget = 4, 8
    config.baselines = ("uniform",)
    config.compilation_cache = ""
    return config


@pytest.fixture(scope="module")
def finished(llamas, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "run"
    return workdir, run(_config(llamas), str(workdir), "the command")


def _expected(pool: Path, weights) -> dict[str, np.ndarray]:
    """The merge in float64."""
    tensors = [load_file(pool / name / "model.safetensors") for name in NAMES]
    return {
        name: np.tensordot(
            weights, np.stack([each[name].astype(np.float64) for each in tensors]), 1
        )
        for name in tensors[0]
    }


def _assert_merged(directory: Path, pool: Path, weights) -> None:
    merged, expected = load_file(directory / "model.safetensors"), _expected(pool, weights)
    assert merged.keys() == expected.keys()
    for name, value in merged.items():
        # Three products and two sums in float32, of values up to about 2.
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-6, err_msg=name)


def test_the_winner_is_a_hugging_face_directory(finished, llamas):
    workdir, found = finished
    exported = workdir / "merged" / "huggingface"
    weights = list(found["best"]["weights"].values())
    assert list(found["best"]["weights"]) == list(NAMES)
    _assert_merged(exported, llamas, weights)
    card = (exported / "README.md").read_text()
    assert f"| third | {weights[2]:.6g} |" in card
    assert "the command" in card
    for name in ("tokenizer.json", "config.json", "generation_config.json"):
        assert (exported / name).exists()


def test_transformers_scores_the_winner_alike(finished):
    """Evaluated by transformers, the exported model gets the very scores of results.json."""
    workdir, found = finished
    exported = workdir / "merged" / "huggingface"
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(exported).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    task = tiny.generation(search=6, test=12)
    scores = []
    for example in task.splits["test"]:
        messages = [{"role": "user", "content": example.prompt}]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        with torch.no_grad():
            out = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=6,
                pad_token_id=1,
            )
        text = tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)
        scores.append(task.judge(example, [str(text)]))
    assert np.mean(np.asarray(scores, np.float32)) == pytest.approx(
        found["best"]["test"]["generation"]
    )
    assert len(set(scores)) > 1


# What trainers write into config.json, and say nothing of what a model computes.
WRITTEN = {
    "first": {"max_position_embeddings": 64, "unsloth_fixed": True, "unsloth_version": "2026.4"},
    "second": {"unsloth_tokenizer": "fixed", "unsloth_training_tiled_mlp": True, "use_cache": True},
    "third": {"max_position_embeddings": 4096, "torchscript": False, "architectures": ["Mine"]},
}


def test_configs_that_differ_in_what_says_nothing(finished, llamas, tmp_path):
    """A search finds the same, candidate by candidate, and each is scored alike by itself."""
    for name, more in WRITTEN.items():
        path = Path(shutil.copytree(llamas / name, tmp_path / "pool" / name)) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
    workdir, found = finished
    config = _config(tmp_path / "pool")
    assert run(config, str(tmp_path / "run"))["best"] == found["best"]
    assert tiny.log(tmp_path / "run") == tiny.log(workdir)
    alone = evaluate(config, str(tmp_path / "scores"))["checkpoints"]
    for own, individual in zip(alone, found["individuals"], strict=True):
        assert {task: own["test"][task] for task in found["tasks"]} == individual["test"]


def test_a_merge_with_given_weights(llamas, tmp_path):
    config = _config(llamas)
    config.merge.weights = WEIGHTS
    written = merge(config, str(tmp_path), "the command")
    assert [path.name for path in written] == ["orbax", "huggingface"]
    _assert_merged(written[1], llamas, WEIGHTS)
    records = json.loads((tmp_path / "pool.json").read_text())["checkpoints"]
    assert [record["name"] for record in records] == list(NAMES)
    assert all(
        record["fingerprint"] in (written[1] / "README.md").read_text() for record in records
    )


def test_an_unknown_architecture_can_be_merged(gpt2s, tmp_path):
    """Names and shapes are all that a merge with given weights needs."""
    config = _config(gpt2s)
    config.merge.weights = WEIGHTS
    merge(config, str(tmp_path / "merge"))
    exported = tmp_path / "merge" / "merged" / "huggingface"
    _assert_merged(exported, gpt2s, WEIGHTS)
    assert transformers.AutoModelForCausalLM.from_pretrained(exported).config.n_embd == 8


def test_an_unknown_architecture_cannot_be_evaluated(gpt2s, tmp_path):
    with pytest.raises(JaxmergeError, match="no decoder for models of type gpt2") as caught:
        run(_config(gpt2s), str(tmp_path / "run"))
    assert "llama" in caught.value.expected
    assert "--mode=merge" in caught.value.expected
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("weights", [(), (0.5, 0.5), (1, 2, 3, 4)])
def test_as_many_weights_as_checkpoints(llamas, tmp_path, weights):
    config = _config(llamas)
    config.merge.weights = weights
    with pytest.raises(JaxmergeError, match="one weight per checkpoint") as caught:
        merge(config, str(tmp_path / "merge"))
    assert "3 numbers, for first, second, third" in caught.value.expected
    assert not (tmp_path / "merge").exists()


def test_other_vocabularies_are_refused(llamas, tmp_path):
    for name in NAMES:
        shutil.copytree(llamas / name, tmp_path / "pool" / name)
    tokenizer_test.make(tmp_path / "pool" / "second", "zyxwvutsrqponmlkjihgfedcba ")
    with pytest.raises(JaxmergeError, match="vocabulary") as caught:
        run(_config(tmp_path / "pool"), str(tmp_path / "run"))
    assert caught.value.where.endswith("second")
    assert "6: 'z', not 'a'" in caught.value.found


def test_export_formats_and_types(llamas, tmp_path):
    config = _config(llamas)
    config.merge.weights = WEIGHTS
    config.export.formats = ("huggingface",)
    config.export.dtype = "bfloat16"
    (path,) = merge(config, str(tmp_path))
    assert sorted(each.name for each in (tmp_path / "merged").iterdir()) == ["huggingface"]
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert model.dtype == torch.bfloat16
    expected = _expected(llamas, WEIGHTS)["model.norm.weight"].astype(np.float32)
    rounded = torch.tensor(expected).to(torch.bfloat16)
    assert torch.equal(model.model.norm.weight.data, rounded)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [("formats", ("gguf",), "unknown format"), ("dtype", "int8", "can't be of this type")],
)
def test_exports_that_do_not_exist(llamas, tmp_path, field, value, said):
    config = _config(llamas)
    config.export[field] = value
    with pytest.raises(JaxmergeError, match=said):
        run(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_base_of_another_shape_is_refused_at_the_start(llamas, gpt2s, tmp_path):
    """Not when the winner is to be written, hours later."""
    config = _config(llamas)
    config.pool.base = str(gpt2s / "first")
    with pytest.raises(JaxmergeError, match="can't be written as the model of") as caught:
        run(config, str(tmp_path / "run"))
    assert caught.value.where == "export.formats"
    assert "embedding (40, 16), there missing" in caught.value.found
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_is_not_there(llamas, tmp_path):
    config = _config(llamas)
    config.pool.tokenizer = "no/such/tokenizer"
    with pytest.raises(JaxmergeError, match="no such directory") as caught:
        run(config, str(tmp_path / "run"))
    assert caught.value.where == "pool.tokenizer"
