"""Log-likelihoods and greedy generation, for any `Model`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmerge.models.model import Model, Params


def log_likelihood(
    model: Model,
    params: Params,
    tokens_BxT: Int[Array, "B T"],
    scored_BxT: Bool[Array, "B T"],
) -> Float[Array, " B"]:
    """Sum over the scored positions t >= 1 of log p(token_t | tokens before t), in nats.

    Args:
        tokens_BxT: token ids, padded on the right.
        scored_BxT: which tokens count; position 0 has nothing before it and never counts.
    """
    logits_BxTxV = model.apply(params, tokens_BxT[:, :-1]).astype(jnp.float32)
    targets_BxT = tokens_BxT[:, 1:]
    # Not take_along_axis: with V over `tensor` and B over `data` inside a manual `pop`, XLA's
    # partitioner aborts the process on its batched gather (jaxlib 0.10.2).
    B, T = targets_BxT.shape
    chosen_BxT = logits_BxTxV[jnp.arange(B)[:, None], jnp.arange(T)[None], targets_BxT]
    log_p_BxT = chosen_BxT - jax.nn.logsumexp(logits_BxTxV, axis=-1)
    return jnp.sum(jnp.where(scored_BxT[:, 1:], log_p_BxT, 0.0), axis=-1)


def generate(
    model: Model,
    params: Params,
    prompts_BxT: Int[Array, "B T"],
    padding_B: Int[Array, " B"],
    *,
    max_new_tokens: int,
    stops: tuple[int, ...],
) -> Int[Array, "B M"]:
    """Greedy continuation of each prompt; ends early when every row has stopped.

    Args:
        prompts_BxT: token ids, padded on the left.
        padding_B: tokens of padding in each row. A row that is all padding generates nothing.
        max_new_tokens: M, tokens at most.
        stops: the tokens that end a row.

    Returns:
        The new tokens; the first stop in a row and everything after it is `stops[0]`.
    """
    B, T = prompts_BxT.shape
    stop = stops[0]

    def greedy(logits_BxV: Array, stopped_B: Array) -> Array:
        best_B = jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
        for other in stops[1:]:
            best_B = jnp.where(best_B == other, stop, best_B)
        return jnp.where(stopped_B, stop, best_B)

    logits_BxV, state = model.prefill(params, prompts_BxT, padding_B, T + max_new_tokens - 1)
    first_B = greedy(logits_BxV, padding_B >= T)
    out_BxM = jnp.full((B, max_new_tokens), stop, jnp.int32).at[:, 0].set(first_B)

    def unfinished(carry):
        step, tokens_B, _, _ = carry
        return (step < max_new_tokens) & jnp.any(tokens_B != stop)

    def one_token(carry):
        step, tokens_B, out_BxM, state = carry
        logits_BxV, state = model.decode(params, tokens_B, state)
        next_B = greedy(logits_BxV, tokens_B == stop)
        out_BxM = jax.lax.dynamic_update_slice_in_dim(out_BxM, next_B[:, None], step, axis=1)
        return step + 1, next_B, out_BxM, state

    carry = (jnp.int32(1), first_B, out_BxM, state)
    return jax.lax.while_loop(unfinished, one_token, carry)[2]
