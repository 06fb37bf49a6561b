"""A decoder-only transformer with stacked layers.

Every parameter of a layer has a leading axis L, and the layers run under one scan: the program is
as large for 80 layers as for 2, and a merge sees a dozen leaves instead of hundreds.

Pre-norm RMSNorm, rotary positions (RoPE, arXiv 2104.09864), grouped-query attention
(arXiv 2305.13245) and a gated feed-forward (SwiGLU, arXiv 2002.05202).
Letters in names are the dimensions of the package glossary (`jaxmerge.__doc__`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmerge.errors import JaxmergeError
from jaxmerge.models.model import Model


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder; everything that its checkpoint does not say by itself."""

    vocab: int  # tokens
    width: int  # D
    layers: int  # L
    heads: int  # H, query heads
    kv_heads: int  # J, key/value heads; divides heads
    head_width: int  # C, even
    feed_forward: int  # F
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    norm_epsilon: float = 1e-6
    tied_embeddings: bool = True  # the output projection is the embedding

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise JaxmergeError(
                "kv_heads must divide heads",
                where="DecoderConfig",
                found=f"heads={self.heads}, kv_heads={self.kv_heads}",
            )
        if self.head_width % 2:
            raise JaxmergeError(
                "head_width must be even (rotary positions turn pairs)",
                where="DecoderConfig",
                found=f"head_width={self.head_width}",
            )


class Cache(NamedTuple):
    """Keys and values of the S slots seen so far; slot s of every sequence is written at step s."""

    keys_LxBxSxJxC: Float[Array, "L B S J C"]
    values_LxBxSxJxC: Float[Array, "L B S J C"]


def rotate(
    x_BxTxHxC: Float[Array, "B T H C"], positions_BxT: Int[Array, "B T"], theta: float
) -> Float[Array, "B T H C"]:
    """Rotary position embedding: turns pair (c, c + C/2) by position * theta^(-2c/C)."""
    half = x_BxTxHxC.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions_BxT[:, :, None, None].astype(jnp.float32) * frequency[None, None, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x_BxTxHxC.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return turned.astype(x_BxTxHxC.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * scale, computed in float32 (arXiv 1910.07467)."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)
        return (x32 * jax.lax.expand_dims(scale.astype(jnp.float32), range(x.ndim - 1))).astype(
            x.dtype
        )


class Block(nn.Module):
    """One layer: attention and feed-forward, each behind a norm and added to the residual."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BxTxD, positions_BxT, mask_BxTxS, start, cache) -> Any:
        config = self.config
        normed = RMSNorm(config.norm_epsilon, name="attention_norm")(x_BxTxD)
        attended, cache = self._attention(normed, positions_BxT, mask_BxTxS, start, cache)
        x_BxTxD = x_BxTxD + attended
        normed = RMSNorm(config.norm_epsilon, name="feed_forward_norm")(x_BxTxD)
        return x_BxTxD + self._feed_forward(normed), cache

    def _matrix(self, name: str, *shape: int, inputs: int) -> Array:
        return self.param(name, nn.initializers.normal(inputs**-0.5), shape)

    def _attention(self, x_BxTxD, positions_BxT, mask_BxTxS, start, cache):
        D, H, J, C = x_BxTxD.shape[-1], *_heads(self.config)
        q_BxTxHxC = jnp.einsum("btd,dhc->bthc", x_BxTxD, self._matrix("query", D, H, C, inputs=D))
        k_BxTxJxC = jnp.einsum("btd,djc->btjc", x_BxTxD, self._matrix("key", D, J, C, inputs=D))
        v_BxTxJxC = jnp.einsum("btd,djc->btjc", x_BxTxD, self._matrix("value", D, J, C, inputs=D))
        q_BxTxHxC = rotate(q_BxTxHxC, positions_BxT, self.config.rope_theta)
        k_BxTxJxC = rotate(k_BxTxJxC, positions_BxT, self.config.rope_theta)
        if cache is None:
            k_BxSxJxC, v_BxSxJxC = k_BxTxJxC, v_BxTxJxC
        else:
            k_BxSxJxC = jax.lax.dynamic_update_slice_in_dim(cache[0], k_BxTxJxC, start, axis=1)
            v_BxSxJxC = jax.lax.dynamic_update_slice_in_dim(cache[1], v_BxTxJxC, start, axis=1)
            cache = (k_BxSxJxC, v_BxSxJxC)
        B, T = q_BxTxHxC.shape[:2]
        q_BxTxJxGxC = q_BxTxHxC.reshape(B, T, J, H // J, C)  # G query heads share a key head
        logits_BxJxGxTxS = jnp.einsum(
            "btjgc,bsjc->bjgts", q_BxTxJxGxC, k_BxSxJxC, preferred_element_type=jnp.float32
        )
        logits_BxJxGxTxS = jnp.where(
            mask_BxTxS[:, None, None], logits_BxJxGxTxS * C**-0.5, jnp.float32(-1e30)
        )
        attention = jax.nn.softmax(logits_BxJxGxTxS, axis=-1).astype(v_BxSxJxC.dtype)
        out_BxTxHxC = jnp.einsum("bjgts,bsjc->btjgc", attention, v_BxSxJxC).reshape(B, T, H, C)
        out = jnp.einsum("bthc,hcd->btd", out_BxTxHxC, self._matrix("out", H, C, D, inputs=H * C))
        return out, cache

    def _feed_forward(self, x_BxTxD):
        D, F = x_BxTxD.shape[-1], self.config.feed_forward
        gate_BxTxF = jax.nn.silu(x_BxTxD @ self._matrix("gate", D, F, inputs=D))
        up_BxTxF = x_BxTxD @ self._matrix("up", D, F, inputs=D)
        return (gate_BxTxF * up_BxTxF) @ self._matrix("down", F, D, inputs=F)


def _heads(config: DecoderConfig) -> tuple[int, int, int]:
    return config.heads, config.kv_heads, config.head_width


class Decoder(nn.Module):
    """Tokens to hidden states, and hidden states to logits."""

    config: DecoderConfig

    def setup(self):
        config = self.config
        self.embedding = self.param(
            "embedding", nn.initializers.normal(config.width**-0.5), (config.vocab, config.width)
        )
        over_layers: Any = (nn.broadcast, nn.broadcast, nn.broadcast, 0)  # the cache alone has L
        scanned = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=over_layers,
            length=config.layers,
        )
        self.layers = scanned(config)
        self.final_norm = RMSNorm(config.norm_epsilon)
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
        x_BxTxD = self.embedding[tokens_BxT]
        x_BxTxD, written = self.layers(x_BxTxD, positions_BxT, mask_BxTxS, start, cache)
        return self.final_norm(x_BxTxD), None if written is None else Cache(*written)

    def logits(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Next-token logits in float32."""
        matrix = self.embedding if self.config.tied_embeddings else self.unembedding
        return jnp.einsum("...d,vd->...v", x, matrix, preferred_element_type=jnp.float32)


# (regex on the leaf name, the mesh axis of each dimension), first match wins; see sharding.py.
# Megatron's split (arXiv 1909.08053): heads and the feed-forward over `tensor`, D over `fsdp`.
SHARDING_RULES = (
    (r"(un)?embedding$", ("tensor", "fsdp")),
    (r"layers/(query|key|value)$", (None, "fsdp", "tensor", None)),
    (r"layers/out$", (None, "tensor", None, "fsdp")),
    (r"layers/(gate|up)$", (None, "fsdp", "tensor")),
    (r"layers/down$", (None, "tensor", "fsdp")),
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
        architecture={"model": "decoder", **dataclasses.asdict(config)},
    )
