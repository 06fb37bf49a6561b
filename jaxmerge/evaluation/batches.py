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

from jaxmerge.evaluation.rows import Limits, Prompted, Row, prompted, rows_of
from jaxmerge.evaluation.tokenizer import Tokenizer
from jaxmerge.tasks.requests import Generate, Likelihood, Request, Rolling

_PER_READING = 128  # what rows that are read together cost besides their tokens, in tokens
_PER_STEP = 32  # the same of each token that its rows write: all parameters are read again
_BEYOND = 5  # so many tokens beyond `Limits.cached` cost one more

# Rows that are written together are read apart in quarters at the finest, so that few programs are.
_PARTS = 4


class Writing(NamedTuple):
    """What generations must have in common to share a program."""

    max_new_tokens: int
    until: tuple[str, ...]
    temperature: float  # 0: greedy
    top_p: float


class Part(NamedTuple):
    """Rows of a microbatch that are read together.

    Attributes:
        rows: how many.
        skipped: how much of the padding on their left is not even read.
    """

    rows: int
    skipped: int


class Microbatch(NamedTuple):
    """B rows that go through a model together.

    Attributes:
        requests: the place of the request that each output is of, `[B]` of texts that are written,
            `[B, Q]` of tokens that are scored; -1 where something only fills up.
        arrays: what the model's program takes besides parameters; each `[B, ...]`.
        parts: which of its rows are read apart, before all are written together; (): none.
    """

    requests: Int[np.ndarray, " B"] | Int[np.ndarray, "B Q"]
    arrays: tuple[np.ndarray, ...]
    parts: tuple[Part, ...] = ()


class Encoded(NamedTuple):
    """Requests as microbatches.

    Attributes:
        scoring: of all likelihoods. `arrays` are those of `generate.log_likelihood`: tokens
            `[B, T]`, padded on the right, their branches `[B, T]`, the places whose next token is
            scored `[B, Q]`, and these tokens `[B, Q]`.
        writing: of the generations. `arrays` are prompts `[B, T]`, padded on the left, how much
            padding `[B]`, and seeds `[B]`.
        scored: how many tokens are scored for each request.
        read: tokens that go through the model in all, without padding and what is then written.
    """

    scoring: list[Microbatch]
    writing: dict[Writing, list[Microbatch]]
    scored: Int[np.ndarray, " R"]
    read: int


def encode(
    requests: Sequence[Request],
    tokenizer: Tokenizer,
    limits: Limits,
    where: str = "",
    branching: bool = True,
    joining: bool = True,
) -> Encoded:
    """All requests, tokenised and batched.

    Args:
        requests: of any kind.
        tokenizer: text to tokens.
        limits: see `Limits`.
        where: whose requests they are, for error messages.
        branching: whether the model can read rows with branches (`Model.branches`).
        joining: whether it can write on together what it has read apart (`Model.joined`).

    Raises:
        JaxmergeError: a prompt or continuation is empty, or too long for the model.
    """
    writing: dict[Writing, list[Prompted]] = {}
    looked_for: dict[int, Likelihood | Rolling] = {}
    for place, request in enumerate(requests):
        if isinstance(request, Generate):
            kind = _kind(request)
            writing.setdefault(kind, []).append(prompted(place, request, tokenizer, limits, where))
        else:
            looked_for[place] = request
    trees = rows_of(looked_for, tokenizer, limits, where, branching=branching)
    scored = np.zeros(len(requests), np.int64)
    for branch in (branch for tree in trees for branch in tree.branches):
        scored[branch.request] += len(branch.scored)
    rows = [*trees, *(row for rows in writing.values() for row in rows)]
    return Encoded(
        _microbatches(trees, limits, _pad_right),
        {
            kind: _microbatches(
                prompts, limits, _pad_left, steps=kind.max_new_tokens, joining=joining
            )
            for kind, prompts in writing.items()
        },
        scored,
        sum(row.length for row in rows),
    )


def together(rows: Sequence[Row], widest: Sequence[Row]) -> Microbatch:
    """Rows as one microbatch, padded as the widest of others are."""
    length, asked = (max(each) for each in zip(*((row.length, row.asked) for row in widest)))
    return _pad_right(rows, len(rows), _padded(length), asked)


def _kind(request: Generate) -> Writing:
    sampling = request.sampling
    temperature, top_p = (sampling.temperature, sampling.top_p) if sampling else (0.0, 1.0)
    until = tuple(text for text in request.until if text)
    return Writing(request.max_new_tokens, until, temperature, top_p)


