"""Random tiny models of transformers, in all the variants of the families that jaxmerge reads."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

from jaxmerge.models import families
from jaxmerge.trees import PyTree

VOCAB = 96

TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
BIASED = {"attention_bias": True}
UNTIED = {"tie_word_embeddings": False}
TIED = {"tie_word_embeddings": True}
MULTI_HEAD = {"num_key_value_heads": 4}
SLIDING, FULL = "sliding_attention", "full_attention"
MIXED = {"num_hidden_layers": 3, "layer_types": [SLIDING, FULL, SLIDING], "sliding_window": 5}
QWEN_MIXED = MIXED | {"use_sliding_window": True}
NORMAL_HEADS = {"head_dim": 8}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "final_logit_softcapping": 20.0}
COHERE = {"logit_scale": 0.25}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
DIVISORS = {"short_factor": [1.0, 1.2, 1.5, 2.0], "long_factor": [1.1, 2.0, 4.0, 9.0]}


def _rope(scaling: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": scaling, "rope_theta": 50.0, **parameters}}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
GRANITE = {"embedding_multiplier": 3.0, "attention_multiplier": 0.25} | {
    "residual_multiplier": 0.7,
    "logits_scaling": 0.5,
}
GRANITE_HYBRID = {
    "layer_types": ["attention", "attention"],
    "num_local_experts": 0,
    "shared_intermediate_size": 40,
    "position_embedding_type": "rope",
    **{"mamba_n_heads": 8, "mamba_d_head": 8},
}
LONG = _rope("longrope", **DIVISORS)

# name -> (class of the config without "Config", what differs from TINY)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama multi-head tied": ("Llama", TIED | MULTI_HEAD),
    "llama multi-query wide heads": ("Llama", {"num_key_value_heads": 1, "head_dim": 16}),
    "llama biases": ("Llama", BIASED | {"mlp_bias": True, "hidden_act": "gelu"}),
    "llama linear": ("Llama", _rope("linear", factor=3.0)),
    "llama dynamic": ("Llama", _rope("dynamic", factor=2.0) | {"max_position_embeddings": 12}),
    "llama yarn": ("Llama", _rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    "llama yarn magnitudes": (
        "Llama",
        _rope(
            "yarn",
            factor=8.0,
            original_max_position_embeddings=16,
            beta_fast=4,
            beta_slow=0.5,
            mscale=0.7,
            mscale_all_dim=1.3,
            truncate=False,
        ),
    ),
    "llama llama3": (
        "Llama",
        _rope("llama3", **LLAMA3, original_max_position_embeddings=64) | {"head_dim": 16},
    ),
    "llama longrope": (
        "Llama",
        _rope("longrope", **DIVISORS, factor=4.0, original_max_position_embeddings=40),
    ),
    "llama old-style rope": (
        "Llama",
        {"rope_theta": 700.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    ),
    "smollm2": (
        "Llama",
        TIED | {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 1},
    ),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "mistral no window, tied": ("Mistral", TIED | {"sliding_window": None, "head_dim": 16}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4, "no_rope_layer_interval": 2}),
    "smollm3 windows, biases, untied": (
        "SmolLM3",
        UNTIED
        | BIASED
        | {"num_hidden_layers": 3, "no_rope_layers": [0, 1, 0], "mlp_bias": True}
        | {"use_sliding_window": True, "sliding_window": 5},
    ),
    "qwen2": ("Qwen2", {}),
    "qwen2 windows, tied": ("Qwen2", QWEN_MIXED | TIED),
    "qwen3": ("Qwen3", NORMAL_HEADS),
    "qwen3 windows, biases, tied": ("Qwen3", QWEN_MIXED | BIASED | TIED | {"head_dim": 16}),
    "qwen3 yarn": (
        "Qwen3",
        _rope("yarn", factor=4.0, original_max_position_embeddings=32) | NORMAL_HEADS,
    ),
    "ministral": ("Ministral", MIXED | NORMAL_HEADS),
    "seed oss": ("SeedOss", NORMAL_HEADS),
    "seed oss out biases": (
        "SeedOss",
        {"head_dim": 16, "attention_bias": False, "attention_out_bias": True, "mlp_bias": True},
    ),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma biases, untied": ("Gemma", {"head_dim": 8} | BIASED | UNTIED | MULTI_HEAD),
    "gemma2": ("Gemma2", GEMMA | MIXED),
    "gemma2 no softcaps, biases, untied": (
        "Gemma2",
        {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5}
        | {"final_logit_softcapping": None, "attn_logit_softcapping": None}
        | BIASED
        | UNTIED
        | MULTI_HEAD,
    ),
    "gemma3": ("Gemma3Text", GEMMA | MIXED),
    "gemma3 scaled full attention": (
        "Gemma3Text",
        {"head_dim": 8, "query_pre_attn_scalar": 8}
        | MIXED
        | {
            "rope_parameters": {
                SLIDING: {"rope_type": "default", "rope_theta": 20.0},
                FULL: {"rope_type": "linear", "rope_theta": 900.0, "factor": 8.0},
            }
        },
    ),
    "cohere": ("Cohere", COHERE),
    "cohere norms, biases, untied": ("Cohere", COHERE | {"use_qk_norm": True} | BIASED | UNTIED),
    "cohere2": ("Cohere2", COHERE | MIXED),
    "cohere2 multi-head biases": ("Cohere2", COHERE | MIXED | MULTI_HEAD | BIASED),
    "olmo2": ("Olmo2", {}),
    "olmo2 multi-head, biases, tied": ("Olmo2", MULTI_HEAD | BIASED | TIED),
    "olmo3": ("Olmo3", MIXED),
    "olmo3 scaled full attention, biases": (
        "Olmo3",
        MIXED
        | BIASED
        | {
            "rope_parameters": {
                SLIDING: {"rope_type": "default", "rope_theta": 50.0},
                FULL: YARN | {"rope_theta": 50.0},
            }
        },
    ),
    "granite": ("Granite", GRANITE),
    "granite biases, tied": ("Granite", GRANITE | BIASED | TIED | {"mlp_bias": True}),
    "granite hybrid": ("GraniteMoeHybrid", GRANITE | GRANITE_HYBRID),
    "granite hybrid without positions, biases": (
        "GraniteMoeHybrid",
        GRANITE | GRANITE_HYBRID | BIASED | TIED | {"position_embedding_type": None},
    ),
    "phi3": ("Phi3", {"sliding_window": 5}),
    "phi3 partial rotary, tied": (
        "Phi3",
        TIED | {"partial_rotary_factor": 0.5, "head_dim": 16, "hidden_size": 64},
    ),
    "phi3 longrope, short": ("Phi3", LONG | {"original_max_position_embeddings": 100}),
    "phi3 longrope, long": ("Phi3", LONG | {"original_max_position_embeddings": 4}),
    "mixtral": ("Mixtral", EXPERTS),
    "mixtral window, tied": ("Mixtral", EXPERTS | TIED | {"sliding_window": 5}),
    "qwen3 moe": ("Qwen3Moe", QWEN_EXPERTS | NORMAL_HEADS),
    "qwen3 moe normalised, tied, biases": (
        "Qwen3Moe",
        QWEN_EXPERTS | NORMAL_HEADS | TIED | BIASED | {"norm_topk_prob": True},
    ),
}
# Frequencies that depend on the length: transformers takes the longest text of the batch, jaxmerge
# each row's own, so these agree row by row only.
LENGTH_DEPENDENT = ("llama dynamic", "llama longrope")


class Tiny(NamedTuple):
    """A model of transformers, the directory it is saved in, and the same for jaxmerge."""

    model: Any
    directory: str
    architecture: families.Architecture
    tensors: dict[str, np.ndarray]
    params: PyTree


def config_of(variant: str) -> Any:
    family, changes = VARIANTS[variant]
    return getattr(transformers, f"{family}Config")(**TINY | changes)


@functools.cache
def tiny(variant: str) -> Tiny:
    """The random model of a variant, saved, and read by jaxmerge from what was saved."""
    torch.set_num_threads(1)
    config = config_of(variant)
    config._attn_implementation = "eager"
    causal_lm = transformers.AutoModelForCausalLM.from_config(config).eval()
    _randomise(causal_lm)
    directory = tempfile.mkdtemp(prefix="jaxmerge-tiny-")
    atexit.register(shutil.rmtree, directory)
    causal_lm.save_pretrained(directory)
    architecture = families.read(directory)
    assert architecture is not None
    tensors = load_file(Path(directory) / "model.safetensors")
    return Tiny(causal_lm, directory, architecture, tensors, assemble(architecture, tensors))


def load(directory: str) -> Any:
    """The model that transformers makes of a directory."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", local_files_only=True
    ).eval()


