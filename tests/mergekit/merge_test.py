"""The command, what it writes, and what it refuses once it has seen the models."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxmerge import config as configs
from jaxmerge.errors import JaxmergeError
from jaxmerge.experiment import mergekit
from jaxmerge.streaming import recipes
from tests import mergekit_models
from tests.command import ROOT

STACK = """
slices:
- sources: [{model: ./mistral/a, layer_range: [0, 2]}]
- sources: [{model: ./mistral/b, layer_range: [1, 4]}]
merge_method: passthrough
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    mergekit_models.make(directory)
    return directory


@pytest.fixture
def merge(models, tmp_path, monkeypatch):
    monkeypatch.chdir(models)

    def run(text: str, **fields) -> tuple[Path, list[str]]:
        (tmp_path / "merge.yml").write_text(text)
        config = configs.default()
        config.compilation_cache = ""
        config.update_from_flattened_dict(fields)
        out = tmp_path / "out"
        path = str(tmp_path / "merge.yml")
        return out, mergekit.merge(config, path, str(tmp_path / "run"), "the command", str(out))

    return run


def test_a_directory_has_all_that_a_model_needs(models, merge):
    out, warnings = merge(STACK)
    assert not warnings
    assert (out / "mergekit_config.yml").read_text() == STACK
    card = (out / "README.md").read_text()
    assert "layer_range: [1, 4]" in card
    assert "the command" in card
    assert "| ./mistral/a |" in card
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 5
    tensors = mergekit_models.load(out)
    b = mergekit_models.load(models / "mistral" / "b")
    last, norm = "model.layers.4.mlp.up_proj.weight", "model.norm.weight"
    np.testing.assert_array_equal(tensors[last], b["model.layers.3.mlp.up_proj.weight"])
    np.testing.assert_array_equal(tensors[norm], b[norm])


def test_it_goes_on_where_it_was_stopped(merge, monkeypatch):
    fields = {"export.shard_bytes": 400}  # a tensor or a few in a file
    whole, asked = recipes.merge_tensor, []

    def stop(*args, name, **kwargs):
        if len(asked) >= 20:  # one more each, of the threads
            raise KeyboardInterrupt
        asked.append(name)
        return whole(*args, name=name, **kwargs)

    monkeypatch.setattr(recipes, "merge_tensor", stop)
    with pytest.raises(KeyboardInterrupt):
        merge(STACK, **fields)
    before, count_before = set(asked), len(asked)

    def count(*args, name, **kwargs):
        asked.append(name)
        return whole(*args, name=name, **kwargs)

    monkeypatch.setattr(recipes, "merge_tensor", count)
    out, _ = merge(STACK, **fields)
    again = asked[count_before:]
    assert len(set(again) & before) <= 3  # those of the file that was being written
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(again) | before == set(index["weight_map"])
    del asked[:]
    merge(STACK, **fields)
    assert not asked  # it is there already


def test_other_files_at_the_same_place_are_refused(merge):
    merge(STACK)
    with pytest.raises(JaxmergeError, match="yaml"):
        merge(STACK.replace("[0, 2]", "[0, 3]"))


TWO = "models: [{model: ./llama/base}, {model: ./llama/a}]\n"
LINEAR = "merge_method: linear\nparameters: {weight: 1}\n"
REFUSED = [
    ("merge_method: none_such\n" + TWO, "line 1, merge_method", "passthrough"),
    ("merge_method: linear\n" + TWO, "line 2, models[0]", "weight"),
    ("merge_method: slerp\nbase_model: ./llama/base\n" + TWO, "line 1", "the parameter t"),
    ("merge_method: slerp\nparameters: {t: 1}\n" + TWO, "line 3, models", "base_model"),
    ("merge_method: ties\nparameters: {weight: 1}\n" + TWO, "line 3, models", "no base_model"),
    (
        "merge_method: linear\nparameters:\n  wieght: 1\n" + TWO,
        "line 3, parameters.wieght",
        "is weight meant",
    ),
    (
        "merge_method: linear\nparameters: {weight: 1, normalize: 3}\n" + TWO,
        "line 2, parameters.normalize",
        "true or false",
    ),
    (
        LINEAR + "models: [{model: ./llama/base}, {model: ./llama/b}]",
        "lm_head.weight",
        "tokenizer: {source: base}",
    ),
    (
        LINEAR + "models: [{model: ./llama/base}, {model: ./qwen/a}]",
        "qwen2",
        "different architectures",
    ),
    (
        "merge_method: linear\nmodels: [{model: ./llama/adapter, parameters: {weight: 1}}]",
        "adapter",
        "BASE+ADAPTER",
    ),
    ("merge_method: linear\nmodels: [{model: who/knows}]", "who/knows", "hf download who/knows"),
    (
        "merge_method: passthrough\nslices:\n- sources: [{model: ./llama/a, layer_range: [2, 9]}]",
        "line 3, slices[0].sources[0]",
        "at most 4",
    ),
    (
        LINEAR + "slices:\n- sources:\n  - {model: ./llama/a, layer_range: [0, 2]}\n"
        "  - {model: ./llama/base, layer_range: [0, 1]}",
        "line 4, slices[0]",
        "different numbers of layers",
    ),
    (
        "merge_method: linear\nparameters: {weight: 1}\nmodules:\n  vision: {" + TWO[:-1] + "}",
        "line 4, modules.vision",
        "default",
    ),
    (
        "merge_method: linear\nparameters: {weight: 1}\n"
        + TWO
        + "tokenizer:\n  source: base\n  tokens:\n    <new>: {}",
        "line 4, tokenizer",
        "no model has the token <new>",
    ),
]


@pytest.mark.parametrize(("text", "where", "says"), REFUSED)
def test_what_models_do_not_allow_is_refused(merge, tmp_path, text, where, says):
    with pytest.raises(JaxmergeError) as caught:
        merge(text)
    assert where in str(caught.value)
    assert says in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_parameters_of_other_methods_are_pointed_out(merge):
    _, warnings = merge(STACK + "parameters: {density: 0.5, int8_mask: true}")
    (warning,) = warnings
    assert "line 6, parameters.density" in warning


def test_fields_that_the_yaml_decides_are_refused(merge):
    with pytest.raises(JaxmergeError, match=r"--config\.pool"):
        merge(STACK, **{"pool.dtype": "bfloat16"})


def test_configs_that_differ_are_pointed_out(models, merge):
    path = models / "mistral" / "b" / "config.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"rope_theta": 5.0}))
    try:
        out, warnings = merge(STACK)
    finally:
        path.write_text(before)
    (warning,) = warnings
    assert "rope_theta is 5.0 in ./mistral/b" in warning
    assert warning in (out / "README.md").read_text()


def test_a_module_is_named_by_the_names_of_its_tensors(merge):
    inner = "{models: [{model: ./llama/a}]}"
    out, _ = merge("merge_method: passthrough\nmodules: {default: " + inner + "}")
    assert len(mergekit_models.load(out)) == len(mergekit_models.load(Path("llama/a")))


def test_the_command(models, tmp_path):
    (tmp_path / "stack.yaml").write_text(STACK)
    out = tmp_path / "merged"
    command = [sys.executable, "-m", "jaxmerge", "merge", str(tmp_path / "stack.yaml")]
    done = subprocess.run(
        [*command, f"--out={out}", "--config.compilation_cache="],
        cwd=models,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"Merged: {out}\n"
    assert (out / "model.safetensors").exists()
