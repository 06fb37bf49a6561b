"""The search examples in the order in which candidates are scored on them, slice by slice."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxmerge import processes
from jaxmerge.evaluate import Evaluator
from jaxmerge.remember import Remembering
from jaxmerge.search.subset import Subset, informative

Places = Mapping[str, Int[np.ndarray, " _"]]  # of each task, which of its examples
Rows = Mapping[str, Float[np.ndarray, "P _"]]  # of each task, scores; NaN where there is none

# Shares of a generation's examples that a race has scored when it looks who can still be selected.
# A slice merges its candidates again, so there are few.
_LOOKS = (1 / 4, 1 / 2)


# Of those that are left, from their scores so far, the examples' weights, and the share of all
# examples that these are: which go on.
Keep = Callable[[Rows, Mapping[str, Float[np.ndarray, " _"]], float], Bool[np.ndarray, " P"]]


class Slices(NamedTuple):
    """A partition of the search examples; every candidate sees the slices in this order.

    Attributes:
        places: of each slice.
        weights: of each example, how many it stands for in an estimate; `[N]` for each task.
        generation: so many slices are for whole generations; one that comes after these is for the
            final decision.
    """

    places: tuple[Places, ...]
    weights: Mapping[str, Float[np.ndarray, " _"]]
    generation: int

    def up_to(self, count: int) -> Places:
        """The examples of the first `count` slices."""
        return {
            task: np.concatenate([places[task] for places in self.places[:count]])
            for task in self.weights
        }

    def means(self, rows: Rows) -> dict[str, Float[np.ndarray, " P"]]:
        """sum_i u_i s_i / sum_i u_i over the examples that each row has a score of.

        With u the weights; the plain mean where all examples have one.
        """
        return {task: _means(scores_PxN, self.weights[task]) for task, scores_PxN in rows.items()}


class Scored(NamedTuple):
    """What a population was scored on, and what that took."""

    rows: dict[str, Float[np.ndarray, "P _"]]  # per task; NaN where it was not scored
    dropped_P: Bool[np.ndarray, " P"]
    seconds_P: Float[np.ndarray, " P"]
    read_P: Int[np.ndarray, " P"]  # tokens
    written_P: Int[np.ndarray, " P"]


def slices(individuals: Rows, *, subset: float, racing: bool, seed: int) -> Slices:
    """Which examples the search scores, and in which order.

    Args:
        individuals: scores of the single checkpoints on all search examples, `[K, N]` per task.
        subset: share of each task's examples that generations are scored on, at least one of each;
            1: all.
        racing: whether these are slices of a race, drawn at random; else they are one slice.
        seed: of all draws.
    """
    rng = np.random.default_rng(seed)
    chosen = {task: _chosen(scores_KxN, subset, rng) for task, scores_KxN in individuals.items()}
    mixed = {task: rng.permutation(each.places_n) for task, each in chosen.items()}
    ends = [*(_LOOKS if racing else ()), 1.0]
    parts: list[Places] = []
    for start, end in zip([0.0, *ends], ends):
        part = {
            task: np.sort(n[math.ceil(start * len(n)) : math.ceil(end * len(n))])
            for task, n in mixed.items()
        }
        if any(map(len, part.values())):
            parts.append(part)
    rest = {
        task: np.setdiff1d(np.arange(individuals[task].shape[1]), each.places_n)
        for task, each in chosen.items()
    }
    weights = {}
    for task, each in chosen.items():
        weights[task] = np.zeros(individuals[task].shape[1])
        weights[task][each.places_n] = each.weights_n
    return Slices((*parts, *([rest] if any(map(len, rest.values())) else [])), weights, len(parts))


def _chosen(
    scores_KxN: Float[np.ndarray, "K N"], subset: float, rng: np.random.Generator
) -> Subset:
    N = scores_KxN.shape[1]
    size = max(1, round(subset * N))
    return informative(scores_KxN, size, rng) if size < N else Subset(np.arange(N), np.ones(N))


def _means(
    scores_PxN: Float[np.ndarray, "P N"], weights_N: Float[np.ndarray, " N"]
) -> Float[np.ndarray, " P"]:
    known_PxN = np.isfinite(scores_PxN)
    # A row of all examples needs no weights, though some examples have weight 0.
    weights_PxN = np.where(known_PxN.all(axis=1, keepdims=True), 1.0, known_PxN * weights_N)
    total_P = np.where(known_PxN, weights_PxN * scores_PxN, 0.0).sum(axis=1, dtype=np.float64)
    return total_P / weights_PxN.sum(axis=1)


def score(
    evaluator: Evaluator | Remembering,
    slices: Slices,
    count: int,
    weights_PxK: Float[np.ndarray, "P K"],
    known: Mapping[str, Float[np.ndarray, "P _"]],
    keep: Keep | None,
) -> Scored:
    """Scores a population on the first `count` slices, one after the other.

    Args:
        evaluator: of the split.
        slices: of its examples.
        count: of slices.
        weights_PxK: of the candidates; equal ones are scored once.
        known: scores that need not be found out again; they are filled in here.
        keep: which candidates go on to the next slice; None: all do.
    """
    P, all_of = len(weights_PxK), slices.up_to(count)
    first: dict[bytes, int] = {}
    same_P = np.array([first.setdefault(row.tobytes(), p) for p, row in enumerate(weights_PxK)])
    rows = {task: np.full_like(scores, np.nan) for task, scores in known.items()}
    left_P, took = np.ones(P, bool), (np.zeros(P), np.zeros(P, np.int64), np.zeros(P, np.int64))
    for number, places in enumerate(slices.places[:count]):
        lacking = [p for p in np.unique(same_P[left_P]).tolist() if _lacks(known, places, p)]
        if lacking:
            _fill(evaluator.part(places), weights_PxK, lacking, places, known, took)
        for task, at in places.items():
            rows[task][np.ix_(left_P, at)] = known[task][np.ix_(same_P[left_P], at)]
        if keep and number + 1 < count:
            seen = slices.up_to(number + 1)
            kept = keep(
                {task: rows[task][np.ix_(left_P, at)] for task, at in seen.items()},
                {task: slices.weights[task][at] for task, at in seen.items()},
                min(len(seen[task]) / len(all_of[task]) for task in seen),
            )
            processes.agree(f"slice {number}", kept.tobytes())
            left_P[left_P] = kept
    return Scored(rows, ~left_P, *took)


def _lacks(known: Mapping[str, np.ndarray], places: Places, p: int) -> bool:
    return any(np.isnan(known[task][p, at]).any() for task, at in places.items())


def _fill(
    part: Evaluator | Remembering,
    weights_PxK: Float[np.ndarray, "P K"],
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
