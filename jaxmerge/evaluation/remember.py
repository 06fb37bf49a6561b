"""Evaluation that scores no step twice, for runs that follow each other in one process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from jaxmerge.evaluation.evaluator import Accepted, Evaluator, Step
from jaxmerge.tasks.requests import Request, Response

_MOST_BYTES = 2**28  # of scores on the host; a step of 2 candidates on 2,000 examples has 16 kB


class Remembering:
    """An evaluator that answers from memory what it has scored before, bit for bit.

    What is remembered is a step: candidates that were merged and scored together. Only a step that
    is the same in all of its weights is known again, since the compiler may make the last bits of a
    candidate depend on its place and on the candidates beside it.

    Args:
        evaluator: that is asked for what is not known.
        most_bytes: of scores that are kept; what was not asked for the longest is forgotten first.
    """

    def __init__(self, evaluator: Evaluator, most_bytes: int = _MOST_BYTES):
        self._evaluator, self._most, self._bytes = evaluator, most_bytes, 0
        self._known: dict[bytes, Step] = {}  # by the weights of a step; last asked for, last here
        self._parts: dict[bytes, Remembering] = {}

    @property
    def candidates_per_step(self) -> int:
        """As of the evaluator."""
        return self._evaluator.candidates_per_step

    @property
    def examples(self) -> dict[str, int]:
        """As of the evaluator."""
        return self._evaluator.examples

    @property
    def read(self) -> int:
        """As of the evaluator."""
        return self._evaluator.read

    def part(self, places: Mapping[str, Int[np.ndarray, " _"]]) -> Remembering:
        """As of the evaluator; it remembers too, and is the same for the same examples."""
        key = b"".join(np.array([len(each), *each]).tobytes() for each in places.values())
        if key not in self._parts:
            self._parts[key] = Remembering(self._evaluator.part(places), self._most)
        return self._parts[key]

    def exact(self) -> Evaluator:
        """As of the evaluator, and without a memory: it is asked once."""
        return self._evaluator.exact()

    def accepted(self, weights_PxK: Float[np.ndarray, "P *G K"]) -> Accepted:
        """As of the evaluator, and without a memory."""
        return self._evaluator.accepted(weights_PxK)

    def ask(
        self, weights_PxK: Float[np.ndarray, "P *G K"], requests: Sequence[Request]
    ) -> list[tuple[Response, ...]]:
        """As of the evaluator, and without a memory."""
        return self._evaluator.ask(weights_PxK, requests)

    def first_requests(self, count: int) -> list[Request]:
        """As of the evaluator."""
        return self._evaluator.first_requests(count)

    def steps(self, weights_PxK: Float[np.ndarray, "P *G K"]) -> Iterator[Step]:
        """As of the evaluator: `candidates_per_step` rows at a time, as soon as they are known."""
        unknown: list[np.ndarray] = []
        for start in range(0, len(weights_PxK), self.candidates_per_step):
            weights_CxK = weights_PxK[start : start + self.candidates_per_step]
            step = self._recalled(weights_CxK)
            if step is None:
                unknown.append(weights_CxK)
            else:
                yield from self._evaluated(unknown)
                unknown = []
                yield step
        yield from self._evaluated(unknown)

    def _recalled(self, weights_CxK: np.ndarray) -> Step | None:
        step = self._known.pop(weights_CxK.tobytes(), None)
        if step is not None:
            self._known[weights_CxK.tobytes()] = step
        return step

    def _evaluated(self, steps: Sequence[np.ndarray]) -> Iterator[Step]:
        """Steps that follow each other, so that one is launched before the last ends."""
        if not steps:
            return
        for weights_CxK, step in zip(steps, self._evaluator.steps(np.concatenate(steps))):
            self._remember(weights_CxK, step)
            yield step

    def _remember(self, weights_CxK: np.ndarray, step: Step) -> None:
        self._known[weights_CxK.tobytes()] = step
        self._bytes += _size(step)
        while self._bytes > self._most:
            oldest = next(iter(self._known))
            self._bytes -= _size(self._known.pop(oldest))


def _size(step: Step) -> int:
    return step.written_C.nbytes + sum(array.nbytes for array in step.scores.values())
