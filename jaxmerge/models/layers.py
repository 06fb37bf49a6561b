"""One layer of a decoder: norms, attention and feed-forward.

Weights keep the orientation [out, in] in which Hugging Face stores them, so that reading and
writing such checkpoints moves bytes and transposes nothing; matrix products are as fast either way.
Letters in names are the dimensions of the package glossary (`jaxmerge.__doc__`); E is experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxmerge.models.architecture import DecoderConfig
from jaxmerge.models.rope import rotate

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


class Where(NamedTuple):
    """Where the tokens of a call stand, the same for all layers; R is kinds of attention.

    Attributes:
        kin_RxBxTxT: which tokens of the call each of them looks at.
        past_RxBxTxS: which slots of the cache each of them looks at; S = 0 without one.
        cos_RxBxTxW: of the angles of rotary positions; `sin_RxBxTxW` alike.
    """

    kin_RxBxTxT: Bool[Array, "R B T T"]
    past_RxBxTxS: Bool[Array, "R B T S"]
    cos_RxBxTxW: Float[Array, "R B T W"]
    sin_RxBxTxW: Float[Array, "R B T W"]


class Norm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * (scale + offset) over the axes of `shape`, in float32.

    RMSNorm (arXiv 1910.07467); `centred` subtracts the mean first (LayerNorm, arXiv 1607.06450,
    without bias). `axes` of the last axes are normalised together; `scale` spans all of `shape`.
    """

    epsilon: float
    offset: float = 0.0
    centred: bool = False
    shape: tuple[int, ...] = ()  # of the scale; (): the last axis
    axes: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        initial = nn.initializers.constant(1.0 - self.offset)
        scale = self.param("scale", initial, self.shape or x.shape[-1:])
        scale = scale.astype(jnp.float32) + self.offset
        over = tuple(range(-self.axes, 0))
        x32 = x.astype(jnp.float32)
        if self.centred:
            x32 -= jnp.mean(x32, axis=over, keepdims=True)
        x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, axis=over, keepdims=True) + self.epsilon)
        return (x32 * jax.lax.expand_dims(scale, range(x.ndim - scale.ndim))).astype(x.dtype)