def _randomise(causal_lm: Any) -> None:
    """Fills all parameters, so that each matters; matrices keep the scale of what they multiply.

    The embedding is small beside what the layers add, or else, where it is the output projection
    too, a text would repeat its last token for ever.
    """
    generator = torch.Generator().manual_seed(17)
    small = 0.2 / getattr(causal_lm.model.embed_tokens, "scalar_embed_scale", 1.0)
    for name, value in causal_lm.named_parameters():
        random = torch.randn(value.shape, generator=generator)
        if "norm" in name:
            random = 1 + 0.3 * random
        elif name.endswith("bias"):
            random = 0.3 * random
        else:
            random *= small if "embed_tokens" in name else 1.5 / value.shape[-1] ** 0.5
        value.data.copy_(random)


def assemble(architecture: families.Architecture, tensors: dict[str, np.ndarray]) -> PyTree:
    """The parameters of the decoder, put together as the layout says."""
    params: PyTree = {}
    for name, parts in architecture.layout.leaves.items():
        rows = [tensors[part.tensor][part.start : part.stop].reshape(-1) for part in parts]
        *above, last = name.split("/")
        node = params
        for key in above:
            node = node.setdefault(key, {})
        node[last] = jnp.asarray(np.concatenate(rows).reshape(architecture.layout.shapes[name]))
    return params


