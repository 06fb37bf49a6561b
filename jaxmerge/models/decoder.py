"""A decoder-only transformer with stacked layers.

Every parameter of a layer has a leading axis L, and the layers run under one scan: the program is
as large for 80 layers as for 2, and a merge sees a dozen leaves instead of hundreds. Which family
it is (Llama, Gemma, Command R, ...) is a matter of its `DecoderConfig`.

Rotary positions (RoPE, arXiv 2104.09864), grouped-query attention (arXiv 2305.13245) and a gated
feed-forward (SwiGLU, arXiv 2002.05202).
Letters in names are the dimensions of the package glossary (`jaxmerge.__doc__`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmerge.errors import JaxmergeError
from jaxmerge.models.architecture import DecoderConfig
from jaxmerge.models.layers import Block, Where, norm, softcap
from jaxmerge.models.model import Model
from jaxmerge.models.rope import turns


class Cache(NamedTuple):
    """Keys and values of the S slots seen so far; slot s of every sequence is written at step s."""

    keys_LxBxSxJxC: Float[Array, "L B S J C"]
    values_LxBxSxJxC: Float[Array, "L B S J C"]


class Decoder(nn.Module):
    """Tokens to hidden states, and hidden states to logits."""

    config: DecoderConfig

    def setup(self):
        config = self.config
        self.embedding = self.param(
            "embedding", nn.initializers.normal(config.width**-0.5), (config.vocab, config.width)
        )
        over_layers: Any = (nn.broadcast, nn.broadcast, 0, 0, 0)  # kind, window and cache have L
        scanned = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=over_layers,
            length=config.layers,
        )
        self.layers = scanned(config)
        self.final_norm = norm(config)
        if not config.tied_embeddings:
            self.unembedding = self.param(
                "unembedding",
                nn.initializers.normal(config.width**-0.5),
                (config.vocab, config.width),
            )

    def __call__(
        self,
        tokens_BxT: Int[Array, "B T"],
        positions_BxT: Int[Array, "B T"],
        mask_BxTxS: Bool[Array, "B T S"],
        start: Int[Array, ""] | int = 0,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Hidden states after the final norm, and the cache with slots [start, start + T) written.

        Args:
            tokens_BxT: token ids.
            positions_BxT: rotary position of each token; left padding is what sets it off the slot.
            mask_BxTxS: which slots each token may look at; S = T without a cache.
            start: first cache slot to write.
            cache: keys and values so far, or None to attend within `tokens` alone.
        """
        config = self.config
        x_BxTxD = self.embedding[tokens_BxT]
        if config.embedding_scale != 1:
            x_BxTxD *= jnp.asarray(config.embedding_scale, x_BxTxD.dtype)
        where = self._where(positions_BxT, mask_BxTxS, start)
        kind_L = np.array(config.pattern or (0,) * config.layers, np.int32)
        windows = np.array([kind.window or 2**30 for kind in config.attention], np.int32)
        x_BxTxD, written = self.layers(
            x_BxTxD, where, start, jnp.asarray(kind_L), jnp.asarray(windows[kind_L]), cache
        )
        return self.final_norm(x_BxTxD), None if written is None else Cache(*written)

    def _where(self, positions_BxT: Array, mask_BxTxS: Array, start: Array | int) -> Where:
        ropes = [kind.rope for kind in self.config.attention]
        turning = max((rope.width for rope in ropes if rope), default=0) or self.config.head_width
        angles = [turns(rope, positions_BxT, turning // 2) for rope in ropes]
        cos_RxBxTxW, sin_RxBxTxW = (jnp.stack(each) for each in zip(*angles))
        slots_T = start + jnp.arange(positions_BxT.shape[1])
        return Where(slots_T, mask_BxTxS, cos_RxBxTxW, sin_RxBxTxW)

    def logits(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Next-token logits in float32."""
        config = self.config
        matrix = self.embedding if config.tied_embeddings else self.unembedding
        logits = jnp.einsum("...d,vd->...v", x, matrix, preferred_element_type=jnp.float32)
        return softcap(logits * config.logit_scale, config.logit_softcap)


# (regex on the leaf name, the mesh axis of each dimension), first match wins; see sharding.py.
# Megatron's split (arXiv 1909.08053): heads and the feed-forward over `tensor`, D over `fsdp`.
SHARDING_RULES = (
    (r"(un)?embedding$", ("tensor", "fsdp")),
    (r"layers/(query|key|value)$", (None, "tensor", None, "fsdp")),
    (r"layers/(query|key|value)_bias$", (None, "tensor")),
    (r"layers/out$", (None, "fsdp", "tensor")),
    (r"layers/(gate|up)$", (None, "tensor", "fsdp")),
    (r"layers/(gate|up)_bias$", (None, "tensor")),
    (r"layers/down$", (None, "fsdp", "tensor")),
    (r"layers/expert_(gate|up)$", (None, None, "tensor", "fsdp")),
    (r"layers/expert_down$", (None, None, "fsdp", "tensor")),
    (r".*", ()),
)


class _Decoding(NamedTuple):
    cache: Cache
    padding_B: Int[Array, " B"]
    slot: Int[Array, ""]  # the next slot to write, the same for every row


@functools.cache
def decoder(config: DecoderConfig) -> Model:
    """The decoder of this shape as a `Model`: always the same, so that its programs are shared."""
    module = Decoder(config)

    def run(params, tokens, positions, mask, start=0, cache=None) -> Any:
        return module.apply({"params": params}, tokens, positions, mask, start, cache)

    def logits(params, hidden) -> Any:
        return module.apply({"params": params}, hidden, method="logits")

    def apply(params, tokens_BxT):
        B, T = tokens_BxT.shape
        positions_BxT = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
        mask_BxTxT = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool))[None], (B, T, T))
        hidden, _ = run(params, tokens_BxT, positions_BxT, mask_BxTxT)
        return logits(params, hidden)

    def prefill(params, tokens_BxT, padding_B, slots):
        B, T = tokens_BxT.shape
        slot_T, slot_S = jnp.arange(T), jnp.arange(slots)
        positions_BxT = jnp.maximum(slot_T[None, :] - padding_B[:, None], 0)
        causal_1xTxS = slot_S[None, None, :] <= slot_T[None, :, None]
        mask_BxTxS = causal_1xTxS & (slot_S[None, None, :] >= padding_B[:, None, None])
        shape = (config.layers, B, slots, config.kv_heads, config.head_width)
        empty = jnp.zeros(shape, params["embedding"].dtype)
        hidden, cache = run(params, tokens_BxT, positions_BxT, mask_BxTxS, 0, Cache(empty, empty))
        return logits(params, hidden[:, -1]), _Decoding(cache, padding_B, jnp.int32(T))

    def decode(params, tokens_B, state):
        slot_S = jnp.arange(state.cache.keys_LxBxSxJxC.shape[2])
        seen_BxS = (slot_S[None, :] <= state.slot) & (slot_S[None, :] >= state.padding_B[:, None])
        positions_Bx1 = (state.slot - state.padding_B)[:, None]
        hidden, cache = run(
            params, tokens_B[:, None], positions_Bx1, seen_BxS[:, None], state.slot, state.cache
        )
        state = _Decoding(cache, state.padding_B, state.slot + 1)
        return logits(params, hidden[:, 0]), state

    def init(key):
        tokens = jnp.zeros((1, 1), jnp.int32)
        return module.init(key, tokens, tokens, jnp.ones((1, 1, 1), bool))["params"]

    return Model(
        apply=apply,
        prefill=prefill,
        decode=decode,
        init=init,
        sharding_rules=SHARDING_RULES,
        vocabulary=config.vocab,
        architecture={"model": "decoder", **config.plain()},
    )


def described(architecture: Mapping[str, Any]) -> Model:
    """The decoder that a checkpoint says it is of.

    Args:
        architecture: of a checkpoint that `survey` found, or of a `Pool`.

    Raises:
        JaxmergeError: it says nothing, or that it is of a model that the decoder can't be.
    """
    fields = dict(architecture)
    if fields.pop("model", "") != "decoder":
        raise JaxmergeError(
            "the checkpoint does not say that it is of the package's decoder",
            where="architecture",
            expected="a Model of your own: from_apply makes one of a causal apply",
            found=str(dict(architecture)),
        )
    return decoder(DecoderConfig.from_plain(fields))
