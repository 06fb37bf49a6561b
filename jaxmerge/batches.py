"""Requests to padded token arrays of a few fixed shapes.

Rows are sorted by length and cut into microbatches, so that little is spent on padding and each
shape is compiled once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxmerge.errors import JaxmergeError
from jaxmerge.requests import Generate, Likelihood, Prompt, Request, Rolling
from jaxmerge.tokenizer import Tokenizer

_PER_MICROBATCH = 128  # what a microbatch costs besides its tokens, in tokens; and it may compile


class Limits(NamedTuple):
    """How much goes through a model at a time.

    Attributes:
        rows: of a microbatch, at most.
        tokens: of a microbatch, padding included, at most, unless a single row has more.
        multiple: a microbatch has a multiple of as many rows.
        context: tokens that the model can read and write in all; 0: any number.
        truncate: whether what is too long loses its beginning, or is refused.
    """

    rows: int = 64
    tokens: int = 8192
    multiple: int = 1
    context: int = 0
    truncate: bool = False


class Writing(NamedTuple):
    """What generations must have in common to share a program."""

    max_new_tokens: int
    until: tuple[str, ...]
    temperature: float  # 0: greedy
    top_p: float


class Microbatch(NamedTuple):
    """B rows that go through a model together.

    Attributes:
        requests_B: the place of the request that each row is of; -1 for rows that only fill up.
        arrays: what the model's program takes besides parameters; each `[B, ...]`.
    """

    requests_B: Int[np.ndarray, " B"]
    arrays: tuple[np.ndarray, ...]


class Encoded(NamedTuple):
    """Requests as microbatches.

    Attributes:
        scoring: of all likelihoods. `arrays` are tokens `[B, T]`, padded on the right, and which of
            them are scored `[B, T]`.
        writing: of the generations. `arrays` are prompts `[B, T]`, padded on the left, how much
            padding `[B]`, and seeds `[B]`.
        scored: how many tokens are scored for each request.
        read: tokens that go through the model in all, without padding and what is then written.
    """

    scoring: list[Microbatch]
    writing: dict[Writing, list[Microbatch]]
    scored: Int[np.ndarray, " R"]
    read: int


class _Row(NamedTuple):
    """One row of tokens: those that are read only, and those that are scored."""

    request: int
    read: list[int]
    scored: list[int]
    seed: int = 0


def encode(
    requests: Sequence[Request], tokenizer: Tokenizer, limits: Limits, where: str = ""
) -> Encoded:
    """All requests, tokenised and batched.

    Args:
        requests: of any kind.
        tokenizer: text to tokens.
        limits: see `Limits`.
        where: whose requests they are, for error messages.

    Raises:
        JaxmergeError: a prompt or continuation is empty, or too long for the model.
    """
    scoring: list[_Row] = []
    writing: dict[Writing, list[_Row]] = {}
    for place, request in enumerate(requests):
        if isinstance(request, Generate):
            kind = _kind(request)
            writing.setdefault(kind, []).append(_prompt(place, request, tokenizer, limits, where))
        elif isinstance(request, Rolling):
            scoring += _windows(place, request, tokenizer, limits, where)
        else:
            scoring.append(_pair(place, request, tokenizer, limits, where))
    counted = np.zeros(len(requests), np.int64)
    for row in scoring:
        counted[row.request] += len(row.scored)
    prompts = sum(len(row.read) for rows in writing.values() for row in rows)
    # The last token of a row is only looked for, never read.
    pairs = sum(len(row.read) + len(row.scored) - 1 for row in scoring)
    return Encoded(
        _microbatches(scoring, limits, _pad_right),
        {kind: _microbatches(rows, limits, _pad_left) for kind, rows in writing.items()},
        counted,
        prompts + pairs,
    )


def _kind(request: Generate) -> Writing:
    sampling = request.sampling
    temperature, top_p = (sampling.temperature, sampling.top_p) if sampling else (0.0, 1.0)
    until = tuple(text for text in request.until if text)
    return Writing(request.max_new_tokens, until, temperature, top_p)


def _prompt(
    place: int, request: Generate, tokenizer: Tokenizer, limits: Limits, where: str
) -> _Row:
    read = tokenizer.prompt(request.prompt)
    _check(read, request.prompt.text, where)
    read = _fitted(read, limits.context - request.max_new_tokens, limits, where)
    return _Row(place, read, [], request.sampling.seed if request.sampling else 0)


def _pair(
    place: int, request: Likelihood, tokenizer: Tokenizer, limits: Limits, where: str
) -> _Row:
    read, scored = tokenizer.pair(request.prompt, request.continuation)
    if not read and scored[:1] == [tokenizer.prefix]:
        read, scored = scored[:1], scored[1:]
    scored = scored + [tokenizer.stops[0]] * request.ended
    _check(scored, request.continuation, where)
    # The last token is only looked for, never read.
    read = _fitted(read or [tokenizer.prefix], limits.context + 1 - len(scored), limits, where)
    return _Row(place, read, scored)


def _windows(
    place: int, request: Rolling, tokenizer: Tokenizer, limits: Limits, where: str
) -> list[_Row]:
    """A text as rows: as many tokens as the context takes, each after one token before them."""
    tokens = tokenizer.prompt(Prompt(request.text, form=request.form))
    _check(tokens, request.text, where)
    width = limits.context or len(tokens)
    rows = [_Row(place, [tokenizer.prefix], tokens[:width])]
    for start in range(width, len(tokens), width):
        stop = min(start + width, len(tokens))
        # The last window is as wide as the others, and scores what they have not.
        rows.append(_Row(place, tokens[stop - width - 1 : start], tokens[start:stop]))
    return rows


def _check(tokens: Sequence[int], text: str, where: str) -> None:
    if not tokens:
        raise JaxmergeError("a prompt or continuation is empty", where=where, found=repr(text))


def _fitted(tokens: list[int], room: int, limits: Limits, where: str) -> list[int]:
    """The tokens, or the last of them that there is room for."""
    if not limits.context or len(tokens) <= room:
        return tokens
    if not limits.truncate or room < 1:
        raise JaxmergeError(
            "a prompt is too long for the model",
            where=where,
            expected=f"at most {room} tokens of the {limits.context} that it can hold; or "
            'evaluate.too_long="truncate", which cuts off the beginning of the prompt',
            found=f"{len(tokens)} tokens",
        )
    return tokens[len(tokens) - room :]


def _microbatches(
    rows: Sequence[_Row], limits: Limits, pad: Callable[..., tuple[np.ndarray, ...]]
) -> list[Microbatch]:
    """Rows sorted by length and cut into microbatches, each with the length it is padded to.

    Of all cuts into the sizes that are allowed, the one of the fewest tokens, padding and what a
    microbatch costs by itself included.
    """
    rows = sorted(rows, key=lambda row: -len(row.read) - len(row.scored))
    widths = [_padded(len(row.read) + len(row.scored)) for row in rows]
    cost = [0] * (len(rows) + 1)  # of all rows from here on
    size = [0] * len(rows)
    for i in reversed(range(len(rows))):
        cost[i], size[i] = min(
            (B * widths[i] + _PER_MICROBATCH + cost[min(i + B, len(rows))], B)
            for B in _sizes(widths[i], limits)
        )
    microbatches, i = [], 0
    while i < len(rows):
        batch = rows[i : i + size[i]]
        requests_B = np.full(size[i], -1)
        requests_B[: len(batch)] = [row.request for row in batch]
        microbatches.append(Microbatch(requests_B, pad(batch, size[i], widths[i])))
        i += size[i]
    return microbatches[::-1]  # short ones first


def _sizes(T: int, limits: Limits) -> set[int]:
    """How many rows a microbatch of this length may have: few choices, so that few programs are."""
    halves = [limits.rows >> i for i in range(max(limits.rows.bit_length(), 1))]
    small = [B for B in halves[:4] if limits.tokens >= B * T] or [
        max(B for B in halves if limits.tokens >= B * T or B == 1)
    ]
    return {-(-B // limits.multiple) * limits.multiple for B in small}


def _padded(length: int) -> int:
    """The next length that gets a program of its own: at most 1/8 (or 3 tokens) longer."""
    step = max(4, 2 ** math.floor(math.log2(length)) // 8)
    return -(-length // step) * step


def _pad_left(rows: Sequence[_Row], B: int, T: int) -> tuple[np.ndarray, ...]:
    tokens_BxT = np.zeros((B, T), np.int32)
    padding_B, seeds_B = np.full(B, T, np.int32), np.zeros(B, np.int32)
    for i, row in enumerate(rows):
        padding_B[i], seeds_B[i] = T - len(row.read), row.seed
        tokens_BxT[i, padding_B[i] :] = row.read
    return tokens_BxT, padding_B, seeds_B


def _pad_right(rows: Sequence[_Row], B: int, T: int) -> tuple[np.ndarray, ...]:
    tokens_BxT, scored_BxT = np.zeros((B, T), np.int32), np.zeros((B, T), bool)
    for i, row in enumerate(rows):
        end = len(row.read) + len(row.scored)
        tokens_BxT[i, :end] = [*row.read, *row.scored]
        scored_BxT[i, len(row.read) : end] = True
    return tokens_BxT, scored_BxT
