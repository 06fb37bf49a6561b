"""What a task is: examples by split, and how an answer becomes a score in [0, 1]."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

SPLITS = ("train", "search", "test")


@dataclasses.dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        prompt: what the model reads.
        target: the answer that the judge compares with; for multiple choice the right choice.
        choices: the options of a multiple choice; empty for generation.
    """

    prompt: str
    target: str
    choices: tuple[str, ...] = ()


Judge = Callable[[Example, str], float]  # (example, text the model wrote) -> score in [0, 1]


def exact(example: Example, output: str) -> float:
    """1 when the output is the target, white space at the ends aside."""
    return float(output.strip() == example.target.strip())


@dataclasses.dataclass(frozen=True)
class Task:
    """A set of questions with disjoint splits.

    Attributes:
        name: unique in a run; the key of its scores.
        kind: `generation`: the model writes greedily and `judge` scores the text;
            `multiple_choice`: the choice of highest log-likelihood is compared with the target.
        splits: examples by split name. `search` steers the search, `test` is what is reported,
            `train` is for making checkpoints and few-shot prompts.
        judge: scores a generated text.
        max_new_tokens: tokens a generation may have.
        normalize: multiple choice: divide a choice's log-likelihood by its `bytes` or `tokens`, or
            by nothing (`none`).
    """

    name: str
    kind: Literal["generation", "multiple_choice"]
    splits: Mapping[str, Sequence[Example]]
    judge: Judge = exact
    max_new_tokens: int = 32
    normalize: Literal["none", "bytes", "tokens"] = "none"