def _microbatches(
    rows: Sequence[Prompted | Row],
    limits: Limits,
    pad: Callable[..., Microbatch],
    *,
    steps: int = 0,
    joining: bool = False,
) -> list[Microbatch]:
    """Rows sorted by length and cut into microbatches, each with the length it is padded to.

    Of all cuts into the sizes that are allowed, the one of the fewest tokens: those that are read,
    padding included, what each reading costs by itself, and the same of each step of writing.
    """
    rows = sorted(rows, key=lambda row: -row.length)
    widths = [_padded(row.length) for row in rows]
    cost = [0] * (len(rows) + 1)  # of all rows from here on
    size = [0] * len(rows)
    parts: list[tuple[Part, ...]] = [()] * len(rows)
    for i in reversed(range(len(rows))):
        choices = []
        for B in _sizes(widths[i], limits):
            read, cut = _read_apart(widths[i : i + B], B, _PARTS if joining else 1, limits)
            choices.append((read + _PER_STEP * steps + cost[min(i + B, len(rows))], B, cut))
        cost[i], size[i], parts[i] = min(choices)
    firsts, i = [], 0
    while i < len(rows):
        firsts.append(i)
        i += size[i]
    # Of one width, all ask for as many tokens: each shape is compiled.
    asked: dict[int, int] = {}
    for i in firsts:
        most = max(row.asked for row in rows[i : i + size[i]])
        asked[widths[i]] = max(asked.get(widths[i], 0), most)
    return [
        pad(rows[i : i + size[i]], size[i], widths[i], asked[widths[i]])._replace(parts=parts[i])
        for i in reversed(firsts)  # short ones first
    ]


def _read_apart(
    widths: Sequence[int], B: int, most: int, limits: Limits
) -> tuple[int, tuple[Part, ...]]:
    """What B rows of falling widths cost to read, in tokens, and in which parts that is least.

    Args:
        widths: of the rows that there are, the others only fill up.
        B: rows in all.
        most: parts at most.
        limits: see `Limits`.
    """
    if most == 1:
        return _reading(B * widths[0], limits), ()
    cuts = [*range(0, B, -(-B // most)), B]
    best: dict[int, tuple[int, tuple[Part, ...]]] = {B: (0, ())}  # of the rows from a cut on
    for i, start in reversed([*enumerate(cuts[:-1])]):
        T = widths[start] if start < len(widths) else _padded(1)
        best[start] = min(
            (
                _reading((end - start) * T, limits) + best[end][0],
                (Part(end - start, widths[0] - T), *best[end][1]),
            )
            for end in cuts[i + 1 :]
        )
    read, parts = best[0]
    return read, parts if len(parts) > 1 else ()


def _reading(tokens: int, limits: Limits) -> int:
    """What tokens that are read together cost, in tokens."""
    beyond = max(tokens - limits.cached, 0) if limits.cached else 0
    return tokens + beyond // _BEYOND + _PER_READING


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


def _pad_left(rows: Sequence[Prompted], B: int, T: int, asked: int) -> Microbatch:
    requests_B, tokens_BxT = np.full(B, -1), np.zeros((B, T), np.int32)
    padding_B, seeds_B = np.full(B, T, np.int32), np.zeros(B, np.int32)
    for i, row in enumerate(rows):
        requests_B[i], padding_B[i], seeds_B[i] = row.request, T - row.length, row.seed
        tokens_BxT[i, padding_B[i] :] = row.tokens
    return Microbatch(requests_B, (tokens_BxT, padding_B, seeds_B))


def _pad_right(rows: Sequence[Row], B: int, T: int, asked: int) -> Microbatch:
    Q = _padded(asked)
    requests_BxQ = np.full((B, Q), -1)
    tokens_BxT, branch_BxT = np.zeros((B, T), np.int32), np.full((B, T), -1, np.int32)
    asked_BxQ, targets_BxQ = np.zeros((B, Q), np.int32), np.zeros((B, Q), np.int32)
    for i, row in enumerate(rows):
        end, q = len(row.trunk), 0
        tokens_BxT[i, :end], branch_BxT[i, :end] = row.trunk, 0
        for number, (request, scored) in enumerate(row.branches, start=1):
            more, next_q = len(scored) - 1, q + len(scored)
            tokens_BxT[i, end : end + more], branch_BxT[i, end : end + more] = scored[:-1], number
            # What follows the trunk's last token, then what follows each of the branch.
            asked_BxQ[i, q:next_q] = [len(row.trunk) - 1, *range(end, end + more)]
            targets_BxQ[i, q:next_q], requests_BxQ[i, q:next_q] = scored, request
            end, q = end + more, next_q
    return Microbatch(requests_BxQ, (tokens_BxT, branch_BxT, asked_BxQ, targets_BxQ))
