"""Adapters that are not W + s B A on the base as it is: how they began, how weights are stored."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from etils import epath

from jaxmerge.checkpoints import huggingface, lora
from jaxmerge.trees import named_leaves
from tests.checkpoints.lora_test import (
    CONFIG,
    TOLERANCE,
    describe,
    edit_config,
    load,
    make_adapter,
    make_base,
    merged_by_peft,
    opened,
    refused,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("starts") / "base")


@pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": "pissa", "r": 6},
        {"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"q_proj": 1}},
        {"init_lora_weights": "olora", "lora_alpha": 5},
        {"init_lora_weights": "pissa", "use_dora": True},
        {"init_lora_weights": True, "use_dora": True},
        {"init_lora_weights": "mica"},
        {"init_lora_weights": "gaussian", "use_rslora": True},
    ],
    ids=str,
)
def test_what_was_never_trained_changes_nothing(base, tmp_path, options):
    """However the factors begin, the model is the base."""
    options = {"r": 4, "target_modules": ["q_proj", "down_proj"], **options}
    found = named_leaves(load(describe(make_adapter(base, tmp_path / "new", False, **options))))
    whole = huggingface.describe("base", epath.Path(base))
    for name, leaf in named_leaves(huggingface.restore(whole, whole.abstract)).items():
        np.testing.assert_allclose(found[name], leaf, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("adjust", [True, False])
def test_a_start_that_comes_of_data(base, tmp_path, adjust):
    """EVA's: only the first factors are chosen by it, and the ranks, each with its own scale."""
    options = {"r": 4, "target_modules": ["q_proj", "o_proj"], "init_lora_weights": "eva"}
    eva = peft.EvaConfig(adjust_scaling_factors=adjust)
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(96, (6, 4, 9), generator=generator)
    batches = [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in tokens]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        config = peft.LoraConfig(**options, eva_config=eva)
        model: Any = peft.get_peft_model(opened(base), config, low_cpu_mem_usage=True)
        peft.initialize_lora_eva_weights(model, batches, show_progress_bar=False)
        model.save_pretrained(tmp_path / "new")
        for _, value in model.named_parameters():
            value.data += 0.1 * value.requires_grad
        model.save_pretrained(tmp_path / "trained")
    assert len({*json.loads((tmp_path / "new" / CONFIG).read_text())["rank_pattern"].values()}) > 1
    whole = huggingface.describe("base", epath.Path(base))
    before = named_leaves(huggingface.restore(whole, whole.abstract))
    after = named_leaves(merged_by_peft(base, tmp_path / "trained", tmp_path / "merged"))
    for name, expected in (("new", before), ("trained", after)):
        for leaf, found in named_leaves(load(describe(tmp_path / name))).items():
            np.testing.assert_allclose(found, expected[leaf], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "loftq", "lora_ga", "a_new_one"])
def test_starts_that_are_not_stored(base, tmp_path, init):
    """What was taken out of the base is drawn, or comes of data: refused, with peft's own way."""
    adapter = make_adapter(base, tmp_path / "adapter", r=2, target_modules=["up_proj"])
    error = refused(
        adapter,
        tmp_path / "x",
        lambda path: edit_config(path, lambda x: x.update(init_lora_weights=init)),
    )
    assert "init_lora_weights" in error.where
    assert error.found == init
    assert "path_initial_model_for_weight_conversion" in error.expected


def test_the_way_out_that_is_named(base, tmp_path):
    """What peft converts is what it stood for before: here of a start that is computed."""
    options = {"r": 2, "target_modules": ["up_proj"], "init_lora_weights": "pissa"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        warnings.filterwarnings("ignore", "PiSSA changes the base weights")
        model: Any = peft.get_peft_model(opened(base), peft.LoraConfig(**options))
        model.save_pretrained(tmp_path / "initial")
        for _, value in model.named_parameters():
            value.data += 0.1 * value.requires_grad
        model.save_pretrained(tmp_path / "pissa")
        model.save_pretrained(
            tmp_path / "converted",
            path_initial_model_for_weight_conversion=str(tmp_path / "initial"),
        )
    init = json.loads((tmp_path / "converted" / CONFIG).read_text())["init_lora_weights"]
    assert init is True
    found, expected = (
        named_leaves(load(describe(tmp_path / name))) for name in ("pissa", "converted")
    )
    for name, leaf in found.items():
        np.testing.assert_allclose(leaf, expected[name], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "options",
    [{"target_modules": ["c_attn", "c_proj"]}, {"target_modules": ["c_fc"], "use_dora": True}],
    ids=str,
)
def test_weights_that_are_stored_the_other_way_round(tmp_path, options):
    """GPT-2's, for which there is no decoder: c_proj is square, so shapes do not tell."""
    config = transformers.GPT2Config(vocab_size=33, n_embd=8, n_layer=1, n_head=2, n_positions=32)
    torch.manual_seed(3)
    base = tmp_path / "base"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(base)
    adapter = make_adapter(base, tmp_path / "adapter", r=2, **options)
    edit_config(adapter, lambda x: x.update(fan_in_fan_out=False))  # the model decides
    source = describe(adapter)
    found = named_leaves(lora.restore(source, source.abstract))
    expected = named_leaves(merged_by_peft(base, adapter, tmp_path / "merged"))
    assert found.keys() == expected.keys()
    for name, leaf in found.items():
        np.testing.assert_allclose(leaf, expected[name], rtol=0, atol=TOLERANCE)
