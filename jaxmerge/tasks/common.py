"""What a task is: examples by split, what a model is asked about each, and how it is judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jaxmerge.tasks.requests import Generate, Likelihood, Request, Response, Rolling

SPLITS = ("train", "search", "test")


@dataclasses.dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        prompt: what the model reads.
        target: the answer that the judge compares with; for multiple choice the right choice.
        choices: the options of a multiple choice; empty for generation.
        data: whatever else the task needs to ask or to judge.
    """

    prompt: str
    target: str = ""
    choices: tuple[str, ...] = ()
    data: Any = None


class Soft(NamedTuple):
    """What stands for an example's score where a smooth one is wanted.

    `answer`: the sum of exp(nats) over the requests, the probability of writing one of their
    continuations. `choice`: the softmax of nats / length over the requests, at the right one.
    `text`: nats / length.

    Attributes:
        kind: see above.
        requests: whose likelihoods are asked for.
        right: which of the requests are right; of choices.
        lengths: by which the log-likelihood of each is divided; 0 stands for its tokens.
    """

    kind: Literal["answer", "choice", "text"]
    requests: tuple[Likelihood | Rolling, ...]
    right: tuple[int, ...] = (0,)
    lengths: tuple[float, ...] = (1.0,)


@dataclasses.dataclass(frozen=True)
class Task:
    """A set of questions with disjoint splits. `tasks.kinds` makes the usual ones.

    Attributes:
        name: unique in a run; the key of its scores.
        splits: examples by split name. `search` steers the search, `test` is what is reported,
            `train` is for making checkpoints and few-shot prompts.
        requests: what a model is asked about an example, at least one request.
        judge: from the responses, in the order of the requests, to the example's score; higher is
            better. It must be deterministic: equal responses are judged once.
        bounds: the least and the greatest score that there can be.
        judge_threads: how many examples are judged at a time: 1 for a judge that computes, more for
            one that waits for other programs.
        soft: what stands for an example's score in a search by gradients; None where nothing does
            but texts that the judge has accepted, see `accepting`.
        collect: whether accepted texts stand for the score besides, where `soft` gives an answer.
        warning: what whoever searches over this task should know; "": nothing.
    """

    name: str
    splits: Mapping[str, Sequence[Example]]
    requests: Callable[[Example], Sequence[Request]]
    judge: Callable[[Example, Sequence[Response]], float]
    bounds: tuple[float, float] = (0.0, 1.0)
    judge_threads: int = 1
    soft: Callable[[Example], Soft | None] = lambda example: None
    collect: bool = False
    warning: str = ""


_MOST_TEXTS = 4  # of an example; more say little that is new, and each is read in every step


def wants_texts(task: Task) -> bool:
    """Whether texts that its judge accepts are to stand for the score of a search example."""
    examples = task.splits["search"]
    return any(
        (task.collect or task.soft(example) is None)
        and all(isinstance(request, Generate) for request in task.requests(example))
        for example in examples
    )


def accepting(task: Task, accepted: Sequence[Sequence[str]]) -> Task:
    """The task, with texts that its judge accepted standing for the score.

    Where several texts may end an answer, it is not known which did, and the end is left out.

    Args:
        task: see above.
        accepted: texts for each example of its search split.
    """
    texts = {id(each): found for each, found in zip(task.splits["search"], accepted)}

    def soft(example: Example) -> Soft | None:
        own = task.soft(example)
        if own is not None and not task.collect:
            return own
        (first, *_) = task.requests(example)
        if (own is not None and own.kind != "answer") or not isinstance(first, Generate):
            return own
        ending = first.until[0] if len(first.until) == 1 else ""
        found = [
            Likelihood(first.prompt, text + ending, ended=not first.until)
            for text in texts.get(id(example), ())[:_MOST_TEXTS]
        ]
        requests = (*(own.requests if own else ()), *found)
        return Soft("answer", requests) if requests else None

    return dataclasses.replace(task, soft=soft)
