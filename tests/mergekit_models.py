"""Random tiny models and the YAML of merges of them, as people publish it.

`tools/mergekit_yaml.py` has mergekit make these merges, and keeps what it made; the suite makes
them with jaxmerge from the same inputs, which come from a seed. Nothing here needs PyTorch.
"""

import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxmerge.checkpoints.safetensors import in_file_order, make_header, read_header, read_into

# Few shapes, since each is a program to compile.
WIDTH, INNER, LAYERS, HEADS, KV_HEADS = 8, 8, 4, 2, 2
_LETTERS = "▁abcdefghijklmnop"
_MERGES = ("▁ a", "▁ b", "a b", "c d", "▁a b", "e f", "c o", "o d")
SAMPLES = ("abab cofe", "<|im_start|> ghighi a", "b <tool>odcd<|im_end|>")
_CHAT = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


class Kind(NamedTuple):
    """What the models of a family have in common."""

    architecture: str
    model_type: str
    dtype: str
    tied: bool = False
    biases: bool = False
    rows: int = 0  # of the embeddings; 0: as many as the tokenizer has tokens


KINDS = {
    "llama": Kind("LlamaForCausalLM", "llama", "float32"),
    # Rows that pad the vocabulary, as Qwen's have.
    "qwen": Kind("Qwen2ForCausalLM", "qwen2", "bfloat16", tied=True, biases=True, rows=32),
    "mistral": Kind("MistralForCausalLM", "mistral", "float16"),
}
# Tokens that a model's tokenizer has besides those of its base, as merges and as added tokens.
VOCABULARIES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "llama/b": ((), ("<|im_start|>", "<|im_end|>")),
    "llama/c": (("g h", "gh i"), ("<|im_end|>", "<tool>")),
}
MODELS = (*(f"llama/{name}" for name in ("base", "a", "a2", "b", "c")),) + tuple(
    f"{kind}/{name}" for kind in ("qwen", "mistral") for name in ("base", "a", "b")
)
ADAPTER = "llama/adapter"  # of llama/base


def cases() -> list[Path]:
    """The YAML files; beside each is what mergekit made of it."""
    return sorted((Path(__file__).parent / "mergekit_yaml").glob("*.yml"))


def make(directory: Path) -> None:
    """Writes all models, as `directory/llama/base` and so on."""
    for name in MODELS:
        _model(directory / name, name)
    _adapter(directory / ADAPTER, directory / "llama" / "base")


def load(directory: Path) -> dict[str, np.ndarray]:
    """The tensors of a model in one file."""
    tensors = {}
    for name, tensor in read_header(epath.Path(directory) / "model.safetensors").items():
        tensors[name] = np.empty(tensor.shape, tensor.dtype)
        read_into(tensor.file, tensor.start, tensors[name].reshape(-1))
    return tensors


def _model(path: Path, name: str) -> None:
    kind = KINDS[name.split("/")[0]]
    path.mkdir(parents=True)
    tokens = _tokenizer(path, name)
    rows = kind.rows or tokens
    base = {each: _values(f"{kind.model_type} base {each}", shape) for each, shape in _shapes(kind)}
    own = base
    if not name.endswith("base"):
        own = {
            each: base[each] + 0.3 * _values(f"{name} {each}", base[each].shape) for each in base
        }
    for each, head in (("model.embed_tokens.weight", False), ("lm_head.weight", True)):
        if not (head and kind.tied):
            own[each] = _values(f"{name} {each}", (64, WIDTH))[:rows]
    dtype = jnp.dtype(kind.dtype)
    _save(path / "model.safetensors", {key: value.astype(dtype) for key, value in own.items()})
    config: dict[str, Any] = {
        "architectures": [kind.architecture],
        "model_type": kind.model_type,
        "torch_dtype": kind.dtype,
        "vocab_size": rows,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": kind.tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (path / "config.json").write_text(json.dumps(config))


def _shapes(kind: Kind) -> list[tuple[str, tuple[int, ...]]]:
    narrow = WIDTH // HEADS * KV_HEADS  # as wide as all heads here
    attention = {"q": (WIDTH, WIDTH), "k": (narrow, WIDTH), "v": (narrow, WIDTH)}
    shapes: list[tuple[str, tuple[int, ...]]] = []
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name, shape in attention.items():
            shapes.append((f"{prefix}.self_attn.{name}_proj.weight", shape))
            if kind.biases:
                shapes.append((f"{prefix}.self_attn.{name}_proj.bias", shape[:1]))
        shapes.append((f"{prefix}.self_attn.o_proj.weight", (WIDTH, WIDTH)))
        shapes += [(f"{prefix}.mlp.{name}_proj.weight", (INNER, WIDTH)) for name in ("gate", "up")]
        shapes.append((f"{prefix}.mlp.down_proj.weight", (WIDTH, INNER)))
        shapes += [
            (f"{prefix}.{name}_layernorm.weight", (WIDTH,)) for name in ("input", "post_attention")
        ]
    return [*shapes, ("model.norm.weight", (WIDTH,))]


def _values(seed: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values from -0.5 to 0.5, the same with every version of NumPy."""
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(seed.encode())))
    return (generator.random(shape) - 0.5).astype(np.float32)


def _save(path: Path, tensors: dict[str, np.ndarray]) -> None:
    order = in_file_order({name: values.dtype for name, values in tensors.items()})
    header = make_header((name, tensors[name].dtype, tensors[name].shape) for name in order)
    path.write_bytes(header + b"".join(tensors[name].tobytes() for name in order))


def _tokenizer(path: Path, name: str) -> int:
    """Writes a tokenizer; how many tokens it has."""
    more, added = VOCABULARIES.get(name, ((), ()))
    merges = [*_MERGES, *more]
    tokens = ["<unk>", "<s>", "</s>", *_LETTERS, *("".join(each.split()) for each in merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    special = [*tokens[:3], *added]
    for token in added:
        vocabulary.setdefault(token, len(vocabulary))
    model = {token: index for token, index in vocabulary.items() if token not in added}
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": vocabulary[token], "content": token, **flags, "special": True}
            for token in special
        ],
        "normalizer": None,
        "pre_tokenizer": space,
        "post_processor": None,
        "decoder": space,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": model,
            "merges": [each.split() for each in merges],
        },
    }
    (path / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "<|im_end|>" if name == "llama/b" else "</s>",
        "model_max_length": 64,
        "clean_up_tokenization_spaces": False,
        "chat_template": _CHAT,
    }
    if name == "llama/c":
        del settings["chat_template"]
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(vocabulary)


def _adapter(path: Path, base: Path) -> None:
    """A LoRA adapter of rank 2 on two projections of every layer."""
    path.mkdir(parents=True)
    tensors = {}
    for layer in range(LAYERS):
        for module, rows, columns in (
            ("self_attn.q_proj", WIDTH, WIDTH),
            ("mlp.down_proj", WIDTH, INNER),
        ):
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = _values(f"A {name}", (2, columns))
            tensors[f"{name}.lora_B.weight"] = _values(f"B {name}", (rows, 2))
    _save(path / "adapter_model.safetensors", tensors)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "down_proj"],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