class Block(nn.Module):
    """One layer: attention and feed-forward, each added to the residual."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BxTxD, where: Where, kind, past, slot=None) -> Any:
        """The residual after this layer, and the keys and values of x, each `[B, J, T, C]`.

        Args:
            kind: which kind of attention this layer has.
            past: this layer's keys and values of earlier tokens, each `[B, J, S, C]`, or None.
            slot: where to write those of x into `past`, which is then what is returned; None: they
                are returned by themselves.
        """
        block = self.config.block
        before, after = block != "post", block in ("post", "both")
        normed = self._norm("attention_norm", before, x_BxTxD)
        attended, made = self._attention(normed, where, kind, past, slot)
        attended = self._norm("post_attention_norm", after, attended)
        if block == "parallel":
            return self._added(self._added(x_BxTxD, attended), self._feed_forward(normed)), made
        x_BxTxD = self._added(x_BxTxD, attended)
        normed = self._norm("feed_forward_norm", before, x_BxTxD)
        fed = self._norm("post_feed_forward_norm", after, self._feed_forward(normed))
        return self._added(x_BxTxD, fed), made

    def _added(self, residual: Array, branch: Array) -> Array:
        scale = self.config.residual_scale
        return residual + (branch if scale == 1 else branch * jnp.asarray(scale, branch.dtype))

    def _norm(self, name: str, wanted: bool, x: Array) -> Array:
        return norm(self.config, name=name)(x) if wanted else x

    def _matrix(self, name: str, *shape: int, inputs: int) -> Array:
        return self.param(name, nn.initializers.normal(inputs**-0.5), shape)

    def _bias(self, name: str, wanted: bool, x: Array, axes: int = 1) -> Array:
        """x plus the bias of this name, which spans the last axes of x."""
        if not wanted:
            return x
        bias = self.param(name, nn.initializers.zeros, x.shape[-axes:])
        return x + jax.lax.expand_dims(bias, range(x.ndim - axes))

    def _heads(self, name: str, x_BxTxD: Array, heads: int) -> Float[Array, "B T H C"]:
        (B, T, D), C = x_BxTxD.shape, self.config.head_width
        # As one matrix [H C, D]: of two output axes the CPU's compiler makes a transposed copy.
        matrix_HCxD = self._matrix(name, heads, C, D, inputs=D).reshape(heads * C, D)
        projected = product(x_BxTxD, matrix_HCxD).reshape(B, T, heads, C)
        return self._bias(f"{name}_bias", self.config.query_key_value_bias, projected, axes=2)

    def _query_key_norm(self, name: str, x_BxTxHxC: Array) -> Float[Array, "B T H C"]:
        config = self.config
        if not config.query_key_norm:
            return x_BxTxHxC
        shape = x_BxTxHxC.shape[-1:] if config.query_key_norm == "head" else x_BxTxHxC.shape[-2:]
        axes = 2 if config.query_key_norm == "joint" else 1
        return norm(config, name=name, shape=shape, axes=axes)(x_BxTxHxC)

    def _rotate(self, x_BxTxHxC: Array, where: Where, kind: Array | int) -> Float[Array, "B T H C"]:
        ropes = [kind.rope for kind in self.config.attention]
        if not any(ropes):
            return x_BxTxHxC
        interleaved = any(rope.interleaved for rope in ropes if rope)
        cos_BxTxW, sin_BxTxW = where.cos_RxBxTxW[kind], where.sin_RxBxTxW[kind]
        return rotate(x_BxTxHxC, cos_BxTxW, sin_BxTxW, interleaved)

    def _attention(self, x_BxTxD, where: Where, kind, past, slot):
        config = self.config
        D, H, J, C = x_BxTxD.shape[-1], config.heads, config.kv_heads, config.head_width
        q_BxTxHxC = self._query_key_norm("query_norm", self._heads("query", x_BxTxD, H))
        k_BxTxJxC = self._query_key_norm("key_norm", self._heads("key", x_BxTxD, J))
        v_BxTxJxC = self._heads("value", x_BxTxD, J)
        q_BxTxHxC = self._rotate(q_BxTxHxC, where, kind)
        k_BxTxJxC = self._rotate(k_BxTxJxC, where, kind)
        made = jnp.swapaxes(k_BxTxJxC, 1, 2), jnp.swapaxes(v_BxTxJxC, 1, 2)
        kept = made
        if slot is not None:
            # Before it is read, where the mask hides them: else XLA would keep a copy to read from.
            written = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=2)
            kept = past = tuple(written(old, new, slot) for old, new in zip(past, made))
        pasts = [(*past, where.past_RxBxTxS[kind])] if past else []
        seen = [*pasts, (*made, where.kin_RxBxTxT[kind])]
        out_BxTxHC = attend(config, q_BxTxHxC, seen).reshape(*x_BxTxD.shape[:2], H * C)
        matrix_DxHC = self._matrix("out", D, H, C, inputs=H * C).reshape(D, H * C)
        out = product(out_BxTxHC, matrix_DxHC)
        return self._bias("out_bias", config.out_bias, out), kept

    def _feed_forward(self, x_BxTxD):
        config = self.config
        if config.experts:
            return self._experts(x_BxTxD)
        D, F, biased = x_BxTxD.shape[-1], config.feed_forward, config.feed_forward_bias

        def project(name: str, x: Array, outputs: int) -> Array:
            matrix = self._matrix(name, outputs, x.shape[-1], inputs=x.shape[-1])
            return self._bias(f"{name}_bias", biased, product(x, matrix))

        gate_BxTxF = ACTIVATIONS[config.activation](project("gate", x_BxTxD, F))
        return project("down", gate_BxTxF * project("up", x_BxTxD, F), D)

    def _experts(self, x_BxTxD):
        """Every token through the experts that its router rates highest (arXiv 1701.06538)."""
        config = self.config
        D, F, E = x_BxTxD.shape[-1], config.feed_forward, config.experts
        router_ExD = self._matrix("router", E, D, inputs=D)
        gate_ExFxD = self._matrix("expert_gate", E, F, D, inputs=D)
        up_ExFxD = self._matrix("expert_up", E, F, D, inputs=D)
        down_ExDxF = self._matrix("expert_down", E, D, F, inputs=F)
        rated_BxTxE = jax.nn.softmax(product(x_BxTxD, router_ExD).astype(jnp.float32), axis=-1)
        best_BxTxX, chosen_BxTxX = jax.lax.top_k(rated_BxTxE, config.experts_per_token)
        if config.normalize_experts:
            best_BxTxX /= jnp.sum(best_BxTxX, axis=-1, keepdims=True)
        share_BxTxE = jnp.sum(
            jax.nn.one_hot(chosen_BxTxX, E) * best_BxTxX[..., None], axis=-2
        ).astype(x_BxTxD.dtype)

        def one_expert(sum_BxTxD, expert):
            gate_FxD, up_FxD, down_DxF, share_BxT = expert
            hidden_BxTxF = ACTIVATIONS[config.activation](product(x_BxTxD, gate_FxD))
            hidden_BxTxF *= product(x_BxTxD, up_FxD) * share_BxT[..., None]
            return sum_BxTxD + product(hidden_BxTxF, down_DxF), None

        # All tokens through all experts, one expert at a time so that only [B, T, F] is held.
        # jax.lax.ragged_dot would take each token through its own experts alone, but has no rule
        # for vmap over the weights, and is up to 6 times slower than this on the CPU (jax 0.10.2).
        experts = (gate_ExFxD, up_ExFxD, down_ExDxF, jnp.moveaxis(share_BxTxE, -1, 0))
        return jax.lax.scan(one_expert, jnp.zeros_like(x_BxTxD), experts)[0]


def attend(
    config: DecoderConfig,
    q_BxTxHxC: Float[Array, "B T H C"],
    seen: Sequence[tuple[Float[Array, "B J _ C"], Float[Array, "B J _ C"], Bool[Array, "B T _"]]],
) -> Float[Array, "B T H C"]:
    """softmax(q k * scale) v; H / J query heads share a key head.

    Args:
        seen: keys, values, and which of them each query looks at; several that lie apart count as
            one after the other, and are not brought together.
    """
    (B, T, H, C), J = q_BxTxHxC.shape, seen[0][0].shape[1]
    q_BxJxGxTxC = jnp.moveaxis(q_BxTxHxC.reshape(B, T, J, H // J, C), 1, 3)

    def rated(k_BxJxSxC: Array, seen_BxTxS: Array) -> Array:
        logits = jnp.einsum(
            "bjgtc,bjsc->bjgts", q_BxJxGxTxC, k_BxJxSxC, preferred_element_type=jnp.float32
        )
        logits = softcap(logits * (config.attention_scale or C**-0.5), config.attention_softcap)
        return jnp.where(seen_BxTxS[:, None, None], logits, jnp.float32(-1e30))

    logits = [rated(k, mask) for k, _, mask in seen]
    top = functools.reduce(jnp.maximum, [jnp.max(each, -1, keepdims=True) for each in logits])
    shares = [jnp.exp(each - top) for each in logits]
    # Divided by their sum at the end: C numbers of each query, and not S.
    totals = [jnp.sum(share, axis=-1, keepdims=True) for share in shares]
    dtype = q_BxTxHxC.dtype
    parts = [
        jnp.einsum("bjgts,bjsc->bjgtc", share.astype(dtype), v, preferred_element_type=jnp.float32)
        for share, (_, v, _) in zip(shares, seen)
    ]
    out_BxJxGxTxC = (_sum(parts) / _sum(totals)).astype(dtype)
    return jnp.moveaxis(out_BxJxGxTxC, 3, 1).reshape(B, T, H, C)


def looked_up(
    table_VxD: Float[Array, "V D"], tokens_BxT: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """The rows of the tokens; on a mesh that spreads V, each place looks up those that it has.

    Said with shard_map: from JAX 0.11.2 on, XLA's partitioner aborts the process on a gather from V
    over `tensor` inside a manual `pop` where `data` or `fsdp` is above 1 too.
    """
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    data, fsdp, tensor = (sizes.get(axis, 1) for axis in ("data", "fsdp", "tensor"))
    (V, D), B = table_VxD.shape, len(tokens_BxT)
    if tensor == 1 or V % tensor or D % fsdp:
        return table_VxD[tokens_BxT]

    def local(own_VxD: Array, own_BxT: Array) -> Array:
        row_BxT = own_BxT - jax.lax.axis_index("tensor") * len(own_VxD)
        here_BxT = (row_BxT >= 0) & (row_BxT < len(own_VxD))
        found_BxTxD = own_VxD[jnp.where(here_BxT, row_BxT, 0)]
        return jax.lax.psum(jnp.where(here_BxT[..., None], found_BxTxD, 0), "tensor")

    over_data = None if B % data else "data"
    return jax.shard_map(
        local,
        in_specs=(PartitionSpec("tensor", "fsdp"), PartitionSpec(over_data)),
        out_specs=PartitionSpec(over_data, None, "fsdp"),
        axis_names={"data", "fsdp", "tensor"},
    )(table_VxD, tokens_BxT)


def product(
    x: Float[Array, "*batch K"], matrix_FxK: Float[Array, "F K"]
) -> Float[Array, "*batch F"]:
    """x matrix^T, summed in float32 and rounded to the type of x.

    XLA on CPUs uses bfloat16's own instructions only for what comes out in float32; for bfloat16
    out of bfloat16 it makes float32 copies of both sides, each time.
    """
    summed = jnp.einsum("...k,fk->...f", x, matrix_FxK, preferred_element_type=jnp.float32)
    return summed.astype(x.dtype)


def _sum(parts: Sequence[Array]) -> Array:
    return functools.reduce(jnp.add, parts)


def norm(
    config: DecoderConfig, *, name: str | None = None, shape: tuple[int, ...] = (), axes: int = 1
) -> Norm:
    """The norm that this decoder has everywhere."""
    centred = config.norm == "layer"
    return Norm(config.norm_epsilon, config.norm_offset, centred, shape, axes, name=name)


def softcap(x: Array, cap: float) -> Array:
    """cap * tanh(x / cap), which stays within (-cap, cap); a cap of 0 leaves x as it is."""
    return cap * jnp.tanh(x / cap) if cap else x
