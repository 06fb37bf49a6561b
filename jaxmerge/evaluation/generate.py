"""Log-likelihoods and generation, for any `Model`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmerge.models.model import Model, Params, State


class Scored(NamedTuple):
    """What a model makes of tokens that are looked for.

    Attributes:
        nats_BxQ: their log-probabilities.
        greedy_BxQ: whether each is a token of highest probability.
    """

    nats_BxQ: Float[Array, "B Q"]
    greedy_BxQ: Bool[Array, "B Q"]


def log_likelihood(
    model: Model,
    params: Params,
    tokens_BxT: Int[Array, "B T"],
    branch_BxT: Int[Array, "B T"],
    asked_BxQ: Int[Array, "B Q"],
    targets_BxQ: Int[Array, "B Q"],
) -> Scored:
    """log p(target | what the token at its place has read, itself included), in nats.

    Logits are computed where they are asked for only.

    Args:
        tokens_BxT: token ids, padded on the right.
        branch_BxT: see `Model.branches`; -1 on the padding. A model without has no branches: there
            what stands before a token is all that it has read.
        asked_BxQ: places of tokens.
        targets_BxQ: the token that is looked for after each.
    """
    B, Q = asked_BxQ.shape
    row_Bx1 = jnp.arange(B)[:, None]
    if model.branches is None:
        logits_BxQxV = model.apply(params, tokens_BxT)[row_Bx1, asked_BxQ]
    else:
        logits_BxQxV = model.branches(params, tokens_BxT, branch_BxT, asked_BxQ)
    logits_BxQxV = logits_BxQxV.astype(jnp.float32)
    # Not take_along_axis: with V over `tensor` and B over `data` inside a manual `pop`, XLA's
    # partitioner aborts the process on its batched gather (jaxlib 0.10.2).
    chosen_BxQ = logits_BxQxV[row_Bx1, jnp.arange(Q)[None], targets_BxQ]
    return Scored(
        chosen_BxQ - jax.nn.logsumexp(logits_BxQxV, axis=-1),
        chosen_BxQ >= jnp.max(logits_BxQxV, axis=-1),
    )


class Draw(NamedTuple):
    """How tokens are drawn instead of taking the likeliest; see `requests.Sampling`."""

    temperature: float
    top_p: float


class _Choice(NamedTuple):
    """Which token comes next, and what ends a row; see `generate`."""

    stops: tuple[int, ...]
    draw: Draw | None
    following_AxV: Array | None

    def pick(self, step: Array, logits_NxV: Array, over_N: Array, seeds_N: Array | None) -> Array:
        if self.draw is None:
            best_N = _likeliest(logits_NxV)
        else:
            assert seeds_N is not None
            best_N = _drawn(self.draw, logits_NxV, seeds_N, step)
        stop = self.stops[0]
        for other in self.stops[1:]:
            best_N = jnp.where(best_N == other, stop, best_N)
        return jnp.where(over_N, stop, best_N)

    def after(self, matched_N: Array, tokens_N: Array) -> Array:
        return matched_N if self.following_AxV is None else self.following_AxV[matched_N, tokens_N]

    def is_over(self, last_N: Array, matched_N: Array) -> Array:
        over_N = last_N == self.stops[0]
        if self.following_AxV is None:
            return over_N
        return over_N | (matched_N == self.following_AxV.shape[0] - 1)


class _Written(NamedTuple):
    """N rows that are being written.

    Attributes:
        last_N: the last token of each.
        matched_N: states of `stop_states`.
        out_NxM: all new tokens; stops where there are none yet.
        seeds_N: of what is drawn.
        state: of the model.
    """

    step: Int[Array, ""]
    last_N: Int[Array, " N"]
    matched_N: Int[Array, " N"]
    out_NxM: Int[Array, "N M"]
    seeds_N: Int[Array, " N"] | None
    state: State


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
    rows: Sequence[int] = (),
    parts: Sequence[tuple[int, int]] = (),
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
        rows: falling numbers below B: as soon as no more rows than that are unfinished, only they
            go on.
        parts: how many rows are read together, and how much of the padding that all of these have
            is left out; one after the other. (): all rows are read together.

    Returns:
        The new tokens; the first stop in a row and everything after it is `stops[0]`.
    """
    B, T = prompts_BxT.shape
    choice = _Choice(stops, draw, following_AxV)
    slots = T + max_new_tokens - 1
    logits_BxV, state = _read(model, params, prompts_BxT, padding_B, slots, parts or [(B, 0)])
    first_B = choice.pick(jnp.int32(0), logits_BxV, padding_B >= T, seeds_B)
    matched_B = choice.after(jnp.zeros(B, jnp.int32), first_B)
    out_BxM = jnp.full((B, max_new_tokens), stops[0], jnp.int32).at[:, 0].set(first_B)
    written = _Written(jnp.int32(1), first_B, matched_B, out_BxM, seeds_B, state)
    row_N = jnp.arange(B)
    for fewer in rows:
        written = _written_on(model, params, choice, written, fewer)
        out_BxM = out_BxM.at[row_N].set(written.out_NxM)
        over_N = choice.is_over(written.last_N, written.matched_N)
        kept_N = jnp.argsort(over_N, stable=True)[:fewer]  # the unfinished ones are first
        row_N = row_N[kept_N]
        step, *of_rows, state = written
        of_rows = [None if each is None else each[kept_N] for each in of_rows]
        written = _Written(step, *of_rows, model.rows(state, kept_N))
    return out_BxM.at[row_N].set(_written_on(model, params, choice, written, 0).out_NxM)


