"""Evaluation that remembers: what is in the log is never evaluated again.

A run asks for its candidates in an order that follows from its config and its scores alone. So a
run that was killed simply asks again, from the start: the log answers for as long as it can, and
the evaluator goes on from there. Nor are the same weights scored twice on the same examples: a
candidate with an earlier one's weights gets its scores, at no cost.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxmerge.errors import JaxmergeError
from jaxmerge.evaluation.evaluator import Evaluator, Sample
from jaxmerge.evaluation.remember import Remembering
from jaxmerge.rundir import Candidate, RunDirectory, Weights, as_gene, as_weights
from jaxmerge.scores.objective import Objective
from jaxmerge.search.parts import Places, score

# Weights asked for again may differ in their last bits when the strategy now runs on another kind
# of CPU; the recorded ones, which the scores belong to, stand. Anything more is another run.
_SAME_WEIGHTS = 1e-4


class Request(NamedTuple):
    """A candidate to be evaluated; the fields are those of `Candidate`.

    Tokens and seconds are what it took to ask for it: scoring adds its own.
    """

    origin: str
    name: str
    coefficients: np.ndarray  # weights [K] or [G, K], or rows of `merge.searched`; float32
    generation: int = 0
    tokens: Mapping[str, int] | None = None
    seconds: float = 0.0
    expected: Mapping[str, float] | None = None
    window: Mapping[str, Any] | None = None

    @property
    def key(self) -> Weights:
        """The coefficients as a candidate has them."""
        return as_weights(np.asarray(self.coefficients, np.float32))


class _Group(NamedTuple):
    """Requests from `start` to `stop` that are recorded together.

    Those at `fresh` are a step of the evaluator; the others have the weights of earlier ones.
    """

    start: int
    stop: int
    fresh: list[int]


class _Scored(NamedTuple):
    """What is known of a request; what it took is 0 for a copy."""

    row: Mapping[str, Float[np.ndarray, " _"]]  # per task; NaN where it was not scored
    scores: dict[str, float]
    seconds: float = 0.0
    read: int = 0
    written: int = 0


class Archive:
    """The candidates of a run: evaluated now, or read from its log.

    Args:
        directory: whose log is read and continued.
        evaluators: by split.
        on_candidates: told of every group of candidates, as soon as their scores are known.
        on_samples: told what a request that is evaluated now has said, before that is recorded.
        genes: names of the numbers that a search over a method sets; None: it is over weights.
        checkpoints: K, which tells such rows from weights.
    """

    def __init__(
        self,
        directory: RunDirectory,
        evaluators: Mapping[str, Evaluator | Remembering],
        on_candidates: Callable[[Sequence[Candidate]], None] = lambda candidates: None,
        on_samples: Callable[[Request, Mapping[str, Sample]], None] = lambda asked, samples: None,
        *,
        genes: Sequence[str] | None = None,
        checkpoints: int = 0,
    ):
        self._directory, self._evaluators, self._tell = directory, evaluators, on_candidates
        self._tell_samples = on_samples
        self._genes, self._K = genes, checkpoints
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
        done, groups = self._recorded(split, requests), []
        known = self._known(split)
        if len(done) < len(requests):
            requests = [  # with the weights that recorded scores belong to
                *(
                    asked._replace(coefficients=np.array(one.coefficients, np.float32))
                    for one, asked in zip(done, requests)
                ),
                *requests[len(done) :],
            ]
            groups = _groups(
                [one.key for one in requests], known, self._evaluators[split].candidates_per_step
            )
            # Steps are evaluated whole, so that each has the same candidates.
            groups = [group for group in groups if group.stop > len(done)]
            done = done[: groups[0].start]
            self._directory.cut(self._next + len(done))
        self._next += len(done)
        if done:
            self._tell(done)
        if groups:
            known |= {one.coefficients: one for one in done}
            done += self._evaluate(split, requests, groups, known)
        return done

    def evaluate_parts(
        self, requests: Sequence[Request], parts: Sequence[Places]
    ) -> list[Candidate]:
        """The requests as candidates scored on parts of the search split, in order.

        They are recorded at once: when it is interrupted it starts again.

        Args:
            requests: the candidates.
            parts: of the search examples.

        Raises:
            JaxmergeError: the log holds other candidates here than those asked for.
        """
        done = self._recorded("search", requests)
        if len(done) < len(requests):
            self._directory.cut(self._next)
            return self._evaluate_parts(requests, parts)
        self._next += len(done)
        self._tell(done)
        return done

    def skip(self, origin: str, name: str, count: int) -> None:
        """Passes over recorded candidates of one origin and name without asking for them again."""
        if self.recorded(origin, name) < count:
            raise JaxmergeError(
                f"the log holds fewer than {count} candidates of origin {origin} ({name}) here",
                where=str(self._directory.path / "candidates.jsonl"),
                expected="the log as the run wrote it, or another directory for a new run",
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

    def _recorded(self, split: str, requests: Sequence[Request]) -> list[Candidate]:
        """What the log has of the requests."""
        recorded = self._directory.candidates[self._next : self._next + len(requests)]
        for candidate, request in zip(recorded, requests):
            _check_same(candidate, request, split)
        return recorded

    def _known(self, split: str) -> dict[Weights, Candidate]:
        """By weights, those that were scored on all examples of the split."""
        past = [one for one in self.past if one.split == split]
        return {one.coefficients: one for one in past if one.out_of is None}

    def _evaluate(
        self,
        split: str,
        requests: Sequence[Request],
        groups: Sequence[_Group],
        known: dict[Weights, Candidate],
    ) -> list[Candidate]:
        evaluator, done = self._evaluators[split], []
        fresh = [requests[i].key for group in groups for i in group.fresh]
        steps = evaluator.steps(stacked(fresh)) if fresh else iter(())
        started = time.perf_counter()
        for group in groups:
            new: dict[Weights, _Scored] = {}
            if group.fresh:
                step, now = next(steps), time.perf_counter()
                seconds, started = (now - started) / len(group.fresh), now
                for place, i in enumerate(group.fresh):
                    row = {task: of_task[place] for task, of_task in step.scores.items()}
                    means = {task: _mean(s) for task, s in row.items()}
                    written = int(step.written_C[place])
                    new[requests[i].key] = _Scored(row, means, seconds, evaluator.read, written)
                    if step.samples:
                        self._tell_samples(requests[i], step.samples[place])
            asked, scored = requests[group.start : group.stop], []
            for i, request in enumerate(asked, group.start):
                one = new.get(request.key)
                if one is None:
                    earlier = known[request.key]
                    one = _Scored(self._directory.examples(earlier), earlier.scores)
                scored.append(one if i in group.fresh else _Scored(one.row, one.scores))
            recorded = self._record(split, asked, scored)
            known |= {one.coefficients: one for one in recorded}
            done += recorded
        return done

    def _evaluate_parts(
        self, requests: Sequence[Request], parts: Sequence[Places]
    ) -> list[Candidate]:
        evaluator = self._evaluators["search"]
        known = {
            task: np.full((len(requests), N), np.nan, np.float32)
            for task, N in evaluator.examples.items()
        }
        asked = {request.key for request in requests}
        past = [one for one in self.past if one.split == "search"]
        for earlier in [one for one in past if one.coefficients in asked]:
            same = [p for p, request in enumerate(requests) if request.key == earlier.coefficients]
            for task, row in self._directory.examples(earlier).items():
                known[task][same] = np.where(np.isnan(row), known[task][same], row)
        weights_PxK = stacked([request.key for request in requests])
        found = score(evaluator, parts, weights_PxK, known)
        scored = [
            _Scored(
                {task: scores[p] for task, scores in found.rows.items()},
                {task: _mean(scores[p]) for task, scores in found.rows.items()},
                *(float(found.seconds_P[p]), int(found.read_P[p]), int(found.written_P[p])),
            )
            for p in range(len(requests))
        ]
        return self._record("search", requests, scored)

    def _parts(self, request: Request) -> dict[str, Any]:
        """Weights and genes of a request, as a candidate has them."""
        row = np.array(request.key)
        if self._genes is None or row.shape[-1] == self._K:
            return {"weights": request.key, "genes": None}
        genes = {name: as_gene(row[..., self._K + i]) for i, name in enumerate(self._genes)}
        return {"weights": as_weights(row[..., : self._K]), "genes": genes}

    def _record(
        self, split: str, requests: Sequence[Request], scored: Sequence[_Scored]
    ) -> list[Candidate]:
        """Writes candidates to the log, and tells of them."""
        row = sum(candidate.split == split for candidate in self._directory.candidates)
        candidates = []
        for i, (request, one) in enumerate(zip(requests, scored)):
            out_of = {task: len(s) for task, s in one.row.items()}
            n = {task: int(np.count_nonzero(np.isfinite(s))) for task, s in one.row.items()}
            candidates.append(
                Candidate(
                    id=self._next + i,
                    generation=request.generation,
                    origin=request.origin,
                    name=request.name,
                    split=split,
                    row=row + i,
                    **self._parts(request),
                    scores=one.scores,
                    n=n,
                    seconds=round(request.seconds + one.seconds, 6),
                    tokens=_added({"read": one.read, "written": one.written}, request.tokens),
                    out_of=None if n == out_of else out_of,
                    expected=dict(request.expected) if request.expected else None,
                    window=dict(request.window) if request.window else None,
                )
            )
        tasks = scored[0].row
        rows = {task: np.stack([one.row[task] for one in scored]) for task in tasks}
        self._directory.append(candidates, rows)
        self._next += len(candidates)
        self._tell(candidates)
        return candidates


def best(candidates: Sequence[Candidate], objective: Objective) -> Candidate:
    """The candidate of the highest objective; of equals, the first."""
    return max(candidates, key=lambda candidate: (objective.of(candidate.scores), -candidate.id))


def _groups(keys: Sequence[Weights], known: Mapping[Weights, Any], step: int) -> list[_Group]:
    """Requests of these weights in groups of `step` that have to be evaluated, and their copies."""
    groups, seen = [_Group(0, 0, [])], {*known}
    for i, key in enumerate(keys):
        if key not in seen:
            seen.add(key)
            if len(groups[-1].fresh) == step:
                groups.append(_Group(i, i, []))
            groups[-1].fresh.append(i)
        groups[-1] = groups[-1]._replace(stop=i + 1)
    return groups


def _added(scoring: dict[str, int], asking: Mapping[str, int] | None) -> dict[str, int]:
    """Tokens of both; kinds of which there are none are told of scoring alone."""
    more = {kind: count for kind, count in (asking or {}).items() if count}
    return scoring | {kind: scoring.get(kind, 0) + count for kind, count in more.items()}


def stacked(keys: Sequence[Any]) -> Float[np.ndarray, "P *G K"]:
    """Coefficients of several candidates as one array.

    Where some have rows of groups, all have; weights beside rows of a method are filled up with
    zeros, see `merge.searched`.
    """
    rows = [np.array(key, np.float32) for key in keys]
    width = max(row.shape[-1] for row in rows)
    rows = [np.pad(r, [(0, 0)] * (r.ndim - 1) + [(0, width - r.shape[-1])]) for r in rows]
    shape = max((row.shape for row in rows), key=len)
    return np.stack([np.broadcast_to(row, shape) for row in rows])


def _mean(scores_N: Float[np.ndarray, " N"]) -> float:
    """Of those that there are."""
    return float(np.mean(scores_N[np.isfinite(scores_N)], dtype=np.float64))


def _check_same(candidate: Candidate, request: Request, split: str) -> None:
    asked = (request.origin, request.name, request.generation, split)
    found = (candidate.origin, candidate.name, candidate.generation, candidate.split)
    recorded, wanted = np.array(candidate.coefficients), request.coefficients
    same_weights = recorded.shape == np.shape(wanted) and np.allclose(
        recorded, wanted, rtol=0, atol=_SAME_WEIGHTS
    )
    if asked != found or not same_weights:
        raise JaxmergeError(
            "the log holds another candidate than the one this run asks for here; was the run "
            "directory, the pool or the jaxmerge version changed?",
            where=f"candidates.jsonl, candidate {candidate.id}",
            expected=f"{asked}, weights {np.round(wanted, 4).tolist()}",
            found=f"{found}, weights {np.round(recorded, 4).tolist()}",
        )
