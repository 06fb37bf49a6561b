"""What each family's config says of its decoder, and the names of its tensors: the table.

A family is a function from the attributes of its config to the fields of a `DecoderConfig`, and the
names that are its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxmerge.models.architecture import AttentionKind
from jaxmerge.models.attributes import Attributes, read_rope, scaled_rope
from jaxmerge.models.rope import Rope

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def _common(attributes: Attributes) -> dict[str, Any]:
    """What all families have, read from attributes that bear the same names in all of them."""
    take = attributes.take
    heads, width = take("num_attention_heads"), take("hidden_size")
    activation = take("hidden_act", "silu")
    activation = take("hidden_activation", activation)  # Gemma's name, which goes first
    if activation not in ACTIVATIONS:
        attributes.refuse("hidden_act", activation)
    return {
        "vocab": take("vocab_size"),
        "width": width,
        "layers": take("num_hidden_layers"),
        "heads": heads,
        "kv_heads": take("num_key_value_heads", heads),
        "head_width": take("head_dim", width // heads),
        "feed_forward": take("intermediate_size"),
        "activation": ACTIVATIONS.get(activation, "silu"),
        "norm_epsilon": take("layer_norm_eps", take("rms_norm_eps")),
        "tied_embeddings": take("tie_word_embeddings", False),
    }


def _attention_bias(attributes: Attributes) -> dict[str, Any]:
    biased = attributes.take("attention_bias", False)
    return {"query_key_value_bias": biased, "out_bias": biased}


def _alike(attributes: Attributes, rope: Rope) -> dict[str, Any]:
    """Layers that all attend alike, within the sliding window if there is one."""
    return {"attention": (AttentionKind(attributes.take("sliding_window", 0), rope),)}


def _by_type(
    attributes: Attributes, full: Rope | None, sliding: Rope | None, field: str = "layer_types"
) -> dict[str, Any]:
    """Layers that attend to all or within a window, as their types say."""
    types, window = attributes.take(field), attributes.take("sliding_window", 0)
    kinds = {
        "full_attention": AttentionKind(0, full),
        "sliding_attention": AttentionKind(window, sliding),
    }
    if not set(types) <= kinds.keys() or ("sliding_attention" in types and not window):
        attributes.refuse(field, types)
        return {}
    return _pattern([kinds[each] for each in types])


def _ropes_by_type(attributes: Attributes) -> tuple[Rope, Rope]:
    """The rotary positions of layers that attend to all, and of those within a window."""
    longest, ropes = attributes.take("max_position_embeddings"), attributes.take("rope_parameters")
    full, sliding = (
        scaled_rope(attributes, ropes[each], longest)
        for each in ("full_attention", "sliding_attention")
    )
    return full, sliding


def _pattern(kinds: Sequence[AttentionKind]) -> dict[str, Any]:
    """The kinds of attention that there are, and which of them each layer has."""
    attention = tuple(dict.fromkeys(kinds))
    pattern = tuple(attention.index(kind) for kind in kinds) if len(attention) > 1 else ()
    return {"attention": attention, "pattern": pattern}


def _llama(attributes: Attributes) -> dict[str, Any]:
    return {
        **_common(attributes),
        **_attention_bias(attributes),
        "feed_forward_bias": attributes.take("mlp_bias", False),
        "attention": (AttentionKind(rope=read_rope(attributes)),),
    }


def _mistral(attributes: Attributes) -> dict[str, Any]:
    return {**_common(attributes), **_alike(attributes, read_rope(attributes))}


def _ministral(attributes: Attributes) -> dict[str, Any]:
    rope = read_rope(attributes)
    return {**_common(attributes), **_by_type(attributes, rope, rope)}


def _seed_oss(attributes: Attributes) -> dict[str, Any]:
    return {**_llama(attributes), "out_bias": attributes.take("attention_out_bias", False)}


def _granite(attributes: Attributes) -> dict[str, Any]:
    return {
        **_llama(attributes),
        "embedding_scale": attributes.take("embedding_multiplier", 1.0),
        "attention_scale": attributes.take("attention_multiplier", 1.0),
        "residual_scale": attributes.take("residual_multiplier", 1.0),
        "logit_scale": 1 / attributes.take("logits_scaling", 1.0),
    }


def _granite_hybrid(attributes: Attributes) -> dict[str, Any]:
    """Granite 4 where all layers attend and none has experts (its micro, 1b and 350m)."""
    for recurrent in _MAMBA:
        attributes.take(recurrent)
    attributes.expect("num_local_experts", 0)
    attributes.take("num_experts_per_tok")
    turning = attributes.take("position_embedding_type") == "rope"
    fields = _granite(attributes)
    (kind,) = fields["attention"]
    rope = kind.rope if turning else None
    return {
        **fields,
        **_by_type(attributes, rope, rope),
        "feed_forward": attributes.take("shared_intermediate_size"),
    }


_MAMBA = """
    mamba_n_heads mamba_n_groups mamba_d_state mamba_d_head mamba_d_conv mamba_expand
    mamba_chunk_size mamba_conv_bias mamba_proj_bias time_step_limit
