"""The names and axes of Levanter, version 0.2.227 (marin-levanter): its Llama, Mistral and Qwen.

The layers are one axis, the first. Values are those of Hugging Face; kernels are [out, in], with
query heads in groups that share a key head.
"""

from __future__ import annotations

import json

from jaxmerge.checkpoints.tables import Known, Leaf, Table, rows

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

# What Levanter wants beside the arrays, and how they are stored.
_METADATA = {"step": 0, "timestamp": "1970-01-01T00:00:00", "is_temporary": False}
CUSTOM = {"database": True, "files": {"metadata.json": json.dumps(_METADATA)}}


def leaves(known: Known) -> dict[str, Leaf] | None:
    """The leaves of `model`."""
    config = known.config
    if known.model_type not in _FAMILIES:
        return None
    table = {
        "embeddings/token_embeddings/weight": Leaf("VD", ("embedding",)),
        "transformer/norm/weight": Leaf("D", ("final_norm/scale",)),
    }
    if not config.tied_embeddings:
        table["lm_head/weight"] = Leaf("VD", ("unembedding",))
    return table | rows("transformer/layers/stacked/", range(config.layers), _layer(known), 0)


def _layer(known: Known) -> dict[str, Leaf]:
    config = known.config
    table = {
        "self_attn/q_proj/weight": Leaf("JGCD", ("layers/query",)),
        "self_attn/k_proj/weight": Leaf("JCD", ("layers/key",)),
        "self_attn/v_proj/weight": Leaf("JCD", ("layers/value",)),
        "self_attn/o_proj/weight": Leaf("DHC", ("layers/out",)),
        "mlp/gate_proj/weight": Leaf("FD", ("layers/gate",)),
        "mlp/up_proj/weight": Leaf("FD", ("layers/up",)),
        "mlp/down_proj/weight": Leaf("DF", ("layers/down",)),
        "input_layernorm/weight": Leaf("D", ("layers/attention_norm/scale",)),
        "post_attention_layernorm/weight": Leaf("D", ("layers/feed_forward_norm/scale",)),
    }
    if config.query_key_value_bias:
        table |= {
            "self_attn/q_proj/bias": Leaf("JGC", ("layers/query_bias",)),
            "self_attn/k_proj/bias": Leaf("JC", ("layers/key_bias",)),
            "self_attn/v_proj/bias": Leaf("JC", ("layers/value_bias",)),
        }
    if config.query_key_norm:
        table |= {
            "self_attn/q_norm/weight": Leaf("C", ("layers/query_norm/scale",)),
            "self_attn/k_norm/weight": Leaf("C", ("layers/key_norm/scale",)),
        }
    return table


def tables() -> dict[str, Table]:
    """The one form that is known."""
    return {"levanter": leaves}
