"""Examples to padded token arrays of a few fixed shapes, and model outputs back to scores.

Rows are sorted by length and cut into microbatches, so that little is spent on padding and each
shape is compiled once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxmerge.errors import JaxmergeError
from jaxmerge.tasks.common import Example, Task
from jaxmerge.tokenizer import Tokenizer


class Microbatch(NamedTuple):
    """B rows that go through a model together.

    Attributes:
        rows_B: which row of the task each is; -1 for rows that only fill up.
        arrays: what the model's program takes besides parameters; each `[B, ...]`.
    """

    rows_B: Int[np.ndarray, " B"]
    arrays: tuple[np.ndarray, np.ndarray]


def encode(
    task: Task, examples: Sequence[Example], tokenizer: Tokenizer, batch_size: int
) -> list[Microbatch]:
    """All rows of a task: one per example for generation, one per choice for multiple choice.

    Generation: `arrays` are prompts `[B, T]` padded on the left, and how much padding `[B]`.
    Multiple choice: prompt and choice `[B, T]` padded on the right, and which tokens are scored
    `[B, T]`: those of the choice.
    """
    if task.kind == "generation":
        prompts = [_tokens(task, example.prompt, tokenizer.prompt) for example in examples]
        return [
            Microbatch(rows, _pad_left([prompts[row] if row >= 0 else [] for row in rows], T))
            for rows, T in _plan([len(prompt) for prompt in prompts], batch_size)
        ]
    pairs = [
        (_tokens(task, example.prompt, tokenizer.prompt), _tokens(task, choice, tokenizer.encode))
        for example in examples
        for choice in example.choices
    ]
    return [
        Microbatch(rows, _pad_right([pairs[row] if row >= 0 else ([], []) for row in rows], T))
        for rows, T in _plan([len(prompt) + len(choice) for prompt, choice in pairs], batch_size)
    ]


def judge_texts(
    task: Task,
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    tokens_CxRxM: Int[np.ndarray, "C R M"],
) -> Float[np.ndarray, "C R"]:
    """Scores of generated tokens, row r being example r.

    Raises:
        JaxmergeError: the task's judge gave something outside [0, 1].
    """
    stop = tokenizer.stops[0]

    def text(row: np.ndarray) -> str:
        ends = np.flatnonzero(row == stop)
        return tokenizer.decode(row[: ends[0] if len(ends) else None].tolist())

    scores = [
        [task.judge(example, text(row)) for example, row in zip(examples, rows)]
        for rows in tokens_CxRxM
    ]
    scores_CxR = np.asarray(scores, np.float32)
    if not ((scores_CxR >= 0) & (scores_CxR <= 1)).all():  # NaN is neither
        raise JaxmergeError(
            "the judge gave a score that is none",
            where=f"task {task.name}",
            expected="a number from 0 to 1",
            found=str(next(s for s in scores_CxR.flat if not 0 <= s <= 1)),
        )
    return scores_CxR


def judge_choices(
    task: Task,
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    log_likelihood_CxR: Float[np.ndarray, "C R"],
) -> Float[np.ndarray, "C N"]:
    """1 where the choice of highest (normalised) log-likelihood is the target, else 0."""
    length = {
        "none": lambda choice: 1,
        "bytes": lambda choice: len(choice.encode()),
        "tokens": lambda choice: len(tokenizer.encode(choice)),
    }[task.normalize]
    scores, row = [], 0
    for example in examples:
        lengths = np.array([length(choice) for choice in example.choices])
        rated = log_likelihood_CxR[:, row : row + len(lengths)] / lengths
        scores.append(np.argmax(rated, axis=1) == example.choices.index(example.target))
        row += len(lengths)
    return np.stack(scores, axis=1).astype(np.float32)


def _tokens(task: Task, text: str, encode: Callable[[str], list[int]]) -> list[int]:
    tokens = encode(text)
    if not tokens:
        raise JaxmergeError(
            "an example has an empty prompt or choice", where=f"task {task.name}", found=repr(text)
        )
    return tokens


def _plan(lengths: Sequence[int], batch_size: int) -> list[tuple[Int[np.ndarray, " B"], int]]:
    """Rows sorted by length and cut into microbatches, each with the length it is padded to."""
    order = np.argsort(lengths, kind="stable")
    filled = np.concatenate([order, np.full(-len(order) % batch_size, -1)])
    return [
        (rows, _padded(max(lengths[row] for row in rows if row >= 0)))
        for rows in filled.reshape(-1, batch_size)
    ]


def _padded(length: int) -> int:
    """The next length that gets a program of its own: at most 1/8 (or 7 tokens) longer."""
    step = max(8, 2 ** math.floor(math.log2(length)) // 8)
    return -(-length // step) * step


def _pad_left(prompts: list[list[int]], T: int) -> tuple[np.ndarray, np.ndarray]:
    tokens_BxT = np.zeros((len(prompts), T), np.int32)
    for row, prompt in zip(tokens_BxT, prompts):
        row[T - len(prompt) :] = prompt
    return tokens_BxT, T - np.array([len(prompt) for prompt in prompts], np.int32)


def _pad_right(
    pairs: list[tuple[list[int], list[int]]], T: int
) -> tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    tokens_BxT = np.zeros((len(pairs), T), np.int32)
    scored_BxT = np.zeros((len(pairs), T), bool)
    for row, marks, (prompt, choice) in zip(tokens_BxT, scored_BxT, pairs):
        end = len(prompt) + len(choice)
        row[:end] = [*prompt, *choice]
        marks[len(prompt) : end] = True
    return tokens_BxT, scored_BxT
