"""The search examples in slices: what a generation is scored on, one slice after the other."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxmerge.evaluation.evaluator import Evaluator
from jaxmerge.evaluation.remember import Remembering
from jaxmerge.hosts import processes

Places = Mapping[str, Int[np.ndarray, " _"]]  # of each task, which of its examples
Rows = Mapping[str, Float[np.ndarray, "P _"]]  # of each task, scores; NaN where there is none

# Shares of a generation's examples that a race has scored when it looks who can still be selected.
# A slice merges its candidates again, so there are few.
_LOOKS = (1 / 4, 1 / 2)
_LEAST = 16  # examples of each task before a look: a bootstrap of fewer knows too little

# Of those that are left, from their scores so far and the share of all examples that these are:
# which go on.
Keep = Callable[[Rows, float], Bool[np.ndarray, " P"]]


class Slices(NamedTuple):
    """A partition of the search examples into parts, and of these into slices.

    Attributes:
        places: of each slice; those of a part follow each other.
        parts: each generation sees one, in turn.
    """

    places: tuple[Places, ...]
    parts: int

    def of_generation(self, generation: int) -> range:
        """The slices of the part that is its turn."""
        each = len(self.places) // self.parts
        first = generation % self.parts * each
        return range(first, first + each)

    def examples(self, chosen: Sequence[int]) -> Places:
        """The examples of some slices."""
        tasks = self.places[0]
        return {task: np.concatenate([self.places[i][task] for i in chosen]) for task in tasks}


class Scored(NamedTuple):
    """What a population was scored on, and what that took."""

    rows: dict[str, Float[np.ndarray, "P _"]]  # per task; NaN where it was not scored
    dropped_P: Bool[np.ndarray, " P"]
    seconds_P: Float[np.ndarray, " P"]
    read_P: Int[np.ndarray, " P"]  # tokens
    written_P: Int[np.ndarray, " P"]


def slices(individuals: Rows, *, subset: float, racing: bool, seed: int) -> Slices:
    """Deals the search examples out to parts that are alike.

    The examples of a task are put in the order of the single checkpoints' mean score, equal ones
    at random, and each run of R examples is dealt to the R parts at random. So each part is a
    sample stratified by difficulty, with proportional allocation (Cochran, Sampling Techniques,
    1977, chapter 5): it has easy and hard examples in their shares, also those on which all
    checkpoints agree, and the mean over a part is an unbiased estimate of the mean over all,
    whatever the model.

    Args:
        individuals: scores of the single checkpoints on all search examples, `[K, N]` per task.
        subset: share of the examples that a generation sees; there are R = round(1 / subset)
            parts, but no more than the smallest task has examples.
        racing: whether a part is cut into slices of a race, at random. It is one slice else, and
            where it has too few examples to drop anything before all are scored.
        seed: of all draws.
    """
    rng = np.random.default_rng(seed)
    parts = min(round(1 / subset), *(rows.shape[1] for rows in individuals.values()))
    dealt = {task: _dealt(rows.mean(axis=0), parts, rng) for task, rows in individuals.items()}
    fewest = min(rows.shape[1] for rows in individuals.values()) // parts
    looks = [look for look in _LOOKS if racing and look * fewest >= _LEAST]
    ends = [0.0, *looks, 1.0]
    places: list[Places] = []
    for part in range(parts):
        mixed = {
            task: rng.permutation(np.flatnonzero(to_N == part)) for task, to_N in dealt.items()
        }
        places += [
            {
                task: np.sort(at[math.ceil(start * len(at)) : math.ceil(end * len(at))])
                for task, at in mixed.items()
            }
            for start, end in pairwise(ends)
        ]
    return Slices(tuple(places), parts)


def _dealt(
    ease_N: Float[np.ndarray, " N"], parts: int, rng: np.random.Generator
) -> Int[np.ndarray, " N"]:
    """The part of each example."""
    mixed_N = rng.permutation(len(ease_N))
    order_N = mixed_N[np.argsort(ease_N[mixed_N], kind="stable")]
    runs = math.ceil(len(ease_N) / parts)
    to_N = np.empty(len(ease_N), np.int64)
    to_N[order_N] = np.concatenate([rng.permutation(parts) for _ in range(runs)])[: len(ease_N)]
    return to_N


def score(
    evaluator: Evaluator | Remembering,
    slices: Slices,
    chosen: Sequence[int],
    weights_PxK: Float[np.ndarray, "P *G K"],
    known: Mapping[str, Float[np.ndarray, "P _"]],
    keep: Keep | None,
) -> Scored:
    """Scores a population on slices, one after the other.

    Args:
        evaluator: of the split.
        slices: of its examples.
        chosen: which of them, in this order.
        weights_PxK: of the candidates; equal ones are scored once.
        known: scores that need not be found out again; they are filled in here.
        keep: which candidates go on to the next slice; None: all do.
    """
    P, first = len(weights_PxK), dict[bytes, int]()
    same_P = np.array([first.setdefault(row.tobytes(), p) for p, row in enumerate(weights_PxK)])
    rows = {task: np.full_like(scores, np.nan) for task, scores in known.items()}
    left_P, took = np.ones(P, bool), (np.zeros(P), np.zeros(P, np.int64), np.zeros(P, np.int64))
    total = {task: len(at) for task, at in slices.examples(chosen).items()}
    for number, i in enumerate(chosen, 1):
        places = slices.places[i]
        lacking = [p for p in np.unique(same_P[left_P]).tolist() if _lacks(known, places, p)]
        if lacking:
            _fill(evaluator.part(places), weights_PxK, lacking, places, known, took)
        for task, at in places.items():
            rows[task][np.ix_(left_P, at)] = known[task][np.ix_(same_P[left_P], at)]
        if keep and number < len(chosen):
            seen = slices.examples(chosen[:number])
            kept = keep(
                {task: rows[task][np.ix_(left_P, at)] for task, at in seen.items()},
                min(len(at) / total[task] for task, at in seen.items()),
            )
            processes.agree(f"the race after slice {i}", kept.tobytes())
            left_P[left_P] = kept
    return Scored(rows, ~left_P, *took)


def _lacks(known: Mapping[str, np.ndarray], places: Places, p: int) -> bool:
    return any(np.isnan(known[task][p, at]).any() for task, at in places.items())


def _fill(
    part: Evaluator | Remembering,
    weights_PxK: Float[np.ndarray, "P *G K"],
    lacking: Sequence[int],
    places: Places,
    known: Mapping[str, np.ndarray],
    took: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    """Scores those that lack a slice; adds what it takes."""
    seconds_P, read_P, written_P = took
    done, started = 0, time.perf_counter()
    for step in part.steps(weights_PxK[list(lacking)]):
        now = time.perf_counter()
        these = np.array(lacking[done : done + len(step.written_C)])
        for task, scores_CxN in step.scores.items():
            known[task][np.ix_(these, places[task])] = scores_CxN
        seconds_P[these] += (now - started) / len(these)
        read_P[these] += part.read
        written_P[these] += step.written_C
        done, started = done + len(these), now
