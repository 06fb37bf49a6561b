"""Log-likelihoods and generation, for any `Model`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmerge.models.model import Model, Params


class Scored(NamedTuple):
    """What a model makes of the scored tokens of each row.

    Attributes:
        nats_B: sum of their log-probabilities.
        greedy_B: whether each is a token of highest probability.
    """

    nats_B: Float[Array, " B"]
    greedy_B: Bool[Array, " B"]


def log_likelihood(
    model: Model,
    params: Params,
    tokens_BxT: Int[Array, "B T"],
    scored_BxT: Bool[Array, "B T"],
) -> Scored:
    """Sum over the scored positions t >= 1 of log p(token_t | tokens before t), in nats.

    Args:
        tokens_BxT: token ids, padded on the right.
        scored_BxT: which tokens count; position 0 has nothing before it and never counts.
    """
    logits_BxTxV = model.apply(params, tokens_BxT[:, :-1]).astype(jnp.float32)
    targets_BxT, counts_BxT = tokens_BxT[:, 1:], scored_BxT[:, 1:]
    # Not take_along_axis: with V over `tensor` and B over `data` inside a manual `pop`, XLA's
    # partitioner aborts the process on its batched gather (jaxlib 0.10.2).
    B, T = targets_BxT.shape
    chosen_BxT = logits_BxTxV[jnp.arange(B)[:, None], jnp.arange(T)[None], targets_BxT]
    log_p_BxT = chosen_BxT - jax.nn.logsumexp(logits_BxTxV, axis=-1)
    likeliest_BxT = chosen_BxT >= jnp.max(logits_BxTxV, axis=-1)
    return Scored(
        jnp.sum(jnp.where(counts_BxT, log_p_BxT, 0.0), axis=-1),
        jnp.all(likeliest_BxT | ~counts_BxT, axis=-1),
    )


class Draw(NamedTuple):
    """How tokens are drawn instead of taking the likeliest; see `requests.Sampling`."""

    temperature: float
    top_p: float


def generate(
    model: Model,
    params: Params,
    prompts_BxT: Int[Array, "B T"],
    padding_B: Int[Array, " B"],
    seeds_B: Int[Array, " B"] | None = None,
    following_AxV: Int[Array, "A V"] | None = None,
    *,
    max_new_tokens: int,
    stops: tuple[int, ...],
    draw: Draw | None = None,
) -> Int[Array, "B M"]:
    """A continuation of each prompt; ends early when every row has ended.

    Args:
        prompts_BxT: token ids, padded on the left.
        padding_B: tokens of padding in each row. A row that is all padding generates nothing.
        seeds_B: of what is drawn in each row; not needed without `draw`.
        following_AxV: see `stop_states`: a row ends with the token that completes a stop text.
        max_new_tokens: M, tokens at most.
        stops: the tokens that end a row.
        draw: None takes the likeliest token.

    Returns:
        The new tokens; the first stop in a row and everything after it is `stops[0]`.
    """
    B, T = prompts_BxT.shape
    stop = stops[0]
    ended = 0 if following_AxV is None else following_AxV.shape[0] - 1

    def pick(step, logits_BxV: Array, over_B: Array) -> Array:
        if draw is None:
            best_B = jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
        else:
            assert seeds_B is not None
            best_B = _drawn(draw, logits_BxV, seeds_B, step)
        for other in stops[1:]:
            best_B = jnp.where(best_B == other, stop, best_B)
        return jnp.where(over_B, stop, best_B)

    def after(state_B: Array, tokens_B: Array) -> Array:
        return state_B if following_AxV is None else following_AxV[state_B, tokens_B]

    def is_over(state_B: Array, tokens_B: Array) -> Array:
        over_B = tokens_B == stop
        return over_B if following_AxV is None else over_B | (state_B == ended)

    logits_BxV, state = model.prefill(params, prompts_BxT, padding_B, T + max_new_tokens - 1)
    first_B = pick(jnp.int32(0), logits_BxV, padding_B >= T)
    matched_B = after(jnp.zeros(B, jnp.int32), first_B)
    out_BxM = jnp.full((B, max_new_tokens), stop, jnp.int32).at[:, 0].set(first_B)

    def unfinished(carry):
        step, tokens_B, matched_B, _, _ = carry
        return (step < max_new_tokens) & ~jnp.all(is_over(matched_B, tokens_B))

    def one_token(carry):
        step, tokens_B, matched_B, out_BxM, state = carry
        logits_BxV, state = model.decode(params, tokens_B, state)
        next_B = pick(step, logits_BxV, is_over(matched_B, tokens_B))
        out_BxM = jax.lax.dynamic_update_slice_in_dim(out_BxM, next_B[:, None], step, axis=1)
        return step + 1, next_B, after(matched_B, next_B), out_BxM, state

    carry = (jnp.int32(1), first_B, matched_B, out_BxM, state)
    return jax.lax.while_loop(unfinished, one_token, carry)[3]


def _drawn(
    draw: Draw, logits_BxV: Float[Array, "B V"], seeds_B: Int[Array, " B"], step: Int[Array, ""]
) -> Int[Array, " B"]:
    """One token a row, each row with random numbers of its own that no other row moves."""
    scaled_BxV = logits_BxV.astype(jnp.float32) / draw.temperature
    if draw.top_p < 1:
        order_BxV = jnp.sort(jax.nn.softmax(scaled_BxV, axis=-1), axis=-1, descending=True)
        before_BxV = jnp.cumsum(order_BxV, axis=-1) - order_BxV
        # The least probability that is kept: that of the last token with less than top_p before it.
        least_B = jnp.min(jnp.where(before_BxV < draw.top_p, order_BxV, jnp.inf), axis=-1)
        kept_BxV = jax.nn.softmax(scaled_BxV, axis=-1) >= least_B[:, None]
        scaled_BxV = jnp.where(kept_BxV, scaled_BxV, -jnp.inf)

    def one(seed, scaled_V):
        key = jax.random.fold_in(jax.random.key(seed), step)
        return jax.random.categorical(key, scaled_V)

    return jax.vmap(one)(seeds_B, scaled_BxV).astype(jnp.int32)


def stop_states(
    until: Sequence[str], pieces: Sequence[bytes], first: Sequence[bytes]
) -> Int[np.ndarray, "A V"]:
    """The automaton that finds stop texts in tokens, wherever the tokens begin and end.

    A state is how much of a stop text has been written, byte by byte (Aho and Corasick, 1975). From
    state a, token v leads to state `[a, v]`. State 0 is that no token has been written; the last is
    that a stop text has been found, and leads nowhere else.

    Args:
        until: the stop texts, none of them empty.
        pieces: the bytes that each token writes.
        first: those that it writes as the first token of a text.
    """
    texts = [text.encode() for text in until]
    begun = sorted({text[:i] for text in texts for i in range(len(text))}, key=len)
    place = {text: i for i, text in enumerate(begun)}
    found = len(begun)
    following = np.full((found + 1, 256), found, np.int32)
    for text, i in place.items():
        for byte in range(256):
            written = text + bytes([byte])
            if not any(written.endswith(whole) for whole in texts):
                ends = (written[k:] for k in range(len(written) + 1))
                following[i, byte] = next(place[end] for end in ends if end in place)
    later_VxA = _after(following, pieces, np.arange(found + 1))
    start_Vx1 = _after(following, first, np.zeros(1, int))
    return np.ascontiguousarray(np.concatenate([start_Vx1, later_VxA], axis=1).T + 1)


def _after(
    following: np.ndarray, pieces: Sequence[bytes], states_A: np.ndarray
) -> Int[np.ndarray, "V A"]:
    """The state after all bytes of each piece, from each of some states."""
    order = np.argsort([-len(piece) for piece in pieces], kind="stable")
    lengths = np.array([len(pieces[v]) for v in order])
    padded = np.zeros((len(pieces), max(lengths, default=0)), np.uint8)
    for row, v in enumerate(order):
        padded[row, : len(pieces[v])] = np.frombuffer(pieces[v], np.uint8)
    states_VxA = np.tile(states_A.astype(np.int32), (len(pieces), 1))
    for i in range(padded.shape[1]):
        count = int(np.searchsorted(-lengths, -i, side="left"))  # pieces of more than i bytes
        states_VxA[:count] = following[states_VxA[:count], padded[:count, i, None]]
    by_token = np.empty_like(states_VxA)
    by_token[order] = states_VxA
    return by_token
