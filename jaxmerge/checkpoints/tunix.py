"""The names and axes of Tunix, version 0.1.7 (google-tunix): its Llama, Qwen and Gemma 3.

Leaves are Flax NNX's; values are those of Hugging Face.
"""

from __future__ import annotations

from jaxmerge.checkpoints.tables import Known, Leaf, Table, rows

_FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe", "gemma3_text")


def leaves(known: Known) -> dict[str, Leaf] | None:
    """The leaves of `nnx.state(model)`, without the `value` at the end."""
    if known.model_type not in _FAMILIES:
        return None
    gemma, config = known.model_type == "gemma3_text", known.config
    layer = _gemma_layer(known) if gemma else _layer(known)
    table = {
        "embedder/input_embedding": Leaf("VD", ("embedding",)),
        f"final_norm/{'scale' if gemma else 'w'}": Leaf("D", ("final_norm/scale",)),
    }
    if not config.tied_embeddings:
        table["lm_head/w"] = Leaf("DV", ("unembedding",))
    for i in range(config.layers):
        table |= rows(f"layers/{i}/", [i], layer)
    return table


def _feed_forward() -> dict[str, Leaf]:
    return {
        "mlp/gate_proj/kernel": Leaf("DF", ("layers/gate",)),
        "mlp/up_proj/kernel": Leaf("DF", ("layers/up",)),
        "mlp/down_proj/kernel": Leaf("FD", ("layers/down",)),
    }


def _layer(known: Known) -> dict[str, Leaf]:
    config = known.config
    table = _feed_forward() | {
        "attn/q_proj/w": Leaf("DHC", ("layers/query",)),
        "attn/k_proj/w": Leaf("DJC", ("layers/key",)),
        "attn/v_proj/w": Leaf("DJC", ("layers/value",)),
        "attn/o_proj/w": Leaf("HCD", ("layers/out",)),
        "input_layernorm/w": Leaf("D", ("layers/attention_norm/scale",)),
        "post_attention_layernorm/w": Leaf("D", ("layers/feed_forward_norm/scale",)),
    }
    if config.query_key_value_bias:
        # A bias is one axis of heads times width there.
        table |= {
            "attn/q_bias": Leaf("HC", ("layers/query_bias",), flat=True),
            "attn/k_bias": Leaf("JC", ("layers/key_bias",), flat=True),
            "attn/v_bias": Leaf("JC", ("layers/value_bias",), flat=True),
        }
    if config.query_key_norm:
        table |= {
            "attn/q_norm/w": Leaf("C", ("layers/query_norm/scale",)),
            "attn/k_norm/w": Leaf("C", ("layers/key_norm/scale",)),
        }
    if config.experts:
        for each in ("gate", "up", "down"):
            del table[f"mlp/{each}_proj/kernel"]
        table |= {
            "mlp/router/kernel": Leaf("DE", ("layers/router",)),
            "mlp/gate_proj": Leaf("EDF", ("layers/expert_gate",)),
            "mlp/up_proj": Leaf("EDF", ("layers/expert_up",)),
            "mlp/down_proj": Leaf("EFD", ("layers/expert_down",)),
        }
    return table


def _gemma_layer(known: Known) -> dict[str, Leaf]:
    config = known.config
    table = _feed_forward() | {
        "attn/attn_vec_einsum/w": Leaf("HCD", ("layers/out",)),
        "attn/_query_norm/scale": Leaf("C", ("layers/query_norm/scale",)),
        "attn/_key_norm/scale": Leaf("C", ("layers/key_norm/scale",)),
        "pre_attention_norm/scale": Leaf("D", ("layers/attention_norm/scale",)),
        "post_attention_norm/scale": Leaf("D", ("layers/post_attention_norm/scale",)),
        "pre_ffw_norm/scale": Leaf("D", ("layers/feed_forward_norm/scale",)),
        "post_ffw_norm/scale": Leaf("D", ("layers/post_feed_forward_norm/scale",)),
    }
    if config.heads == config.kv_heads:
        of = ("layers/query", "layers/key", "layers/value")
        return table | {"attn/qkv_einsum/w": Leaf("SHDC", of)}
    return table | {
        "attn/q_einsum/w": Leaf("HDC", ("layers/query",)),
        "attn/kv_einsum/w": Leaf("SJDC", ("layers/key", "layers/value")),
    }


def tables() -> dict[str, Table]:
    """The one form that Tunix has."""
    return {"tunix": leaves}
