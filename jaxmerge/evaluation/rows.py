"""Requests to rows of tokens: a prompt to go on from, or a prompt and what is scored after it.

Continuations of the same prompt share a row, as branches of it, so that a model reads the question
of a multiple choice once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxmerge.errors import JaxmergeError, check_text
from jaxmerge.evaluation.tokenizer import Tokenizer
from jaxmerge.tasks.requests import Generate, Likelihood, Prompt, Rolling

# Branches of a row have at most so many times the tokens of its trunk. Each branch spares reading
# the trunk again, and lengthens what attention masks out for all others.
_BRANCHING = 8


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


class Prompted(NamedTuple):
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


class Row(NamedTuple):
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


def rows_of(
    requests: Mapping[int, Likelihood | Rolling],
    tokenizer: Tokenizer,
    limits: Limits,
    where: str = "",
    *,
    branching: bool = True,
) -> list[Row]:
    """Requests, by their places, as rows of tokens; continuations of a prompt share one.

    Raises:
        JaxmergeError: as `encode`.
    """
    rows: list[Row] = []
    growing: dict[tuple[int, ...], Row] = {}  # the last one of each trunk
    for place, request in requests.items():
        if isinstance(request, Rolling):
            pairs = _windows(request, tokenizer, limits, where)
        else:
            pairs = [_pair(request, tokenizer, limits, where)]
        for trunk, tokens in pairs:
            branch, row = _Branch(place, tokens), growing.get(tuple(trunk))
            if branching and row and row.has_room(branch, limits):
                row.branches.append(branch)
                continue
            growing[tuple(trunk)] = Row(trunk, [branch])
            rows.append(growing[tuple(trunk)])
    return rows


def prompted(
    place: int, request: Generate, tokenizer: Tokenizer, limits: Limits, where: str
) -> Prompted:
    _check_prompt(request.prompt, where)
    read = tokenizer.prompt(request.prompt)
    _check(read, request.prompt.text, where)
    read = _fitted(read, limits.context - request.max_new_tokens, limits, where)
    return Prompted(place, read, request.sampling.seed if request.sampling else 0)


_Pair = tuple[list[int], list[int]]  # what is read before, and what is scored after it


def _pair(request: Likelihood, tokenizer: Tokenizer, limits: Limits, where: str) -> _Pair:
    _check_prompt(request.prompt, where)
    check_text(where, request.continuation)
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
    check_text(where, request.text)
    tokens = tokenizer.prompt(Prompt(request.text, form=request.form))
    _check(tokens, request.text, where)
    width = limits.context or len(tokens)
    pairs = [([tokenizer.prefix], tokens[:width])]
    for start in range(width, len(tokens), width):
        stop = min(start + width, len(tokens))
        # The last window is as wide as the others, and scores what they have not.
        pairs.append((tokens[stop - width - 1 : start], tokens[start:stop]))
    return pairs


def _check_prompt(prompt: Prompt, where: str) -> None:
    check_text(where, prompt.text, *(text for shot in prompt.shots for text in shot))


def _check(tokens: Sequence[int], text: str, where: str) -> None:
    if not tokens:
        raise JaxmergeError(
            "a prompt or continuation is empty",
            where=where,
            expected="at least one token of it; examples without any must be left out",
            found=repr(text),
        )


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