def _read(
    model: Model,
    params: Params,
    prompts_BxT: Array,
    padding_B: Array,
    slots: int,
    parts: Sequence[tuple[int, int]],
) -> tuple[Array, State]:
    """`Model.prefill`, in parts."""
    logits, states, end = [], [], 0
    for rows, skipped in parts:
        here, end = slice(end, end + rows), end + rows
        prompts, padding = prompts_BxT[here, skipped:], padding_B[here] - skipped
        of_part, state = model.prefill(params, prompts, padding, slots - skipped)
        logits.append(of_part)
        states.append(state)
    if len(parts) == 1:
        return logits[0], states[0]
    assert model.joined is not None
    return jnp.concatenate(logits), model.joined(states, [skipped for _, skipped in parts])


def _written_on(
    model: Model, params: Params, choice: _Choice, written: _Written, fewer: int
) -> _Written:
    """The rows gone on with, until no more than `fewer` of them are unfinished."""

    def unfinished(written: _Written) -> Array:
        over_N = choice.is_over(written.last_N, written.matched_N)
        return (written.step < written.out_NxM.shape[1]) & (jnp.sum(~over_N) > fewer)

    def one_token(written: _Written) -> _Written:
        step, last_N, matched_N, out_NxM, seeds_N, state = written
        logits_NxV, state = model.decode(params, last_N, state)
        over_N = choice.is_over(last_N, matched_N)
        next_N = choice.pick(step, logits_NxV, over_N, seeds_N)
        out_NxM = jax.lax.dynamic_update_slice_in_dim(out_NxM, next_N[:, None], step, axis=1)
        matched_N = choice.after(matched_N, next_N)
        return _Written(step + 1, next_N, matched_N, out_NxM, seeds_N, state)

    return jax.lax.while_loop(unfinished, one_token, written)


def _likeliest(logits_BxV: Float[Array, "B V"]) -> Int[Array, " B"]:
    """The first token of highest logit; the last token where a logit is no number.

    By two reductions: XLA's argmax is one of pairs, on CPUs 2 to 7 times slower (jaxlib 0.10.2).
    """
    V = logits_BxV.shape[-1]
    token_1xV = jnp.arange(V, dtype=jnp.int32)[None]
    top_Bx1 = jnp.max(logits_BxV, axis=-1, keepdims=True)
    return jnp.min(jnp.where(logits_BxV >= top_Bx1, token_1xV, V - 1), axis=-1)


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