def logits(causal_lm: Any, tokens: np.ndarray, padding: np.ndarray | None = None) -> np.ndarray:
    """Logits of all positions; those of padding, which is on the left, mean nothing."""
    B, T = tokens.shape
    fresh_positions(causal_lm)
    padding = np.zeros(B, np.int64) if padding is None else padding
    slot = np.arange(T)[None]
    with torch.no_grad():
        out = causal_lm(
            input_ids=torch.tensor(tokens, dtype=torch.long),
            attention_mask=torch.tensor(slot >= padding[:, None]).long(),
            position_ids=torch.tensor(np.maximum(slot - padding[:, None], 0)),
            use_cache=False,
        )
    return out.logits.numpy()


def greedy(causal_lm: Any, prompts: np.ndarray, padding: np.ndarray, count: int) -> np.ndarray:
    """The next tokens that transformers generates with its cache."""
    T = prompts.shape[1]
    fresh_positions(causal_lm)
    with torch.no_grad():
        out = causal_lm.generate(
            torch.tensor(prompts, dtype=torch.long),
            attention_mask=torch.tensor(np.arange(T)[None] >= padding[:, None]).long(),
            do_sample=False,
            use_cache=True,
            max_new_tokens=count,
            min_new_tokens=count,
        )
    return out[:, T:].numpy()


def fresh_positions(causal_lm: Any) -> None:
    """Forgets the longest text so far, which rotary positions that depend on it remember."""
    rotary = causal_lm.model.rotary_emb
    if rotary is None:  # of a model without positions
        return
    causal_lm.model.rotary_emb = type(rotary)(causal_lm.config)
