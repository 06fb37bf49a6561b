"""Candidates times tasks to per-example scores.

A candidate is a vector of merge weights. A step merges `candidates_per_step` of them, asks the
merged models what every task wants to know, and only then waits: tokens and log-likelihoods come
back to the host, where they are judged while the device works on the next step.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from jaxmerge.errors import JaxmergeError, check_choice, check_least
from jaxmerge.evaluation.batches import Limits
from jaxmerge.evaluation.respond import Outputs, Prepared, Responder
from jaxmerge.evaluation.tokenizer import Tokenizer
from jaxmerge.hosts import processes
from jaxmerge.merge.by_method import CombinationMerger
from jaxmerge.merge.differences import QuantisedMerger
from jaxmerge.merge.linear import Merger, ResidentMerger
from jaxmerge.models.model import Model
from jaxmerge.tasks.common import Example, Task
from jaxmerge.tasks.requests import Likely, Request, Response

_LIMITS = Limits()

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


_SHOWN = 3  # examples of each task whose answers are kept for people
_LONGEST = 2000  # characters of a text that is kept

Scores = dict[str, Float[np.ndarray, "P N"]]  # per task: one score per candidate and example


class Shown(NamedTuple):
    """An example as people see it, texts cut to what can be looked at.

    Attributes:
        prompt: what was asked.
        target: what would have been right.
        output: what the model wrote; of likelihoods, each with what it is of, the likeliest first.
        score: the verdict.
    """

    prompt: str
    target: str
    output: str
    score: float


class Sample(NamedTuple):
    """What a candidate said on a task.

    Attributes:
        first: the first examples.
        constant: the text that it wrote most often; "" where it wrote none.
        share: of the examples, that it wrote this for; 0 where it wrote none.
    """

    first: tuple[Shown, ...]
    constant: str = ""
    share: float = 0.0


class Step(NamedTuple):
    """What is known of C candidates that were evaluated together.

    Attributes:
        scores: per task `[C, N]`.
        written_C: tokens that each wrote, on all tasks, up to the ones that ended its texts.
        samples: of each candidate, by task, what it said.
    """

    scores: Scores
    written_C: Int[np.ndarray, " C"]
    samples: tuple[dict[str, Sample], ...] = ()


class Accepted(NamedTuple):
    """Texts that judges gave the greatest score.

    Attributes:
        texts: by task, for each example, those that are not the same, in the order of candidates.
        tokens: that were read and written for it.
    """

    texts: dict[str, list[tuple[str, ...]]]
    tokens: dict[str, int]


class Evaluator:
    """Scores populations of merges on the examples of one split.

    Args:
        merge: the pool's merge of C candidates on `mesh`: `Pool.merge`, or `merger(trees)`.
        model: their architecture.
        tokenizer: text to ids; its vocabulary must fit the model's.
        tasks: what to score on; names are unique.
        split: `search` or `test`.
        mesh: from `sharding.make_mesh`; candidates are spread over `pop`, examples over `data`.
        candidates_per_step: models that are merged together; rounded up to a multiple of `pop`. Up
            to two steps exist at a time, since one is launched before the last is judged.
        limits: what goes through a model at a time.
        vmap_candidates: of a device's candidates, how many run side by side; see `Responder`.

    Raises:
        JaxmergeError: a task has no examples in the split, a prompt is too long, or the
            vocabularies do not fit.
    """

    def __init__(
        self,
        merge: Merger,
        model: Model,
        tokenizer: Tokenizer,
        tasks: Sequence[Task],
        split: str,
        mesh: Mesh,
        *,
        candidates_per_step: int = 1,
        limits: Limits = _LIMITS,
        vmap_candidates: int = 0,
    ):
        pop = mesh.shape["pop"]
        self.candidates_per_step = -(-candidates_per_step // pop) * pop
        self._merge, self._split = merge, split
        self._responder = Responder(model, tokenizer, mesh, limits, vmap_candidates=vmap_candidates)
        self._tasks = [_Asked(task, split, self._responder) for task in tasks]

    @property
    def examples(self) -> dict[str, int]:
        """N, the number of examples of each task."""
        return {asked.task.name: len(asked.examples) for asked in self._tasks}

    @property
    def read(self) -> int:
        """Tokens that each candidate reads: prompts, and what is scored; without padding."""
        return sum(asked.prepared.read for asked in self._tasks)

    def part(self, places: Mapping[str, Int[np.ndarray, " _"]]) -> Evaluator:
        """Scores on some examples alone; what is compiled for the whole split is shared.

        Args:
            places: of each task, which of its examples; a task that has none is left out.
        """
        made, split, responder = copy.copy(self), self._split, self._responder
        made._tasks = [
            _Asked(_only(asked.task, places[asked.task.name], split), split, responder)
            for asked in self._tasks
            if len(places[asked.task.name])
        ]
        return made

    def exact(self) -> Evaluator:
        """Scores merges of the exact checkpoints, where the pool holds them in a few bits."""
        made = copy.copy(self)
        if isinstance(self._merge, QuantisedMerger):
            made._merge = self._merge.exact
        return made

    def __call__(self, weights_PxK: Float[np.ndarray, "P *G K"]) -> Scores:
        """Per-example scores of all candidates, `[P, N]` for each task."""
        steps = [step.scores for step in self.steps(weights_PxK)]
        return {name: np.concatenate([scores[name] for scores in steps]) for name in steps[0]}

    def steps(self, weights_PxK: Float[np.ndarray, "P *G K"]) -> Iterator[Step]:
        """The same, `candidates_per_step` rows at a time, as soon as they are known."""
        waiting = None
        for start in range(0, len(weights_PxK), self.candidates_per_step):
            launched = self._launch(weights_PxK[start : start + self.candidates_per_step])
            if waiting is not None:
                yield self._collect(*waiting)
            waiting = launched
        if waiting is not None:
            yield self._collect(*waiting)

    def accepted(self, weights_PxK: Float[np.ndarray, "P *G K"]) -> Accepted:
        """What candidates wrote to the judges' full content; see `Accepted`."""
        texts = {asked.task.name: [{} for _ in asked.examples] for asked in self._tasks}
        written = 0
        for start in range(0, len(weights_PxK), self.candidates_per_step):
            count, outputs = self._launch(weights_PxK[start : start + self.candidates_per_step])
            for asked, of_task in zip(self._tasks, outputs):
                answers = self._responder.answers(asked.prepared, of_task, count)
                written += int(answers.written_C.sum())
                for known, new in zip(texts[asked.task.name], asked.accepted(answers.responses)):
                    known |= new
        return Accepted(
            {task: [tuple(each) for each in found] for task, found in texts.items()},
            {"read": len(weights_PxK) * self.read, "written": written},
        )

    def ask(
        self, weights_PxK: Float[np.ndarray, "P *G K"], requests: Sequence[Request]
    ) -> list[tuple[Response, ...]]:
        """What each candidate answers to requests of no task."""
        prepared, answered = self._responder.prepare(requests), []
        for start in range(0, len(weights_PxK), self.candidates_per_step):
            weights_CxK = weights_PxK[start : start + self.candidates_per_step]
            (outputs,) = self._asked(weights_CxK, [prepared])
            answered += self._responder.answers(prepared, outputs, len(weights_CxK)).responses
        return answered

    def first_requests(self, count: int) -> list[Request]:
        """The first requests of the tasks, as many of each, at most so many in all."""
        share = -(-count // max(len(self._tasks), 1))
        firsts = [request for asked in self._tasks for request in asked.prepared.requests[:share]]
        return firsts[:count]

    def _launch(self, weights_CxK: np.ndarray) -> tuple[int, list[Outputs]]:
        return len(weights_CxK), self._asked(weights_CxK, [each.prepared for each in self._tasks])

    def _asked(self, weights_CxK: np.ndarray, prepared: Sequence[Prepared]) -> list[Outputs]:
        """What the devices are to find out about candidates of one step."""
        # The last step is filled up with a candidate it has: every step has the same shape.
        filling = np.repeat(weights_CxK[-1:], self.candidates_per_step - len(weights_CxK), axis=0)
        merged = self._merge(np.concatenate([weights_CxK, filling]))
        outputs = [self._responder.launch(each, merged) for each in prepared]
        if isinstance(self._merge, ResidentMerger | CombinationMerger):
            self._merge.give_back(merged)
        return outputs

    def _collect(self, count: int, outputs: list[Outputs]) -> Step:
        scores, written_C = {}, np.zeros(count, np.int64)
        samples: tuple[dict[str, Sample], ...] = tuple({} for _ in range(count))
        for asked, of_task in zip(self._tasks, outputs):
            answers = self._responder.answers(asked.prepared, of_task, count)
            name = asked.task.name
            scores[name] = asked.scores(answers.responses)
            written_C += answers.written_C
            for sample, responses, row in zip(samples, answers.responses, scores[name]):
                sample[name] = asked.sample(responses, row)
        return Step(scores, written_C, samples)


def _as_text(requests: Sequence[Request], responses: Sequence[Response]) -> str:
    """What a model answered to an example, a line for each likelihood, the likeliest first."""
    texts = [response for response in responses if isinstance(response, str)]
    likely = [
        (each.nats, getattr(request, "continuation", ""))
        for request, each in zip(requests, responses)
        if isinstance(each, Likely)
    ]
    lines = [f"{nats:.2f} nats {of}".rstrip() for nats, of in sorted(likely, reverse=True)]
    return "\n".join([*texts, *lines])


def _only(task: Task, places: Int[np.ndarray, " n"], split: str) -> Task:
    """The task with these examples of the split."""
    examples = task.splits[split]
    return dataclasses.replace(task, splits={split: [examples[place] for place in places.tolist()]})


class _Answered(NamedTuple):
    """An example, by number, and what a model answered to its requests."""

    example: int
    responses: tuple[Response, ...]


class _Asked:
    """A task's examples of a split, asked of models and judged; equal answers are judged once."""

    def __init__(self, task: Task, split: str, responder: Responder):
        self.task = task
        self.examples: Sequence[Example] = task.splits.get(split, ())
        if not self.examples:
            raise JaxmergeError(
                f"the {split} split has no examples",
                where=f"task {task.name}",
                expected="some in its builder's data, or another task",
            )
        requests = [task.requests(example) for example in self.examples]
        self._ends = np.cumsum([len(each) for each in requests])
        flat = [request for each in requests for request in each]
        self.prepared: Prepared = responder.prepare(flat, f"task {task.name}")
        self._known: dict[_Answered, float] = {}

    def scores(self, answers: Sequence[tuple[Response, ...]]) -> Float[np.ndarray, "C N"]:
        """Scores of what C models answered.

        Raises:
            JaxmergeError: the judge gave a score outside the task's bounds.
        """
        rows = [self._by_example(responses) for responses in answers]
        known = self._look_up(dict.fromkeys(each for row in rows for each in row))
        return np.array([[known[each] for each in row] for row in rows], np.float32)

    def accepted(self, answers: Sequence[tuple[Response, ...]]) -> list[dict[str, None]]:
        """Of what C models wrote about each example, the texts that have the greatest score.

        Where there are several texts of an example, each is judged as if all were like it.
        """
        rows = [each for responses in answers for each in self._by_example(responses)]
        alike = dict.fromkeys(
            _Answered(each.example, (text,) * len(each.responses))
            for each in rows
            for text in each.responses
            if isinstance(text, str)
        )
        found: list[dict[str, None]] = [{} for _ in self.examples]
        for each, score in self._look_up(alike).items():
            if score >= self.task.bounds[1]:
                found[each.example][str(each.responses[0])] = None
        return found

    def _by_example(self, responses: Sequence[Response]) -> list[_Answered]:
        counts = np.diff(self._ends, prepend=0)
        return [
            _Answered(i, tuple(responses[end - count : end]))
            for i, (end, count) in enumerate(zip(self._ends, counts))
        ]

    def _look_up(self, asked: Mapping[_Answered, object]) -> dict[_Answered, float]:
        """Their scores; what is not known is judged."""
        new = [each for each in asked if each not in self._known]
        self._known |= dict(zip(new, processes.spread(self._judge_all, new).tolist()))
        # Only the last answers are remembered: a population's answers are alike.
        self._known = {each: self._known[each] for each in asked}
        return self._known

    def sample(self, responses: Sequence[Response], scores_N: Float[np.ndarray, " N"]) -> Sample:
        """What a model said, for people to see.

        Args:
            responses: of the model, to all requests.
            scores_N: what they were found to be worth.
        """
        first, start = [], 0
        for example, end, score in zip(self.examples, self._ends[:_SHOWN].tolist(), scores_N):
            requests = self.prepared.requests[start:end]
            output = _as_text(requests, responses[start:end])
            asked, target, said = (t[:_LONGEST] for t in (example.prompt, example.target, output))
            first.append(Shown(asked, target, said, float(score)))
            start = end
        written = Counter(response for response in responses if isinstance(response, str))
        if not written:
            return Sample(tuple(first))
        constant, count = written.most_common(1)[0]
        return Sample(tuple(first), constant[:_LONGEST], count / written.total())

    def _judge_all(self, answered: Sequence[_Answered]) -> list[float]:
        if self.task.judge_threads <= 1:
            return list(map(self._judge, answered))
        with ThreadPoolExecutor(self.task.judge_threads) as threads:
            return list(threads.map(self._judge, answered))

    def _judge(self, answered: _Answered) -> float:
        score = self.task.judge(self.examples[answered.example], answered.responses)
        low, high = self.task.bounds
        if not (low <= score <= high and math.isfinite(score)):
            raise JaxmergeError(
                "the judge gave a score that is none",
                where=f"task {self.task.name}",
                expected=f"a number from {low:g} to {high:g}",
                found=str(score),
            )
        return score
