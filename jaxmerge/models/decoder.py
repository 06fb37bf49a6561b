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
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmerge.errors import JaxmergeError
from jaxmerge.models.architecture import DecoderConfig
from jaxmerge.models.deferred import any_deferred, made
from jaxmerge.models.layers import Block, Where, looked_up, norm, softcap
from jaxmerge.models.model import Model, Params
from jaxmerge.models.rope import turns


class Cache(NamedTuple):
    """Keys and values of S slots, one for each token that has been read."""

    keys_LxBxJxSxC: Float[Array, "L B J S C"]
    values_LxBxJxSxC: Float[Array, "L B J S C"]


class Past(NamedTuple):
    """The slots of the caches at a call: the positions of their tokens, and which slots count."""

    positions_BxS: Int[Array, "B S"]
    mask_BxS: Bool[Array, "B S"]


class Decoder(nn.Module):
    """Tokens to hidden states, and hidden states to logits."""

    config: DecoderConfig

    def setup(self):
        config = self.config
        self.embedding = self.param(
            "embedding", nn.initializers.normal(config.width**-0.5), (config.vocab, config.width)
        )
        over_layers: Any = (nn.broadcast, 0, 0)  # kinds and cache have L
        layer = nn.map_variables(Block, "params", made, init=True)  # of one that is `Deferred`
        scanned = nn.scan(
            # A backward pass makes a layer and its activations again (arXiv 1604.06174): of all
            # layers it keeps only what went into each.
            nn.remat(layer, prevent_cse=False),
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
        mask_BxTxT: Bool[Array, "B T T"],
        past: Past | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Hidden states after the final norm, and the keys and values of these tokens (S = T).

        Args:
            tokens_BxT: token ids.
            positions_BxT: how many tokens stand before each.
            mask_BxTxT: which of these tokens each may look at, as far as windows allow.
            past: where the tokens of `cache` stand, all before these.
            cache: of tokens that were read before.
        """
        where = self.where(positions_BxT, mask_BxTxT, past)
        kind_L = jnp.asarray(self.config.kinds, jnp.int32)
        x_BxTxD, made = self.layers(
            self.embedded(tokens_BxT), where, kind_L, cache and tuple(cache)
        )
        return self.final_norm(x_BxTxD), Cache(*made)

    def embedded(self, tokens_BxT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """What goes into the first layer."""
        config = self.config
        x_BxTxD = looked_up(self.embedding, tokens_BxT)
        if config.embedding_scale != 1:
            x_BxTxD *= jnp.asarray(config.embedding_scale, x_BxTxD.dtype)
        return x_BxTxD

    def normed(self, x_BxTxD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Hidden states out of what comes out of the last layer."""
        return self.final_norm(x_BxTxD)

    def where(
        self,
        positions_BxT: Int[Array, "B T"],
        mask_BxTxT: Bool[Array, "B T T"],
        past: Past | None,
    ) -> Where:
        """Where tokens stand; arguments as in a call."""
        kinds = self.config.attention
        ropes = [kind.rope for kind in kinds]
        turning = max((rope.width for rope in ropes if rope), default=0) or self.config.head_width
        angles = [turns(rope, positions_BxT, turning // 2) for rope in ropes]
        cos_RxBxTxW, sin_RxBxTxW = (jnp.stack(each) for each in zip(*angles))

        def near(mask_BxTxS: Array, positions_BxS: Array) -> Array:
            apart_BxTxS = positions_BxT[:, :, None] - positions_BxS[:, None]
            windows = [kind.window or 2**30 for kind in kinds]
            return jnp.stack([mask_BxTxS & (apart_BxTxS < window) for window in windows])

        kin_RxBxTxT = near(mask_BxTxT, positions_BxT)
        past_RxBxTxS = kin_RxBxTxT[..., :0]
        if past is not None:
            past_RxBxTxS = near(past.mask_BxS[:, None], past.positions_BxS)
        return Where(kin_RxBxTxT, past_RxBxTxS, cos_RxBxTxW, sin_RxBxTxW)

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
    cache: Cache | tuple[Cache, ...]  # [L, B, J, S, C], or of each layer [B, J, S, C]
    padding_B: Int[Array, " B"]
    slot: Int[Array, ""]  # the next slot to write, the same for every row
    layers: tuple[Any, ...] = ()  # the parameters of each layer by itself, where it has a cache so


@functools.cache
def decoder(config: DecoderConfig, *, layerwise: bool = False) -> Model:
    """The decoder of this shape as a `Model`: always the same, so that its programs are shared.

    Args:
        config: its shape.
        layerwise: whether `decode` has the layers one after the other instead of in a scan, and a
            cache for each. XLA on CPUs copies what a scan takes of a cache, all of it for each
            token; the program grows with the layers.
    """

    def of(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return functools.partial(function, config, **options)

    return Model(
        apply=of(_apply),
        prefill=of(_prefill, layerwise=layerwise),
        decode=of(_decode),
        rows=_rows,
        joined=_joined,
        branches=of(_branches),
        init=of(_init),
        sharding_rules=SHARDING_RULES,
        layers="layers",
        on_cpu=None if layerwise else decoder(config, layerwise=True),
        vocabulary=config.vocab,
        architecture={"model": "decoder", **config.plain()},
    )


def _init(config: DecoderConfig, key: Array) -> Params:
    tokens = jnp.zeros((1, 1), jnp.int32)
    return Decoder(config).init(key, tokens, tokens, jnp.ones((1, 1, 1), bool))["params"]


def _of(config: DecoderConfig, params: Params, method: str, *arguments: Any) -> Any:
    """What a method of the decoder makes of its arguments."""
    return Decoder(config).apply({"params": params}, *arguments, method=method)


def _read(
    config: DecoderConfig, params: Params, tokens_BxT: Array, mask_BxTxT: Array
) -> tuple[Float[Array, "B T D"], Cache]:
    """Hidden states, and keys and values, of tokens that see those before them and themselves."""
    positions_BxT = jnp.maximum(jnp.sum(mask_BxTxT, axis=-1) - 1, 0)
    return _of(config, params, "__call__", tokens_BxT, positions_BxT, mask_BxTxT)


def _apply(config: DecoderConfig, params: Params, tokens_BxT: Array) -> Array:
    B, T = tokens_BxT.shape
    hidden, _ = _read(config, params, tokens_BxT, jnp.broadcast_to(_causal(T), (B, T, T)))
    return _of(config, params, "logits", hidden)


def _branches(
    config: DecoderConfig, params: Params, tokens_BxT: Array, branch_BxT: Array, asked_BxQ: Array
) -> Array:
    before_BxTxT, after_BxTxT = branch_BxT[:, None], branch_BxT[:, :, None]
    kin_BxTxT = (before_BxTxT == 0) | (before_BxTxT == after_BxTxT)
    T = tokens_BxT.shape[1]
    hidden, _ = _read(config, params, tokens_BxT, kin_BxTxT & _causal(T))
    # A product with one-hot rows, which is exact: on a gather from B over `data` inside a manual
    # `pop`, XLA's partitioner aborts the process (jaxlib 0.10.2).
    asked_BxQxT = jax.nn.one_hot(asked_BxQ, T, dtype=hidden.dtype)
    taken = jnp.einsum(
        "bqt,btd->bqd",
        asked_BxQxT,
        hidden,
        precision="highest",
        preferred_element_type=jnp.float32,
    )
    return _of(config, params, "logits", taken.astype(hidden.dtype))


def _prefill(
    config: DecoderConfig,
    params: Params,
    tokens_BxT: Array,
    padding_B: Array,
    slots: int,
    *,
    layerwise: bool,
) -> tuple[Array, _Decoding]:
    T = tokens_BxT.shape[1]
    text_Bx1xT = (jnp.arange(T)[None] >= padding_B[:, None])[:, None]
    hidden, made = _read(config, params, tokens_BxT, text_Bx1xT & _causal(T))
    room = ((0, 0), (0, 0), (0, 0), (0, slots - T), (0, 0))
    keys, values = (jnp.pad(each, room) for each in made)
    cache, layers = Cache(keys, values), ()
    # What is made a layer at a time must be made in the scan: else all layers may be at once.
    if layerwise and not any_deferred(params["layers"]):
        cache = tuple(map(Cache, keys, values))
        layers = tuple(
            jax.tree.map(lambda leaf, n=number: leaf[n], params["layers"])
            for number in range(config.layers)
        )
    logits_BxV = _of(config, params, "logits", hidden[:, -1])
    return logits_BxV, _Decoding(cache, padding_B, jnp.int32(T), layers)


def _decode(
    config: DecoderConfig, params: Params, tokens_B: Array, state: _Decoding
) -> tuple[Array, _Decoding]:
    slot_1xS = jnp.arange(jax.tree.leaves(state.cache)[0].shape[-2])[None]
    begins_Bx1 = state.padding_B[:, None]
    written_BxS = (slot_1xS < state.slot) & (slot_1xS >= begins_Bx1)
    past = Past(slot_1xS - begins_Bx1, written_BxS)
    itself_Bx1x1 = jnp.ones((len(tokens_B), 1, 1), bool)
    token = tokens_B[:, None], state.slot - begins_Bx1, itself_Bx1x1, past
    if isinstance(state.cache, Cache):
        hidden, cache = _in_a_scan(config, params, token, state.cache, state.slot)
    else:
        hidden, cache = _one_after_the_other(config, params, token, state.cache, state)
    logits_BxV = _of(config, params, "logits", hidden[:, 0])
    return logits_BxV, state._replace(cache=cache, slot=state.slot + 1)


_Token = tuple[Array, Array, Array, Past]  # tokens, positions, mask and past of a call


def _in_a_scan(
    config: DecoderConfig, params: Params, token: _Token, cache: Cache, slot: Array
) -> tuple[Array, Cache]:
    hidden, made = _of(config, params, "__call__", *token, cache)
    # Written once for all layers: a cache that went through the scan would be copied each time.
    written = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=3)
    return hidden, Cache(*(written(old, new, slot) for old, new in zip(cache, made)))


def _one_after_the_other(
    config: DecoderConfig,
    params: Params,
    token: _Token,
    caches: tuple[Cache, ...],
    state: _Decoding,
) -> tuple[Array, tuple[Cache, ...]]:
    tokens_BxT, *place = token
    where, written = _made_once(_of(config, params, "where", *place)), []
    x_BxTxD, block = _of(config, params, "embedded", tokens_BxT), Block(config)
    for kind, cache, layer in zip(config.kinds, caches, state.layers):
        done: Any = block.apply({"params": layer}, x_BxTxD, where, kind, tuple(cache), state.slot)
        x_BxTxD, (keys, values) = done
        written.append(Cache(keys, values))
    return _of(config, params, "normed", x_BxTxD), tuple(written)


def _made_once(where: Where) -> Where:
    """The same, with angles that are in memory.

    XLA on CPUs would make cosine and sine again in each fusion that turns a head, and drops a
    barrier before it fuses. A product it keeps apart; with ones on the diagonal it is exact.
    """

    def kept(angles_RxBxTxW: Array) -> Array:
        return jnp.matmul(angles_RxBxTxW, jnp.eye(angles_RxBxTxW.shape[-1]), precision="highest")

    return where._replace(cos_RxBxTxW=kept(where.cos_RxBxTxW), sin_RxBxTxW=kept(where.sin_RxBxTxW))


def _rows(state: _Decoding, rows_B: Array) -> _Decoding:
    before = (slice(None),) * isinstance(state.cache, Cache)
    cache = jax.tree.map(lambda each: each[(*before, rows_B)], state.cache)
    return state._replace(cache=cache, padding_B=state.padding_B[rows_B])


def _joined(states: Sequence[_Decoding], skipped: Sequence[int]) -> _Decoding:
    def one(*caches: Array) -> Array:
        before = ((0, 0),) * (caches[0].ndim - 2)
        room = [(*before, (more, 0), (0, 0)) for more in skipped]
        return jnp.concatenate([*map(jnp.pad, caches, room)], axis=-4)

    padding = [state.padding_B + more for state, more in zip(states, skipped)]
    return states[0]._replace(
        cache=jax.tree.map(one, *(state.cache for state in states)),
        padding_B=jnp.concatenate(padding),
        slot=states[0].slot + skipped[0],
    )


def _causal(T: int) -> Bool[Array, "1 T T"]:
    return jnp.tril(jnp.ones((T, T), bool))[None]


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
