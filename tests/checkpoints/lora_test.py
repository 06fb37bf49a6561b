"""LoRA adapters against peft's own merge, and the adapters that are refused."""

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from etils import epath
from safetensors.torch import load_file, save_file

from jaxmerge.checkpoints import huggingface, lora
from jaxmerge.checkpoints.source import Source
from jaxmerge.errors import JaxmergeError
from jaxmerge.models.decoder import SHARDING_RULES
from jaxmerge.sharding import make_mesh, shardings
from jaxmerge.trees import PyTree, named_leaves

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model.model.layers.1."

# Both form base + scale * B A in float32 from the same factors. A product of rank at most 8 is
# added up in another order, which moves its last bits: 8 roundings of 6e-8 of values of about 4.
TOLERANCE = 2e-6


def make_base(path: Path, **changes: Any) -> Path:
    """A random tiny Llama with biases in its attention."""
    config = transformers.LlamaConfig(
        **{
            "vocab_size": 96,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "attention_bias": True,
            "tie_word_embeddings": False,
        }
        | changes
    )
    torch.manual_seed(3)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("lora") / "base")


def opened(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path)


def make_adapter(base: Path, path: Path, trained: bool = True, **options: Any) -> Path:
    """An adapter whose every value is random, or as peft begins it, as peft saves it."""
    with warnings.catch_warnings():
        # peft asks transformers by an old name, and says that embeddings are saved along.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers` to `True`")
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
        warnings.filterwarnings("ignore", "Using Rank-Stabilized LoRA with rank_pattern")
        model: Any = peft.get_peft_model(opened(base), peft.LoraConfig(**options))
        generator = torch.Generator().manual_seed(0)
        for _, value in sorted(model.named_parameters()):
            if value.requires_grad and trained:
                value.data.copy_(torch.randn(value.shape, generator=generator) * 0.5)
        model.save_pretrained(path)
    return path


def describe(path: Path, base: str = "") -> Source:
    return lora.describe(path.name, epath.Path(path), "", base)


def load(source: Source, **sizes: Any) -> PyTree:
    """The adapter as a whole model, on a mesh of these sizes."""
    mesh = make_mesh(**sizes)
    placed = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        source.abstract,
        shardings(source.abstract, SHARDING_RULES, mesh),
    )
    return lora.restore(source, placed)


