"""Configurations of directories that are merged from file to file: alike, or refused."""

import json
from typing import Any

import pytest
from transformers import LlamaConfig

from jaxmerge.errors import JaxmergeError
from jaxmerge.experiment import merge as merging
from jaxmerge.experiment.merge import merge
from tests.streaming.streaming_test import config_of, make

CONFIG = {
    "model_type": "unheard of",
    "architectures": ["Unheard"],
    "rope_theta": 1e4,
    "inner": {"heads": 4, "dtype": "float32"},
    "transformers_version": "4",
    "torch_dtype": "float32",
    "eos_token_id": 2,
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_theta": 1e6}, "m1: architecture rope_theta is 1000000.0, in m0 10000.0"),
        ({"inner": {"heads": 2}}, "architecture inner is {'heads': 2}, in m0 {'heads': 4}"),
        ({"tie_word_embeddings": True}, "architecture tie_word_embeddings is True, in m0 None"),
        ({"note": "alibi"}, "architecture note is 'alibi', in m0 None"),
        ({"use_sliding_window": False}, "architecture use_sliding_window is False, in m0 None"),
        (
            {"rope_scaling": {"type": "dynamic"}, "max_position_embeddings": 64},
            "architecture max_position_embeddings is 64, in m0 None",
        ),
        ({"model_type": "another"}, "architecture model_type is 'another', in m0 'unheard of'"),
    ],
)
def test_configs_of_other_functions_are_refused(tmp_path, changes, said):
    models = make(tmp_path / "models", count=2)
    for name, config in {"m0": CONFIG, "m1": {**CONFIG, **changes}}.items():
        (models / name / "config.json").write_text(json.dumps(config))
    with pytest.raises(JaxmergeError, match="can't be merged") as caught:
        merge(config_of(models, (0.5, 0.5)), str(tmp_path / "run"))
    assert said in caught.value.what
    assert "delete there what says nothing" in caught.value.expected
    assert not (tmp_path / "run").exists()


def test_configs_may_differ_in_what_changes_no_value(tmp_path):
    models = make(tmp_path / "models", count=2)
    silent = {"transformers_version": "5", "torch_dtype": None, "dtype": "bfloat16"}
    silent |= {"eos_token_id": [2, 7], "use_cache": False, "_name_or_path": "here"}
    silent |= {"inner": {"heads": 4, "dtype": "bfloat16"}}
    silent |= {"architectures": ["Another"], "max_position_embeddings": 64, "auto_map": {"A": "b"}}
    silent |= {"unsloth_version": "1", "torchscript": True, "gradient_checkpointing": True}
    for name, config in {"m0": CONFIG, "m1": {**CONFIG, **silent}}.items():
        (models / name / "config.json").write_text(json.dumps(config))
    assert merge(config_of(models, (0.5, 0.5)), str(tmp_path / "run"))


def test_one_config_may_be_written_by_several_versions_of_transformers(tmp_path):
    """With what is default or without, with `rope_theta` or `rope_parameters`; and if it is another
    base of the rotary positions, it is another config.
    """
    models = make(tmp_path / "models", count=2)
    old = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "rope_theta": 5e4}
    rope: Any = {"rope_type": "default", "rope_theta": 5e4}
    new = LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=rope).to_dict()
    assert "rope_theta" not in new
    (models / "m0" / "config.json").write_text(json.dumps(old))
    (models / "m1" / "config.json").write_text(json.dumps(new))
    assert merge(config_of(models, (0.5, 0.5)), str(tmp_path / "run"))
    (models / "m0" / "config.json").write_text(json.dumps({**old, "rope_theta": 1e4}))
    with pytest.raises(JaxmergeError, match="rope_parameters"):
        merge(config_of(models, (0.5, 0.5)), str(tmp_path / "other"))


def test_what_leaves_refuse_is_refused_before_blocks_are_written(tmp_path, monkeypatch):
    """As a config that transformers refuses, when Orbax is wanted besides."""
    find = merging.find_checkpoints

    def refuse(config: Any, *, by_tensor: bool = False, **more: Any) -> Any:
        if not by_tensor:
            raise JaxmergeError("refused by leaf")
        return find(config, by_tensor=True, **more)

    monkeypatch.setattr(merging, "find_checkpoints", refuse)
    config = config_of(make(tmp_path / "models"), formats=("orbax", "huggingface"))
    with pytest.raises(JaxmergeError, match="refused by leaf"):
        merge(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
