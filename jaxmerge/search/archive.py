"""Evaluation that remembers: what is in the log is never evaluated again.

A run asks for its candidates in an order that follows from its config and its scores alone. So a
run that was killed simply asks again, from the start: the log answers for as long as it can, and
the evaluator goes on from there.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxmerge.errors import JaxmergeError
from jaxmerge.evaluate import Evaluator
from jaxmerge.remember import Remembering
from jaxmerge.rundir import Candidate, RunDirectory

# Weights asked for again may differ in their last bits when the strategy now runs on another kind
# of CPU; the recorded ones, which the scores belong to, stand. Anything more is another run.
_SAME_WEIGHTS = 1e-4


class Request(NamedTuple):
    """A candidate to be evaluated; the fields are those of `Candidate`."""

    origin: str
    name: str
    weights: np.ndarray  # [K], float32
    generation: int = 0


class Archive:
    """The candidates of a run: evaluated now, or read from its log.

    Args:
        directory: whose log is read and continued.
        evaluators: by split.
        on_candidates: told of every group of candidates, as soon as their scores are known.
    """

    def __init__(
        self,
        directory: RunDirectory,
        evaluators: Mapping[str, Evaluator | Remembering],
        on_candidates: Callable[[Sequence[Candidate]], None] = lambda candidates: None,
    ):
        self._directory, self._evaluators, self._tell = directory, evaluators, on_candidates
        self._next = 0  # the id of the next candidate to be asked for

    @property
    def past(self) -> list[Candidate]:
        """All candidates asked for so far, in order of id."""
        return self._directory.candidates[: self._next]

    def evaluate(self, split: str, requests: Sequence[Request]) -> list[Candidate]:
        """The requests as evaluated candidates, in order.

        Raises:
            JaxmergeError: the log holds other candidates here than those asked for.
        """
        evaluator = self._evaluators[split]
        recorded = self._directory.candidates[self._next : self._next + len(requests)]
        for candidate, request in zip(recorded, requests):
            _check_same(candidate, request, split)
        known = len(recorded)
        if known < len(requests):  # steps are evaluated whole, so that each has the same candidates
            known -= known % evaluator.candidates_per_step
            self._directory.cut(self._next + known)
        done = recorded[:known]
        self._next += known
        if done:
            self._tell(done)
        rest = requests[known:]
        if rest:
            done += self._evaluate(split, rest, evaluator)
        return done

    def skip(self, origin: str, name: str, count: int) -> None:
        """Passes over recorded candidates of one origin and name without asking for them again."""
        if self.recorded(origin, name) < count:
            raise JaxmergeError(
                f"the log holds fewer than {count} candidates of origin {origin} ({name}) here",
                where=str(self._directory.path / "candidates.jsonl"),
            )
        passed = self._directory.candidates[self._next : self._next + count]
        self._next += count
        if passed:
            self._tell(passed)

    def recorded(self, origin: str, name: str) -> int:
        """How many candidates of an origin and name follow each other in the log from here on."""
        rest = itertools.islice(self._directory.candidates, self._next, None)
        return sum(
            1
            for _ in itertools.takewhile(lambda one: (one.origin, one.name) == (origin, name), rest)
        )

    def _evaluate(
        self, split: str, requests: Sequence[Request], evaluator: Evaluator | Remembering
    ) -> list[Candidate]:
        row = sum(candidate.split == split for candidate in self._directory.candidates)
        weights_PxK = np.stack([request.weights for request in requests]).astype(np.float32)
        done: list[Candidate] = []
        started = time.perf_counter()
        for scores, written_C in evaluator.steps(weights_PxK):
            count = len(written_C)
            now = time.perf_counter()
            candidates = [
                Candidate(
                    id=self._next + i,
                    generation=request.generation,
                    origin=request.origin,
                    name=request.name,
                    split=split,
                    row=row + len(done) + i,
                    weights=tuple(map(float, weights_PxK[len(done) + i])),
                    scores={
                        task: float(np.mean(s[i], dtype=np.float64)) for task, s in scores.items()
                    },
                    n=evaluator.examples,
                    seconds=round((now - started) / count, 6),
                    tokens={"read": evaluator.read, "written": int(written_C[i])},
                )
                for i, request in enumerate(requests[len(done) : len(done) + count])
            ]
            self._directory.append(candidates, scores)
            self._next += count
            done += candidates
            self._tell(candidates)
            started = now
        return done


def _check_same(candidate: Candidate, request: Request, split: str) -> None:
    asked = (request.origin, request.name, request.generation, split)
    found = (candidate.origin, candidate.name, candidate.generation, candidate.split)
    same_weights = len(candidate.weights) == len(request.weights) and np.allclose(
        candidate.weights, request.weights, rtol=0, atol=_SAME_WEIGHTS
    )
    if asked != found or not same_weights:
        raise JaxmergeError(
            "the log holds another candidate than the one this run asks for here; was the run "
            "directory, the pool or the jaxmerge version changed?",
            where=f"candidates.jsonl, candidate {candidate.id}",
            expected=f"{asked}, weights {np.round(request.weights, 4).tolist()}",
            found=f"{found}, weights {np.round(candidate.weights, 4).tolist()}",
        )
