"""MaxText's names, axes and values: github.com/AI-Hypercomputer/maxtext, version 0.2.5.

The layers are one after the other (`scan_layers=False`) or stacked, with the axis of the layers
second. Queries are stored divided by sqrt(C) where MaxText's attention does not divide. Norm scales
of Gemma are stored as what multiplies, its embedding as what the layers read.
"""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp

from jaxmerge.checkpoints.tables import Change, Known, Leaf, Table, rows

_GEMMAS = ("gemma2", "gemma3_text")
_FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", *_GEMMAS)
_DIVIDED = ("llama", "mistral", "mixtral", "gemma2")  # queries
_PATTERN = 6  # layers that Gemma 3 scans together


def leaves(known: Known, *, scanned: bool, interleaved: bool = False) -> dict[str, Leaf] | None:
    """The leaves below `params/params`.

    Args:
        known: the model.
        scanned: as MaxText's `scan_layers`.
        interleaved: heads are stored as MaxText's `rope_type="llama3.1"` turns them.
    """
    config = known.config
    if known.model_type not in _FAMILIES or (interleaved and known.model_type != "llama"):
        return None
    norm, embedding = Change(), Change()
    if known.model_type in _GEMMAS:
        # MaxText's own conversion multiplies by the root as bfloat16 has it for Gemma 3.
        root = math.sqrt(config.width)
        root = root if known.model_type == "gemma2" else float(jnp.bfloat16(root))
        norm, embedding = Change(offset=-1.0), Change(scale=1 / root)
    table = {
        "token_embedder/embedding": Leaf("VD", ("embedding",), change=embedding),
        "decoder/decoder_norm/scale": Leaf("D", ("final_norm/scale",), change=norm),
    }
    if not config.tied_embeddings:
        table["decoder/logits_dense/kernel"] = Leaf("DV", ("unembedding",))
    return table | _layers(known, _layer(known, norm, interleaved), scanned)


def _layer(known: Known, norm: Change, interleaved: bool) -> dict[str, Leaf]:
    """The leaves of one layer."""
    config, family = known.config, known.model_type
    divided = math.sqrt(config.head_width) if family in _DIVIDED else 1.0
    query = Change(scale=divided, interleaved=interleaved)
    table = {
        "self_attention/query/kernel": Leaf("DHC", ("layers/query",), change=query),
        "self_attention/key/kernel": Leaf(
            "DJC", ("layers/key",), change=Change(interleaved=interleaved)
        ),
        "self_attention/value/kernel": Leaf("DJC", ("layers/value",)),
        "self_attention/out/kernel": Leaf("HCD", ("layers/out",)),
    }
    if config.query_key_value_bias:
        table |= {
            "self_attention/query/bias": Leaf("HC", ("layers/query_bias",)),
            "self_attention/key/bias": Leaf("JC", ("layers/key_bias",)),
            "self_attention/value/bias": Leaf("JC", ("layers/value_bias",)),
        }
    if config.query_key_norm:
        for each in ("query", "key"):
            of = (f"layers/{each}_norm/scale",)
            table[f"self_attention/{each}_norm/scale"] = Leaf("C", of, change=norm)
    if config.experts:
        block = "MoeBlock_0" if family == "mixtral" else "moe_block"
        table |= {
            f"{block}/gate/kernel": Leaf("DE", ("layers/router",)),
            f"{block}/wi_0": Leaf("EDF", ("layers/expert_gate",)),
            f"{block}/wi_1": Leaf("EDF", ("layers/expert_up",)),
            f"{block}/wo": Leaf("EFD", ("layers/expert_down",)),
        }
    else:
        table |= {
            "mlp/wi_0/kernel": Leaf("DF", ("layers/gate",)),
            "mlp/wi_1/kernel": Leaf("DF", ("layers/up",)),
            "mlp/wo/kernel": Leaf("FD", ("layers/down",)),
        }
    norms = {
        "pre_self_attention_layer_norm": "attention_norm",
        "post_self_attention_layer_norm": "feed_forward_norm",
    }
    if family in _GEMMAS:
        norms = {
            "pre_self_attention_norm": "attention_norm",
            "post_self_attention_norm": "post_attention_norm",
            "pre_ffw_norm": "feed_forward_norm",
            "post_ffw_norm": "post_feed_forward_norm",
        }
    return table | {
        f"{name}/scale": Leaf("D", (f"layers/{of}/scale",), change=norm)
        for name, of in norms.items()
    }


def _layers(known: Known, layer: dict[str, Leaf], scanned: bool) -> dict[str, Leaf]:
    """The leaves of all layers: Gemma 2 has them in pairs, Gemma 3 scans them in sixes."""
    L, found = known.config.layers, {}
    if known.model_type == "gemma2":
        for first, part in enumerate(("local", "global")):
            of_part = {name.replace("/", f"_{part}/", 1): leaf for name, leaf in layer.items()}
            if scanned:
                found |= rows("decoder/layers/", range(first, L, 2), of_part, 1)
            else:
                for pair in range(L // 2):
                    found |= rows(f"decoder/layers_{pair}/", [2 * pair + first], of_part)
        return found
    if not scanned:
        for i in range(L):
            found |= rows(f"decoder/layers_{i}/", [i], layer)
        return found
    if known.model_type != "gemma3_text":
        return rows("decoder/layers/", range(L), layer, 1)
    whole = L - L % _PATTERN
    for j in range(_PATTERN if whole else 0):
        found |= rows(f"decoder/layers/layers_{j}/", range(j, whole, _PATTERN), layer, 1)
    for j in range(L - whole):
        found |= rows(f"decoder/layers_remainder/layers_{j}/", [whole + j], layer)
    return found


def tables(interleaved: bool) -> dict[str, Table]:
    """The forms that MaxText has, by the name of the export."""
    return {
        "maxtext": functools.partial(leaves, scanned=True, interleaved=interleaved),
        "maxtext_unscanned": functools.partial(leaves, scanned=False, interleaved=interleaved),
    }
