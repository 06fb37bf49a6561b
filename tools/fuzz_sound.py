"""Sound inputs of tools/fuzz_readers.py: small models, adapters, tokenizers, merges and runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0}
    | {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": [1, 2],
}
ADAPTER = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj"],
    "rank_pattern": {"layers.0.self_attn.q_proj": 2},
    "alpha_pattern": {},
    "init_lora_weights": "pissa",
    "use_dora": False,
}
MERGE = """
merge_method: ties
base_model: ./base
models:
  - model: ./a+./adapter
    parameters: {density: [0.2, 0.5], weight: [{filter: mlp, value: 0.5}, {value: 1e-1}]}
  - model: ./b@main
parameters: &rest
  normalize: true
  <<: {lambda: 1.0}
dtype: bfloat16
tokenizer: {source: union, tokens: {<|x|>: {source: ./a, force: true}}, pad_to_multiple_of: 8}
---
name: second
merge_method: slerp
slices:
  - sources: [{model: ./a, layer_range: [0, 1]}, {model: ./b, layer_range: [0, 1]}]
parameters: {t: 0.5}
"""
EVOLVE = """
genome:
  models: [./a, ./a]
  merge_method: linear
  layer_granularity: 1
tasks:
  - {name: arc_easy, weight: 2.0, metric: acc}
limit: 10
"""


def as_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


def weights(file: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """A file of zeros."""
    import numpy as np

    from jaxmerge.checkpoints.safetensors import make_header

    dtype = np.dtype(np.float32)
    head = make_header((name, dtype, shape) for name, shape in tensors.items())
    count = sum(int(np.prod(shape)) for shape in tensors.values())
    file.write_bytes(head + bytes(4 * count))


def llama(directory: Path, **changes: Any) -> None:
    """A model of `LLAMA`, or of one that differs from it."""
    config = {**LLAMA, **changes}
    width, inner = config["hidden_size"], config["intermediate_size"]
    queries, keys = (
        config[heads] * config["head_dim"]
        for heads in ("num_attention_heads", "num_key_value_heads")
    )
    layer = "model.layers.0."
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], width),
        "model.norm.weight": (width,),
        f"{layer}self_attn.q_proj.weight": (queries, width),
        f"{layer}self_attn.k_proj.weight": (keys, width),
        f"{layer}self_attn.v_proj.weight": (keys, width),
        f"{layer}self_attn.o_proj.weight": (width, queries),
        f"{layer}mlp.gate_proj.weight": (inner, width),
        f"{layer}mlp.up_proj.weight": (inner, width),
        f"{layer}mlp.down_proj.weight": (width, inner),
        f"{layer}input_layernorm.weight": (width,),
        f"{layer}post_attention_layernorm.weight": (width,),
    }
    directory.mkdir(exist_ok=True)
    weights(directory / "model.safetensors", shapes)
    (directory / "config.json").write_bytes(as_bytes(config))


def run_directory(directory: Path) -> Path:
    """A finished run, fabricated."""
    from tests.report.fabricated import fabricate

    directory.mkdir()
    fabricate(directory, budget=4)
    first = [{"prompt": "2 + 2?", "target": "4", "output": "No.", "score": 0.0}]
    tasks = {"arithmetic": {"first": first, "constant": "No.", "share": 0.75}}
    said = {"split": "search", "warnings": ["odd"], "checkpoints": {"code": tasks}}
    (directory / "outputs.json").write_bytes(as_bytes(said))
    return directory


def tokenizer_files() -> dict[str, Any]:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    words = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4, "u": 5, "s": 6, "e": 7, "r": 8}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added |= {"special": True}
    return {
        "tokenizer.json": {
            "version": "1.0",
            "added_tokens": [{"id": i, "content": c, **added} for c, i in [*words.items()][:2]],
            "pre_tokenizer": {**level, "use_regex": True},
            "decoder": level,
            "model": {"type": "BPE", "vocab": words, "merges": [["a", "b"]]},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "chat_template": "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}",
        },
        "generation_config.json": {"eos_token_id": [1, 2], "max_length": 20},
        "config.json": LLAMA,
    }
