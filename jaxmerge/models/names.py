"""The names of Hugging Face's tensors, and the layout of a decoder's leaves that they give."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax

from jaxmerge.models.architecture import DecoderConfig
from jaxmerge.models.layout import BUFFERS, Layout, Part
from jaxmerge.trees import named_leaves

# Leaves of the decoder and the tensors they are made of; those of a layer follow its prefix. Leaves
# that bear the same tensor are its rows one after the other, in this order.
NAMES = {
    "embedding": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "unembedding": "lm_head.weight",
    "layers/attention_norm/scale": "input_layernorm.weight",
    "layers/query": "self_attn.q_proj.weight",
    "layers/query_bias": "self_attn.q_proj.bias",
    "layers/key": "self_attn.k_proj.weight",
    "layers/key_bias": "self_attn.k_proj.bias",
    "layers/value": "self_attn.v_proj.weight",
    "layers/value_bias": "self_attn.v_proj.bias",
    "layers/query_norm/scale": "self_attn.q_norm.weight",
    "layers/key_norm/scale": "self_attn.k_norm.weight",
    "layers/out": "self_attn.o_proj.weight",
    "layers/out_bias": "self_attn.o_proj.bias",
    "layers/post_attention_norm/scale": "post_attention_layernorm.weight",
    "layers/feed_forward_norm/scale": "post_attention_layernorm.weight",
    "layers/gate": "mlp.gate_proj.weight",
    "layers/gate_bias": "mlp.gate_proj.bias",
    "layers/up": "mlp.up_proj.weight",
    "layers/up_bias": "mlp.up_proj.bias",
    "layers/down": "mlp.down_proj.weight",
    "layers/down_bias": "mlp.down_proj.bias",
    "layers/post_feed_forward_norm/scale": "post_feedforward_layernorm.weight",
}


def layout(config: DecoderConfig, names: Mapping[str, str]) -> Layout:
    """The name table of a decoder with tensors of these names."""
    from jaxmerge.models.decoder import decoder  # Flax, which a merge of files can do without

    init = decoder(config).init
    assert init is not None
    shapes = {k: v.shape for k, v in named_leaves(jax.eval_shape(init, jax.random.key(0))).items()}
    leaves: dict[str, tuple[Part, ...]] = {}
    tensors: dict[str, tuple[int, ...]] = {}
    for leaf in sorted(shapes, key=list(names).index):
        parts = []
        shape = _tensor_shape(leaf, shapes[leaf], config)
        for tensor in _tensor_names(leaf, names[leaf], config):
            start = tensors[tensor][0] if tensor in tensors else 0
            stop = start + shape[0]
            parts.append(Part(tensor, start, stop))
            tensors[tensor] = (stop, *shape[1:])
        leaves[leaf] = tuple(parts)
    return Layout(leaves, shapes, tensors, ignored=BUFFERS)


def _tensor_names(leaf: str, name: str, config: DecoderConfig) -> list[str]:
    if not leaf.startswith("layers/"):
        return [name]
    experts = range(config.experts) if "{expert}" in name else (0,)
    return [
        f"model.layers.{layer}." + name.replace("{expert}", str(expert))
        for layer in range(config.layers)
        for expert in experts
    ]


def _tensor_shape(leaf: str, shape: tuple[int, ...], config: DecoderConfig) -> tuple[int, ...]:
    """The shape of the rows that one tensor gives to a leaf of this shape."""
    if not leaf.startswith("layers/"):
        return shape
    kind = leaf.removeprefix("layers/")
    shape = shape[2:] if kind.startswith("expert_") else shape[1:]
    if kind in ("query_norm/scale", "key_norm/scale") and config.query_key_norm == "heads":
        return shape
    if kind.endswith(("_bias", "_norm/scale")):
        return (math.prod(shape),)
    rows = 2 if kind in ("query", "key", "value") else 1  # how many of the axes are rows
    return (math.prod(shape[:rows]), math.prod(shape[rows:]))