def merged_by_peft(base: Path, adapter: Path, path: Path) -> PyTree:
    """What `merge_and_unload` makes of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
        whole: Any = peft.PeftModel.from_pretrained(opened(base), str(adapter)).merge_and_unload()
    whole.save_pretrained(path)
    source = huggingface.describe("merged", epath.Path(path))
    return huggingface.restore(source, source.abstract)


KINDS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "all linear, rank-stabilised": {"target_modules": "all-linear", "use_rslora": True},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head", "up_proj"], "lora_alpha": 5},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "down_proj": 8},
        "alpha_pattern": {r"^model.layers.\d+.self_attn.[qk]_proj": 3, "q_proj": 100},
    },
    "patterns, rank-stabilised": {
        "target_modules": ["q_proj", "o_proj"],
        "rank_pattern": {"o_proj": 1},
        "use_rslora": True,
    },
    "whole modules": {"target_modules": ["gate_proj"], "modules_to_save": ["embed_tokens", "norm"]},
    "all biases": {"target_modules": ["q_proj", "up_proj"], "bias": "all"},
    "biases of targets": {"target_modules": ["q_proj", "up_proj"], "bias": "lora_only"},
    "one layer": {"target_modules": ["up_proj"], "layers_to_transform": [1]},
    "DoRA": {"target_modules": "all-linear", "use_dora": True, "use_rslora": True},
    "DoRA of embeddings": {"target_modules": ["embed_tokens", "up_proj"], "use_dora": True},
    "PiSSA": {"target_modules": "all-linear", "init_lora_weights": "pissa", "lora_alpha": 3},
    "OLoRA": {"target_modules": "all-linear", "init_lora_weights": "olora"},
    "OLoRA, ranks and DoRA": {
        "target_modules": ["q_proj", "k_proj", "embed_tokens"],
        "init_lora_weights": "OLoRA",
        "rank_pattern": {"k_proj": 2},
        "use_dora": True,
    },
    "orthogonal": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    "gaussian": {"target_modules": ["k_proj"], "init_lora_weights": "gaussian"},
    "fan_in_fan_out, which peft corrects": {"target_modules": ["up_proj"], "fan_in_fan_out": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_as_peft_merges_it(base, tmp_path, monkeypatch, kind):
    """Every leaf, also those that the adapter leaves alone; on one device and in shards."""
    monkeypatch.setattr(lora, "_PRODUCT", 700)  # several products for each tensor
    adapter = make_adapter(base, tmp_path / "adapter", r=4, **KINDS[kind])
    source = describe(adapter)
    assert (source.format, source.base, source.directory) == ("lora", str(base), str(base))
    assert source.architecture["model"] == "decoder"
    expected = named_leaves(merged_by_peft(base, adapter, tmp_path / "merged"))
    whole = huggingface.describe("base", epath.Path(base))
    before = named_leaves(huggingface.restore(whole, whole.abstract))
    for sizes in ({}, {"fsdp": 2, "tensor": 4}):
        found = named_leaves(load(source, **sizes))
        assert found.keys() == expected.keys()
        for name, leaf in found.items():
            assert leaf.dtype == "float32"
            np.testing.assert_allclose(leaf, expected[name], rtol=0, atol=TOLERANCE)
    changed = [name for name in before if not np.array_equal(before[name], expected[name])]
    assert changed


def test_rounded_once_to_the_bases_dtype(tmp_path):
    """The sum of float32 factors and a bfloat16 base is formed in float32."""
    base = make_base(tmp_path / "base", dtype="bfloat16")
    adapter = make_adapter(base, tmp_path / "adapter", r=4, target_modules=["up_proj"])
    factors = load_file(adapter / WEIGHTS)
    leaf = load(describe(adapter))["layers"]["up"]
    assert leaf.dtype == "bfloat16"
    stored = load_file(base / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    a, b = (factors[f"{PREFIX}mlp.up_proj.lora_{each}.weight"].float() for each in "AB")
    expected = (stored.double() + 8 / 4 * (b.double() @ a.double())).float().bfloat16()
    found = torch.tensor(np.asarray(leaf[1]).astype(np.float32)).bfloat16()
    # float64 against float32 before rounding: at a tie of bfloat16, one value in some thousands.
    assert (found != expected).float().mean() < 0.002


def test_the_base_that_is_named(base, tmp_path):
    """The argument goes before what the adapter says; without either there is a way out."""
    adapter = make_adapter(base, tmp_path / "adapter", r=2, target_modules=["up_proj"])
    moved = shutil.copytree(base, tmp_path / "moved")
    assert describe(adapter, str(moved)).base == str(moved)
    with pytest.raises(JaxmergeError, match="no weights here"):
        describe(adapter, str(tmp_path))
    for named in ("someone/model", None, ""):
        edit_config(adapter, lambda x, named=named: x.update(base_model_name_or_path=named))
        assert describe(adapter, str(moved)).base == str(moved)
        with pytest.raises(JaxmergeError, match="base is not here") as caught:
            describe(adapter)
        assert "pool.base" in caught.value.expected
        assert caught.value.where == str(adapter / CONFIG)


def edit_config(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((path / CONFIG).read_text())
    change(config)
    (path / CONFIG).write_text(json.dumps(config))


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    """An adapter to copy and damage."""
    path = tmp_path_factory.mktemp("lora") / "adapter"
    return make_adapter(base, path, r=4, target_modules=["up_proj", "q_proj"])


def refused(adapter: Path, to: Path, damage: Callable[[Path], object]) -> JaxmergeError:
    path = Path(shutil.copytree(adapter, to))
    damage(path)
    assert lora.recognises(epath.Path(path))
    with pytest.raises(JaxmergeError) as caught:
        load(describe(path))
    assert str(path) in caught.value.where
    return caught.value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "IA3"),
        ("lora_bias", True),
        ("kasa_config", {"a": 1}),
        ("use_dora", "yes"),
        ("layer_replication", [[0, 2]]),
        ("trainable_token_indices", [3, 4]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("use_qalora", True),
        ("alora_invocation_tokens", [5]),
        ("something_new", {"a": 1}),
    ],
)
def test_kinds_that_are_not_understood(adapter, tmp_path, field, value):
    """Each by its name and value, rather than passed over."""
    error = refused(
        adapter, tmp_path / "x", lambda path: edit_config(path, lambda x: x.update({field: value}))
    )
    assert field in str(error)
    assert str(value)[:20] in str(error)
    assert CONFIG in error.where


@pytest.mark.parametrize("field", ["r", "lora_alpha", "rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("value", ["4", True, float("nan"), [4], -(10**400)])
def test_ranks_and_alphas_that_are_no_numbers(adapter, tmp_path, field, value):
    """In the config or in a pattern."""
    change = {field: {"up_proj": value} if "pattern" in field else value}
    error = refused(
        adapter, tmp_path / "x", lambda path: edit_config(path, lambda x: x.update(change))
    )
    assert "no numbers" in error.what
    assert str(value) in error.found


def _weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        tensors = load_file(path / WEIGHTS)
        change(tensors)
        save_file(tensors, path / WEIGHTS)

    return damage


def _rename(old: str, new: str) -> Callable[[Path], object]:
    return _weights(lambda x: x.update({PREFIX + new: x.pop(PREFIX + old)}))


def _add(name: str, *shape: int) -> Callable[[Path], object]:
    return _weights(lambda x: x.update({name: torch.ones(shape)}))


def _dora(*lengths: int) -> Callable[[Path], object]:
    """DoRA with magnitudes of these lengths, in the name that peft once gave them."""
    modules = ("mlp.up_proj", "self_attn.q_proj")

    def damage(path: Path) -> None:
        edit_config(path, lambda x: x.update(use_dora=True))
        for layer in (0, 1):
            for module, length in zip(modules, lengths):
                name = f"base_model.model.model.layers.{layer}.{module}.lora_magnitude_vector"
                _add(name, length)(path)

    return damage


UP_A, UP_B = "mlp.up_proj.lora_A.weight", "mlp.up_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_add("lm_head.weight", 2), "tensor lm_head.weight is not known"),
        (_add(PREFIX + "mlp.up_proj.lora_magnitude_vector", 48), "use_dora is not true"),
        (_add(PREFIX + "mlp.up_proj.lora_E", 2), "is not known"),
        (_dora(48, 2), r"q_proj.weight: its lora_magnitude_vector is \[2\], not \[32\]"),
        (_dora(48), "q_proj.weight has no lora_magnitude_vector"),
        (_add(PREFIX + "mlp.up_proj.lora_B.bias", 48), "no tensor .*up_proj.lora_B.bias"),
        (_add(PREFIX + "mlp.up_proj.lora_embedding_A", 4, 48), "which are no pair"),
        (_weights(lambda x: x.pop(PREFIX + UP_A)), "up_proj.weight has lora_B.weight, which"),
        (_rename(UP_A, "mlp.other.lora_A.weight"), "no pair"),
        (_add(PREFIX + "mlp.up_proj.weight", 3, 3), r"is \[3, 3\], in the base \[48, 32\]"),
        (_add(PREFIX + "mlp.up_proj.bias", 48), "the base has no tensor"),
        (_add(PREFIX + UP_A, 4, 48), "do not make it"),
        (_add(PREFIX + UP_A, 3, 32), "by the config of rank 4"),
        (_add(PREFIX + UP_A), "by the config of rank 4"),
        (_add(PREFIX + UP_B, 32, 4), "do not make it"),
    ],
)
def test_tensors_that_have_no_place(adapter, tmp_path, damage, said):
    """Every tensor is used once, or the adapter is refused."""
    error = refused(adapter, tmp_path / "x", damage)
    assert "can't be laid upon its base" in error.what
    assert re.search(said, error.what)


def test_what_a_sharded_trainer_left(adapter, tmp_path):
    """Factors of shape [0], by their names; and a config with a byte order mark is read."""

    def damage(path: Path) -> None:
        _add(PREFIX + UP_A, 0)(path)
        (path / CONFIG).write_text("\ufeff" + (path / CONFIG).read_text())

    error = refused(adapter, tmp_path / "x", damage)
    assert "shape [0]" in error.what
    assert PREFIX + UP_A in error.found


def test_the_same_tensor_twice(adapter, tmp_path):
    """A module saved whole has two spellings; both at once are refused."""

    def change(tensors):
        tensors[PREFIX + "mlp.down_proj.weight"] = torch.ones(32, 48)
        tensors[PREFIX + "mlp.down_proj.base_layer.weight"] = torch.ones(32, 48)

    assert "has the place of another" in refused(adapter, tmp_path / "x", _weights(change)).what


def test_a_base_of_another_shape(adapter, tmp_path):
    """Every module is named."""
    other = make_base(tmp_path / "other", num_hidden_layers=1, intermediate_size=40)
    with pytest.raises(JaxmergeError) as caught:
        describe(adapter, str(other))
    assert sorted(line.split()[-1] for line in caught.value.what.splitlines()[1:]) == [
        "it",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
    ]


def _pickle(path: Path) -> None:
    (path / WEIGHTS).rename(path / "adapter_model.bin")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_pickle, "the adapter is pickled"),
        (lambda path: (path / WEIGHTS).unlink(), "has no weights"),
        (lambda path: (path / "model.safetensors").touch(), "both an adapter and a whole model"),
        (lambda path: (path / CONFIG).write_text("{"), "no JSON"),
        (lambda path: (path / CONFIG).write_text("[]"), "of another kind"),
    ],
)
def test_directories_that_are_refused(adapter, tmp_path, damage, said):
    assert said in refused(adapter, tmp_path / "x", damage).what


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["up_proj"], "modules_to_save": ["embed_tokens"]},
    ],
    ids=str,
)
def test_embeddings_that_are_tied(tmp_path, options):
    """The adapter changes one side of what is one tensor: no tied model is the same."""
    base = make_base(tmp_path / "base", tie_word_embeddings=True)
    adapter = make_adapter(base, tmp_path / "adapter", r=2, **options)
    with pytest.raises(JaxmergeError, match="are one tensor") as caught:
        describe(adapter)
    assert caught.value.where == str(adapter)
