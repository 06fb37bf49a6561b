"""Requests to padded token arrays of a few fixed shapes.

Rows are sorted by length and cut into microbatches, so that little is spent on padding and each
shape is compiled once. Continuations of the same prompt share a row, as branches of it, so that a
model reads the question of a multiple choice once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxmerge.errors import JaxmergeError, check_choice, check_least
from jaxmerge.evaluation.tokenizer import Tokenizer
from jaxmerge.tasks.requests import Generate, Likelihood, Prompt, Request, Rolling

_PER_READING = 128  # what rows that are read together cost besides their tokens, in tokens
_PER_STEP = 32  # the same of each token that its rows write: all parameters are read again
_BEYOND = 5  # so many tokens beyond `Limits.cached` cost one more

# Branches of a row have at most so many times the tokens of its trunk. Each branch spares reading
# the trunk again, and lengthens what attention masks out for all others.
_BRANCHING = 8

# Rows that are written together are read apart in quarters at the finest, so that few programs are.
_PARTS = 4


# Fields of `evaluate` in a config, which `check` looks at.
FIELDS = ("candidates_per_step", "batch_size", "batch_tokens", "context", "too_long")


def check(
    candidates_per_step: int, batch_size: int, batch_tokens: int, context: int, too_long: str
) -> None:
    """Raises `JaxmergeError`, which names the field of a config, unless sizes can be so."""
    check_choice("evaluate.too_long", too_long, ("refuse", "truncate"))
    sizes = (candidates_per_step, batch_size, batch_tokens, context)
    for name, size in zip(FIELDS, sizes):
        check_least(f"evaluate.{name}", size, 0)


class Limits(NamedTuple):
    """How much goes through a model at a time.

    Attributes:
        rows: of a microbatch, at most.
        tokens: of a microbatch, padding included, at most, unless a single row has more.
        cached: tokens that a processor's caches hold what a layer makes of; those beyond them are
            slower to read. 0: it makes no difference.
        multiple: a microbatch has a multiple of as many rows.
        context: tokens that the model can read and write in all; 0: any number.
        truncate: whether what is too long loses its beginning, or is refused.
    """

    rows: int = 64
    tokens: int = 8192
    cached: int = 0
    multiple: int = 1
    context: int = 0
    truncate: bool = False


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


class _Prompt(NamedTuple):
    """A row that is gone on from."""

    request: int
    tokens: list[int]
    seed: int

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def asked(self) -> int:
        return 1


class _Branch(NamedTuple):
    request: int
    scored: list[int]  # the last of them is only looked for, never read


class _Tree(NamedTuple):
    """A row with what is scored: a trunk and what goes on from it, side by side."""

    trunk: list[int]
    branches: list[_Branch]

    @property
    def length(self) -> int:
        return len(self.trunk) + sum(len(branch.scored) - 1 for branch in self.branches)

    @property
    def asked(self) -> int:
        """Tokens that are scored."""
        return sum(len(branch.scored) for branch in self.branches)

    def has_room(self, branch: _Branch, limits: Limits) -> bool:
        """Whether another branch is worth having here."""
        length = self.length + len(branch.scored) - 1
        return length <= min(limits.tokens, (1 + _BRANCHING) * len(self.trunk))


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
    trees: list[_Tree] = []
    growing: dict[tuple[int, ...], _Tree] = {}  # the last one of each trunk
    writing: dict[Writing, list[_Prompt]] = {}
    scored = np.zeros(len(requests), np.int64)
    for place, request in enumerate(requests):
        if isinstance(request, Generate):
            kind = _kind(request)
            writing.setdefault(kind, []).append(_prompt(place, request, tokenizer, limits, where))
            continue
        if isinstance(request, Rolling):
            pairs = _windows(request, tokenizer, limits, where)
        else:
            pairs = [_pair(request, tokenizer, limits, where)]
        for trunk, tokens in pairs:
            scored[place] += len(tokens)
            branch, tree = _Branch(place, tokens), growing.get(tuple(trunk))
            if branching and tree and tree.has_room(branch, limits):
                tree.branches.append(branch)
                continue
            growing[tuple(trunk)] = _Tree(trunk, [branch])
            trees.append(growing[tuple(trunk)])
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


def _kind(request: Generate) -> Writing:
    sampling = request.sampling
    temperature, top_p = (sampling.temperature, sampling.top_p) if sampling else (0.0, 1.0)
    until = tuple(text for text in request.until if text)
    return Writing(request.max_new_tokens, until, temperature, top_p)


def _prompt(
    place: int, request: Generate, tokenizer: Tokenizer, limits: Limits, where: str
) -> _Prompt:
    read = tokenizer.prompt(request.prompt)
    _check(read, request.prompt.text, where)
    read = _fitted(read, limits.context - request.max_new_tokens, limits, where)
    return _Prompt(place, read, request.sampling.seed if request.sampling else 0)


_Pair = tuple[list[int], list[int]]  # what is read before, and what is scored after it


def _pair(request: Likelihood, tokenizer: Tokenizer, limits: Limits, where: str) -> _Pair:
    read, scored = tokenizer.pair(request.prompt, request.continuation)
    if not read and scored[:1] == [tokenizer.prefix]:
        read, scored = scored[:1], scored[1:]
    scored = scored + [tokenizer.stops[0]] * request.ended
    _check(scored, request.continuation, where)
    # The last token is only looked for, never read.
    read = _fitted(read or [tokenizer.prefix], limits.context + 1 - len(scored), limits, where)
    return read, scored


def _windows(request: Rolling, tokenizer: Tokenizer, limits: Limits, where: str) -> list[_Pair]:
    """A text cut up: as many tokens as the context takes, each after one token before them."""
    tokens = tokenizer.prompt(Prompt(request.text, form=request.form))
    _check(tokens, request.text, where)
    width = limits.context or len(tokens)
    pairs = [([tokenizer.prefix], tokens[:width])]
    for start in range(width, len(tokens), width):
        stop = min(start + width, len(tokens))
        # The last window is as wide as the others, and scores what they have not.
        pairs.append((tokens[stop - width - 1 : start], tokens[start:stop]))
    return pairs


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
    rows: Sequence[_Prompt | _Tree],
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


def _pad_left(rows: Sequence[_Prompt], B: int, T: int, asked: int) -> Microbatch:
    requests_B, tokens_BxT = np.full(B, -1), np.zeros((B, T), np.int32)
    padding_B, seeds_B = np.full(B, T, np.int32), np.zeros(B, np.int32)
    for i, row in enumerate(rows):
        requests_B[i], padding_B[i], seeds_B[i] = row.request, T - row.length, row.seed
        tokens_BxT[i, padding_B[i] :] = row.tokens
    return Microbatch(requests_B, (tokens_BxT, padding_B, seeds_B))


def _pad_right(rows: Sequence[_Tree], B: int, T: int, asked: int) -> Microbatch:
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
