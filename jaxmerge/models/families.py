"""Hugging Face configs and weight names of the families that the decoder can be.

A family is a function from its config to the fields of a `DecoderConfig`, and a table of names.
What a function does not take from the config must be known to say nothing (`config_keys`), or the
config is refused: an attribute that is not understood is never passed over.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxmerge.errors import JaxmergeError, as_written
from jaxmerge.models.architecture import AttentionKind, DecoderConfig
from jaxmerge.models.attributes import Attributes, check_counts, read_rope, scaled_rope
from jaxmerge.models.layout import Layout
from jaxmerge.models.names import NAMES, layout
from jaxmerge.models.rope import Rope
from jaxmerge.textfiles import read_json


class Architecture(NamedTuple):
    """A decoder, and how the tensors of its checkpoints make up its leaves."""

    config: DecoderConfig
    layout: Layout


def read(directory: str) -> Architecture | None:
    """The decoder that a Hugging Face directory describes; None where there is none for it here.

    Raises:
        JaxmergeError: `config.json` is missing, unreadable or refused by transformers, or has
            attributes that the decoder does not heed (see `from_config`).
    """
    path = os.path.join(directory, "config.json")
    written = _written(path)
    if str(written.get("model_type")) not in FAMILIES:
        return None
    return from_config(completed(written, path), path)


def model_type(directory: str) -> str:
    """The `model_type` of a Hugging Face directory; "" where it does not say.

    Raises:
        JaxmergeError: `config.json` is missing or unreadable.
    """
    return str(_written(os.path.join(directory, "config.json")).get("model_type", ""))


def context(directory: str) -> int:
    """How many tokens the model of a Hugging Face directory can hold; 0 where it does not say.

    Raises:
        JaxmergeError: `config.json` is missing or unreadable.
    """
    path = os.path.join(directory, "config.json")
    with as_written(path, _OTHER_KIND, _AS_TRANSFORMERS):
        return int(_written(path).get("max_position_embeddings") or 0)


def completed(written: Mapping[str, Any], where: str) -> Any:
    """The config object that transformers makes of what a config.json says; runs no code of others.

    It reads a copy: it would stumble over a byte order mark in the file.

    Raises:
        JaxmergeError: transformers refuses it, or does not know its `model_type`.
    """
    from transformers import AutoConfig  # takes seconds to import

    check_counts(written, where)
    with tempfile.TemporaryDirectory() as copy:
        with open(os.path.join(copy, "config.json"), "w", encoding="utf-8") as file:
            json.dump(written, file)
        try:
            return AutoConfig.from_pretrained(copy, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # each of its classes checks as it likes, or not at all
            found = (str(error) or type(error).__name__).replace(copy, os.path.dirname(where))
    raise JaxmergeError(
        "transformers refuses the config",
        where=where,
        expected="a config that this version of transformers loads",
        found=found,
    )


def _written(path: str) -> dict[str, Any]:
    written = read_json(path)
    if not isinstance(written, dict):
        raise JaxmergeError(
            "the config is no JSON object",
            where=path,
            expected=_AS_TRANSFORMERS,
            found=str(written)[:80],
        )
    return written


def from_config(config: Any, where: str) -> Architecture | None:
    """The decoder of a transformers config object; None where there is none for its `model_type`.

    Args:
        config: a `PreTrainedConfig`.
        where: what errors name, such as the file that the config is from.

    Raises:
        JaxmergeError: attributes that the decoder does not heed, all of them with their values.
    """
    if config.model_type not in FAMILIES:
        return None
    family = FAMILIES[config.model_type]
    attributes = Attributes(config.to_dict(), where)
    with as_written(where, _OTHER_KIND, _AS_TRANSFORMERS):
        fields = family.read(attributes)
        attributes.refuse_rest()
        made = DecoderConfig(**fields)
        return Architecture(made, layout(made, {**NAMES, **family.names}))


_OTHER_KIND = "a value of the config is of another kind than its attribute has"
_AS_TRANSFORMERS = "config.json as transformers writes it"
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


def _gemma2(attributes: Attributes) -> dict[str, Any]:
    rope = read_rope(attributes)
    return {
        **_gemma(attributes),
        **_by_type(attributes, rope, rope),
        "attention_softcap": attributes.take("attn_logit_softcapping", 0.0),
    }


def _gemma3(attributes: Attributes) -> dict[str, Any]:
    longest = attributes.take("max_position_embeddings")
    ropes = attributes.take("rope_parameters")
    full, sliding = (
        scaled_rope(attributes, ropes[each], longest)
        for each in ("full_attention", "sliding_attention")
    )
    fields = {**_gemma(attributes), **_by_type(attributes, full, sliding)}
    return fields | {"query_key_norm": "head"}


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


def _olmo2(attributes: Attributes) -> dict[str, Any]:
    return {
        **_common(attributes),
        **_attention_bias(attributes),
        "attention": (AttentionKind(rope=read_rope(attributes)),),
        "block": "post",
        "query_key_norm": "joint",
    }


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
    "smollm3": Family(_smollm3),
    "qwen2": Family(_qwen2),
    "qwen3": Family(_qwen3),
    "gemma2": Family(_gemma2, _GEMMA_NAMES),
    "gemma3_text": Family(_gemma3, _GEMMA_NAMES),
    "cohere": Family(_cohere),
    "cohere2": Family(_cohere2),
    "olmo2": Family(_olmo2),
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
