"""The usual kinds of tasks: generation, multiple choice and perplexity."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from jaxmerge.errors import JaxmergeError
from jaxmerge.tasks import judges
from jaxmerge.tasks.common import Example, Soft, Task
from jaxmerge.tasks.requests import (
    Generate,
    Likelihood,
    Likely,
    Prompt,
    Request,
    Response,
    Rolling,
    Sampling,
)

TextJudge = Callable[[Example, str], float]  # (example, text the model wrote) -> score in [0, 1]
Splits = Mapping[str, Sequence[Example]]
Form = Literal["", "chat", "text", "bare"]


def exact(example: Example, output: str) -> float:
    """1 when the output is the target, white space at the ends aside."""
    return float(judges.exact(output, example.target))


def generation(
    name: str,
    splits: Splits,
    judge: TextJudge = exact,
    *,
    max_new_tokens: int = 32,
    until: Sequence[str] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    samples: int = 1,
    seed: int = 0,
    form: Form = "",
    shots: int = 0,
    judge_threads: int = 1,
) -> Task:
    """A model writes, and a judge scores the text.

    Args:
        name: of the task.
        splits: examples by split.
        judge: scores a text.
        max_new_tokens: tokens that may be written.
        until: texts that end it.
        temperature: 0 is greedy; see `requests.Sampling`.
        top_p: see `requests.Sampling`.
        samples: texts for each example, whose scores are averaged.
        seed: of the sampling.
        form: see `requests.Prompt`.
        shots: examples of the train split that are put, with answers, before each question.
        judge_threads: see `Task`.

    Raises:
        JaxmergeError: the train split has fewer examples than `shots`.
    """
    before = _shots(name, splits, shots)

    def requests(example: Example) -> list[Request]:
        prompt = Prompt(example.prompt, before, form)
        if not temperature:
            return [Generate(prompt, max_new_tokens, tuple(until))] * samples
        first = zlib.crc32(example.prompt.encode(), seed)
        drawn = [Sampling(temperature, top_p, (first + i) % 2**31) for i in range(samples)]
        return [Generate(prompt, max_new_tokens, tuple(until), each) for each in drawn]

    def mean(example: Example, responses: Sequence[Response]) -> float:
        return sum(judge(example, str(text)) for text in responses) / len(responses)

    def soft(example: Example) -> Soft | None:
        """The target with its end, where that is a text that the judge takes for right."""
        target, endings = example.target, [text for text in until if text]
        if not target or judge(example, target) < 1 or any(text in target for text in endings):
            return None
        ending = next(iter(endings), "")
        prompt = Prompt(example.prompt, before, form)
        return Soft("answer", (Likelihood(prompt, example.target + ending, ended=not ending),))

    return Task(name, splits, requests, mean, judge_threads=judge_threads, soft=soft)


def multiple_choice(
    name: str,
    splits: Splits,
    *,
    normalize: Literal["none", "bytes", "tokens"] = "none",
    ended: bool = False,
    form: Form = "",
    shots: int = 0,
) -> Task:
    """The choice of highest log-likelihood is compared with the target: 1 or 0.

    Args:
        name: of the task.
        splits: examples by split, with `choices`.
        normalize: divide a choice's log-likelihood by its `bytes` or `tokens`, or by nothing.
        ended: whether the end of the text is scored as part of each choice; without it, a choice
            that another one begins with is at least as likely as that.
        form: see `requests.Prompt`.
        shots: examples of the train split that are put, with answers, before each question.

    Raises:
        JaxmergeError: the train split has fewer examples than `shots`.
    """
    before = _shots(name, splits, shots)

    def requests(example: Example) -> list[Likelihood]:
        prompt = Prompt(example.prompt, before, form)
        return [Likelihood(prompt, choice, ended) for choice in example.choices]

    def judge(example: Example, responses: Sequence[Response]) -> float:
        rated = [
            likely.nats / _length(choice, likely.tokens, normalize)
            for choice, likely in zip(example.choices, responses)
            if isinstance(likely, Likely)
        ]
        return float(rated.index(max(rated)) == example.choices.index(example.target))

    def soft(example: Example) -> Soft:
        # A length in tokens is known where the choices are tokenised; see `evaluation.soft`.
        lengths = [float(_length(choice, 0, normalize)) for choice in example.choices]
        right = example.choices.index(example.target)
        return Soft("choice", tuple(requests(example)), (right,), tuple(lengths))

    return Task(name, splits, requests, judge, soft=soft)


def perplexity(name: str, splits: Splits) -> Task:
    """How well a model predicts texts: the score is minus their bits per byte.

    -sum_i nats_i / (ln 2 sum_i bytes_i) over the examples of a split is the mean of the scores; so
    that of one example is -nats / (ln 2 x mean bytes). Tokenizers can be compared by it.

    Args:
        name: of the task.
        splits: examples by split, whose `prompt` is the text.
    """

    def sized(examples: Sequence[Example]) -> tuple[Example, ...]:
        mean = sum(len(example.prompt.encode()) for example in examples) / max(len(examples), 1)
        return tuple(dataclasses.replace(example, data=mean) for example in examples)

    def requests(example: Example) -> list[Rolling]:
        return [Rolling(example.prompt)]

    def judge(example: Example, responses: Sequence[Response]) -> float:
        (likely,) = responses
        assert isinstance(likely, Likely)
        return likely.nats / (math.log(2) * example.data)

    def soft(example: Example) -> Soft:
        return Soft("text", tuple(requests(example)), lengths=(math.log(2) * example.data,))

    splits = {split: sized(examples) for split, examples in splits.items()}
    return Task(name, splits, requests, judge, bounds=(-math.inf, 0.0), soft=soft)


def _shots(name: str, splits: Splits, count: int) -> tuple[tuple[str, str], ...]:
    train = splits.get("train", ())
    if len(train) < count:
        raise JaxmergeError(
            "the train split has too few examples",
            where=f"task {name}, shots",
            expected=f"at most {len(train)}",
            found=str(count),
        )
    return tuple((shot.prompt, shot.target) for shot in train[:count])


def _length(choice: str, tokens: int, normalize: str) -> int:
    return {"none": 1, "bytes": len(choice.encode()), "tokens": tokens}[normalize]
