"""The search examples in parts: each generation of a search with a subset is scored on one."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxmerge.errors import JaxmergeError
from jaxmerge.evaluation.evaluator import Evaluator
from jaxmerge.evaluation.remember import Remembering

Places = Mapping[str, Int[np.ndarray, " _"]]  # of each task, which of its examples
Rows = Mapping[str, Float[np.ndarray, "P _"]]  # of each task, scores; NaN where there is none


def check(subset: float, finalists: int) -> None:
    """Raises `JaxmergeError`, which names the field of a config, unless a search can be so.

    Args:
        subset: share of the examples that a generation sees.
        finalists: candidates that are scored on all examples at the end.
    """
    for name, value, right, expected in (
        ("subset", subset, 0 < subset <= 1, "above 0, at most 1"),
        ("finalists", finalists, finalists >= 1, "at least 1"),
    ):
        if not right:
            raise JaxmergeError(
                "out of range", where=f"search.{name}", expected=expected, found=str(value)
            )


class Scored(NamedTuple):
    """What a population was scored on, and what that took."""

    rows: dict[str, Float[np.ndarray, "P _"]]  # per task; NaN where it was not scored
    seconds_P: Float[np.ndarray, " P"]
    read_P: Int[np.ndarray, " P"]  # tokens
    written_P: Int[np.ndarray, " P"]


def deal(individuals: Rows, *, subset: float, seed: int) -> tuple[Places, ...]:
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
        seed: of all draws.
    """
    rng = np.random.default_rng(seed)
    count = min(round(1 / subset), *(rows.shape[1] for rows in individuals.values()))
    dealt = {task: _dealt(rows.mean(axis=0), count, rng) for task, rows in individuals.items()}
    return tuple(
        {task: np.flatnonzero(to_N == part) for task, to_N in dealt.items()}
        for part in range(count)
    )


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
    parts: Sequence[Places],
    weights_PxK: Float[np.ndarray, "P *G K"],
    known: Mapping[str, Float[np.ndarray, "P _"]],
) -> Scored:
    """Scores a population on parts, one after the other.

    Args:
        evaluator: of the split.
        parts: of its examples.
        weights_PxK: of the candidates; equal ones are scored once.
        known: scores that need not be found out again; they are filled in here.
    """
    P, first = len(weights_PxK), dict[bytes, int]()
    same_P = np.array([first.setdefault(row.tobytes(), p) for p, row in enumerate(weights_PxK)])
    rows = {task: np.full_like(scores, np.nan) for task, scores in known.items()}
    took = np.zeros(P), np.zeros(P, np.int64), np.zeros(P, np.int64)
    for places in parts:
        lacking = [p for p in np.unique(same_P).tolist() if _lacks(known, places, p)]
        if lacking:
            _fill(evaluator.part(places), weights_PxK, lacking, places, known, took)
        for task, at in places.items():
            rows[task][:, at] = known[task][np.ix_(same_P, at)]
    return Scored(rows, *took)


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
    """Scores those that lack a part; adds what it takes."""
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
