"""The search examples as a gradient reads them: minibatches of requests, encoded and dealt out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxmerge.evaluation.batches import together
from jaxmerge.evaluation.rows import Limits, Row, rows_of
from jaxmerge.evaluation.tokenizer import Tokenizer
from jaxmerge.tasks.common import Soft, Task


class _Example(NamedTuple):
    """What is asked about an example, as rows of tokens whose requests are numbered from 0."""

    soft: Soft
    rows: list[Row]
    tokens: list[int]  # that are scored of each request

    @property
    def width(self) -> int:
        return max(row.length for row in self.rows)


class Minibatch(NamedTuple):
    """Examples that go through a model in each place of the mesh axis `pop`, R requests there.

    Attributes:
        arrays: of the host, `[pop, ...]`: those of `generate.log_likelihood`; the request of each
            scored token; of each request its example, whether it is right, its length, its tokens.
        examples: of all places.
        read: tokens that are read, without padding.
    """

    arrays: tuple[np.ndarray, ...]
    examples: int
    read: int


class Asked(NamedTuple):
    """A task's examples in minibatches."""

    kind: str
    minibatches: list[Minibatch]
    left_out: int  # examples that have no soft score


def _examples(
    tokenizer: Tokenizer, limits: Limits, branching: bool, task: Task
) -> list[_Example | None]:
    found: list[_Example | None] = []
    for example in task.splits["search"]:
        soft = task.soft(example)
        if soft is None:
            found.append(None)
            continue
        where = f"task {task.name}"
        asked = dict(enumerate(soft.requests))
        rows = rows_of(asked, tokenizer, limits, where, branching=branching)
        tokens = [0] * len(soft.requests)
        for branch in (branch for row in rows for branch in row.branches):
            tokens[branch.request] += len(branch.scored)
        found.append(_Example(soft, rows, tokens))
    return found


def asked(
    task: Task, tokenizer: Tokenizer, limits: Limits, count: int, *, places: int, branching: bool
) -> Asked:
    """A task's search examples in minibatches, those of like length together.

    Args:
        task: whose soft score is wanted.
        tokenizer: text to ids.
        limits: of which the context is heeded.
        count: examples of a minibatch, in all places.
        places: of the mesh axis `pop`.
        branching: whether the model reads what requests have in common once; see `Model.branches`.
    """
    encoded = _examples(tokenizer, limits, branching, task)
    examples = sorted((one for one in encoded if one), key=lambda one: one.width)
    if not examples:
        return Asked("", [], len(encoded))
    cut = [examples[start : start + count] for start in range(0, len(examples), count)]
    size = -(-count // places)  # examples of a place
    R = size * max(len(one.soft.requests) for one in examples)
    B = size * max(len(one.rows) for one in examples)
    minibatches = [_minibatch(each, places, size, R, B) for each in cut]
    return Asked(examples[0].soft.kind, minibatches, len(encoded) - len(examples))


def _minibatch(examples: Sequence[_Example], places: int, size: int, R: int, B: int) -> Minibatch:
    """Examples dealt out to the places of `pop`, each of which has B rows and R requests."""
    widest = [row for one in examples for row in one.rows]
    of_places = [_place(examples[p::places], size, R, B, widest) for p in range(places)]
    arrays = tuple(np.stack(each) for each in zip(*of_places))
    return Minibatch(arrays, len(examples), sum(row.length for row in widest))


def _place(
    examples: Sequence[_Example], size: int, R: int, B: int, widest: Sequence[Row]
) -> tuple[np.ndarray, ...]:
    """The arrays of one place of `pop`; see `Minibatch`."""
    rows: list[Row] = []
    example_R, right_R = np.full(R, size, np.int32), np.zeros(R, np.float32)
    length_R, tokens_R = np.ones(R, np.float32), np.ones(R, np.float32)
    first = 0
    for number, one in enumerate(examples):
        these = slice(first, first + len(one.tokens))
        example_R[these], tokens_R[these] = number, one.tokens
        if one.soft.kind == "answer":
            right_R[these] = 1.0
        else:
            right_R[[first + each for each in one.soft.right]] = 1.0
        lengths = np.broadcast_to(np.array(one.soft.lengths), len(one.tokens))
        length_R[these] = np.where(lengths > 0, lengths, one.tokens)
        for row in one.rows:
            numbered = [branch._replace(request=branch.request + first) for branch in row.branches]
            rows.append(Row(row.trunk, numbered))
        first = these.stop
    # Rows that only fill up are real ones: of a row of padding derivatives need not be numbers.
    filled = together([*rows, *[widest[0]] * (B - len(rows))], widest)
    request_BxQ = np.where(filled.requests < 0, R, filled.requests).astype(np.int32)
    request_BxQ[len(rows) :] = R
    return (*filled.arrays, request_BxQ, example_R, right_R, length_R, tokens_R)