""".split()


def _smollm3(attributes: Attributes) -> dict[str, Any]:
    fields = _llama(attributes)
    (kind,) = fields["attention"]
    turning = attributes.take("no_rope_layers")  # 1 where a layer does have rotary positions
    attributes.take("use_sliding_window")  # layer_types say it by layer
    typed = _by_type(attributes, kind.rope, kind.rope)
    if typed:
        layers = [typed["attention"][i] for i in typed["pattern"] or [0] * fields["layers"]]
        typed = _pattern(
            [
                kind if turns else dataclasses.replace(kind, rope=None)
                for kind, turns in zip(layers, turning)
            ]
        )
    return fields | typed


def _qwen2(attributes: Attributes) -> dict[str, Any]:
    attributes.take("use_sliding_window")  # transformers drops sliding_window where it is False
    rope = read_rope(attributes)
    return {
        **_common(attributes),
        **_by_type(attributes, rope, rope),
        "query_key_value_bias": True,
    }


def _qwen3(attributes: Attributes) -> dict[str, Any]:
    return {**_qwen2(attributes), **_attention_bias(attributes), "query_key_norm": "head"}


def _experts(attributes: Attributes) -> dict[str, Any]:
    return {
        "experts": attributes.take("num_local_experts"),
        "experts_per_token": attributes.take("num_experts_per_tok"),
    }


def _mixtral(attributes: Attributes) -> dict[str, Any]:
    return {**_mistral(attributes), **_experts(attributes)}


def _qwen3_moe(attributes: Attributes) -> dict[str, Any]:
    attributes.take("use_sliding_window")  # transformers drops sliding_window where it is False
    attributes.expect("mlp_only_layers", [])  # layers are stacked: all have experts, or none
    attributes.expect("decoder_sparse_step", 1)
    return {
        **_mistral(attributes),
        **_attention_bias(attributes),
        **_experts(attributes),
        "feed_forward": attributes.take("moe_intermediate_size"),
        "normalize_experts": attributes.take("norm_topk_prob", False),
        "query_key_norm": "head",
    }


def _gemma(attributes: Attributes) -> dict[str, Any]:
    fields = _common(attributes)
    return {
        **fields,
        **_attention_bias(attributes),
        "block": "both",
        "norm_offset": 1.0,
        "embedding_scale": fields["width"] ** 0.5,
        "attention_scale": attributes.take("query_pre_attn_scalar") ** -0.5,
        "logit_softcap": attributes.take("final_logit_softcapping", 0.0),
    }


def _gemma1(attributes: Attributes) -> dict[str, Any]:
    fields = _common(attributes)
    return {
        **fields,
        **_attention_bias(attributes),
        "attention": (AttentionKind(rope=read_rope(attributes)),),
        "norm_offset": 1.0,
        "embedding_scale": fields["width"] ** 0.5,
    }


def _gemma2(attributes: Attributes) -> dict[str, Any]:
    rope = read_rope(attributes)
    return {
        **_gemma(attributes),
        **_by_type(attributes, rope, rope),
        "attention_softcap": attributes.take("attn_logit_softcapping", 0.0),
    }


def _gemma3(attributes: Attributes) -> dict[str, Any]:
    kinds = _by_type(attributes, *_ropes_by_type(attributes))
    return {**_gemma(attributes), **kinds, "query_key_norm": "head"}


def _cohere(attributes: Attributes) -> dict[str, Any]:
    return {
        **_common(attributes),
        **_attention_bias(attributes),
        "attention": (AttentionKind(rope=read_rope(attributes, interleaved=True)),),
        "block": "parallel",
        "norm": "layer",
        "logit_scale": attributes.take("logit_scale", 1.0),
        "query_key_norm": "heads" if attributes.take("use_qk_norm") else "",
    }


def _cohere2(attributes: Attributes) -> dict[str, Any]:
    fields = _cohere(attributes)
    (kind,) = fields["attention"]
    return fields | _by_type(attributes, full=None, sliding=kind.rope)


def _olmo(attributes: Attributes) -> dict[str, Any]:
    return {
        **_common(attributes),
        **_attention_bias(attributes),
        "block": "post",
        "query_key_norm": "joint",
    }


def _olmo2(attributes: Attributes) -> dict[str, Any]:
    return {**_olmo(attributes), "attention": (AttentionKind(rope=read_rope(attributes)),)}


def _olmo3(attributes: Attributes) -> dict[str, Any]:
    return {**_olmo(attributes), **_by_type(attributes, *_ropes_by_type(attributes))}


def _phi3(attributes: Attributes) -> dict[str, Any]:
    for copied in ("original_max_position_embeddings", "partial_rotary_factor"):
        attributes.take(copied)  # transformers has put it into rope_parameters
    fields = _common(attributes)
    return fields | _alike(attributes, read_rope(attributes, partial_of=fields["head_width"]))


class Family(NamedTuple):
    """How to read the config of one `model_type`, and the names that differ from `NAMES`."""

    read: Callable[[Attributes], dict[str, Any]]
    names: Mapping[str, str] = {}


_GEMMA_NAMES = {"layers/feed_forward_norm/scale": "pre_feedforward_layernorm.weight"}

FAMILIES: dict[str, Family] = {
    "llama": Family(_llama),
    "mistral": Family(_mistral),
    "ministral": Family(_ministral),
    "smollm3": Family(_smollm3),
    "qwen2": Family(_qwen2),
    "qwen3": Family(_qwen3),
    "seed_oss": Family(_seed_oss),
    "gemma": Family(_gemma1),
    "gemma2": Family(_gemma2, _GEMMA_NAMES),
    "gemma3_text": Family(_gemma3, _GEMMA_NAMES),
    "cohere": Family(_cohere),
    "cohere2": Family(_cohere2),
    "olmo2": Family(_olmo2),
    "olmo3": Family(_olmo3),
    "granite": Family(_granite),
    "granitemoehybrid": Family(
        _granite_hybrid,
        {
            "layers/gate": "shared_mlp.input_linear.weight",
            "layers/up": "shared_mlp.input_linear.weight",
            "layers/down": "shared_mlp.output_linear.weight",
        },
    ),
    "phi3": Family(
        _phi3,
        {
            "layers/query": "self_attn.qkv_proj.weight",
            "layers/key": "self_attn.qkv_proj.weight",
            "layers/value": "self_attn.qkv_proj.weight",
            "layers/gate": "mlp.gate_up_proj.weight",
            "layers/up": "mlp.gate_up_proj.weight",
        },
    ),
    "mixtral": Family(
        _mixtral,
        {
            "layers/router": "block_sparse_moe.gate.weight",
            "layers/expert_gate": "block_sparse_moe.experts.{expert}.w1.weight",
            "layers/expert_up": "block_sparse_moe.experts.{expert}.w3.weight",
            "layers/expert_down": "block_sparse_moe.experts.{expert}.w2.weight",
        },
    ),
    "qwen3_moe": Family(
        _qwen3_moe,
        {
            "layers/router": "mlp.gate.weight",
            "layers/expert_gate": "mlp.experts.{expert}.gate_proj.weight",
            "layers/expert_up": "mlp.experts.{expert}.up_proj.weight",
            "layers/expert_down": "mlp.experts.{expert}.down_proj.weight",
        },
    ),
}
