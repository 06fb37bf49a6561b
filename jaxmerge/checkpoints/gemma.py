"""The names and axes of Google's gemma package, version 4.0.1, for Gemma 2 and 3.

Values are those of Hugging Face: norm scales without the 1, the embedding unscaled.
"""

from __future__ import annotations

import functools

from jaxmerge.checkpoints.tables import Known, Leaf, Table, rows

_FAMILIES = ("gemma2", "gemma3_text")
_WIDTH_OF_2B = (
    2304  # of Gemma 2: it alone has `transpose_gating_einsum=False`, gate and up [in, out]
)


def leaves(
    known: Known, *, flat: bool = False, stacked: bool = False, transposed: bool = False
) -> dict[str, Leaf] | None:
    """The leaves of a checkpoint.

    Args:
        known: the model.
        flat: with `w` below the feed-forward's, as published checkpoints have it.
        stacked: layers of one kind of attention are one leaf.
        transposed: gate and up are stored [in, out].
    """
    if known.model_type not in _FAMILIES:
        return None
    table = {
        "embedder/input_embedding": Leaf("VD", ("embedding",)),
        "final_norm/scale": Leaf("D", ("final_norm/scale",)),
    }
    layer, L = _layer(known, "/w" if flat or stacked else "", transposed), known.config.layers
    if stacked:
        length = pattern_length(known)
        for j in range(length):  # of the first kinds there is one more where layers remain
            prefix = f"stacked_layers/attention_type_{j}/"
            table |= rows(prefix, range(j, L, length), layer, 0)
        return table
    for i in range(L):
        table |= rows(f"layer_{i}/", [i], layer)
    return table


def pattern_length(known: Known) -> int:
    """After how many layers the kinds of attention begin again."""
    kinds = known.config.kinds
    return next(
        n for n in range(1, len(kinds) + 1) if kinds == (kinds[:n] * len(kinds))[: len(kinds)]
    )


def _layer(known: Known, below: str, transposed: bool) -> dict[str, Leaf]:
    config = known.config
    table = {
        "attn/attn_vec_einsum/w": Leaf("HCD", ("layers/out",)),
        f"mlp/gating_einsum{below}": Leaf(
            "SDF" if transposed else "SFD", ("layers/gate", "layers/up")
        ),
        f"mlp/linear{below}": Leaf("FD", ("layers/down",)),
        "pre_attention_norm/scale": Leaf("D", ("layers/attention_norm/scale",)),
        "post_attention_norm/scale": Leaf("D", ("layers/post_attention_norm/scale",)),
        "pre_ffw_norm/scale": Leaf("D", ("layers/feed_forward_norm/scale",)),
        "post_ffw_norm/scale": Leaf("D", ("layers/post_feed_forward_norm/scale",)),
    }
    if config.heads == config.kv_heads:
        of = ("layers/query", "layers/key", "layers/value")
        table["attn/qkv_einsum/w"] = Leaf("SHDC", of)
    else:
        table["attn/q_einsum/w"] = Leaf("HDC", ("layers/query",))
        table["attn/kv_einsum/w"] = Leaf("SJDC", ("layers/key", "layers/value"))
    if config.query_key_norm:
        for each in ("query", "key"):
            table[f"attn/_{each}_norm/scale"] = Leaf("C", (f"layers/{each}_norm/scale",))
    return table


def written(known: Known) -> dict[str, Leaf] | None:
    """What the package writes: gate and up lie as its configuration of the model says."""
    of_2b = known.model_type == "gemma2" and known.config.width == _WIDTH_OF_2B
    return leaves(known, transposed=of_2b)


def tables() -> dict[str, Table]:
    """The forms that the package has; the first is the one that it writes."""
    found: dict[str, Table] = {"gemma": written}
    for transposed in (False, True):
        of = functools.partial(leaves, transposed=transposed)
        name = "_transposed" if transposed else "_plain"
        found["gemma" + name] = of
        found["gemma_flat" + name] = functools.partial(of, flat=True)
        found["gemma_stacked" + name] = functools.partial(of, stacked=True)
    return found
