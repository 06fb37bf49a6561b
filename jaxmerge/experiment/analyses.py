"""What a finished search says of its pool.

They look at the winner after it was tested, and change nothing of what was found. Evaluations that
they need beyond those of the run are of origin `analysis:NAME` in the log, so that a run that was
stopped among them goes on; they count neither as the search's nor as the baselines'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.stats import permutation_test, rankdata

from jaxmerge.rundir import ANALYSIS, Candidate, RunDirectory
from jaxmerge.scores import stats
from jaxmerge.scores.objective import Objective
from jaxmerge.search.archive import Archive, Request, best
from jaxmerge.search.baselines import Found

# Origins of candidates.
LEAVE_ONE_OUT = f"{ANALYSIS}leave-one-out"
POOL_SIZE = f"{ANALYSIS}pool-size"
TRANSFER = f"{ANALYSIS}transfer"

_NONZERO = 0.01  # a weight that is smaller counts as 0; or than a tenth of the uniform weight

Plain = dict[str, Any]  # as it stands in results.json


class Study(NamedTuple):
    """A search that is done, its winner and its rivals tested.

    Attributes:
        archive: evaluates what an analysis needs.
        directory: of the run.
        names: of the checkpoints, in pool order.
        objective: what was maximised.
        individuals: the checkpoints by themselves, on the search split, in pool order.
        winner: what the search found.
        heldout: whether there are held-out tasks.
        search_over: searches over the checkpoints of these numbers alone.
        pool_sizes: numbers of checkpoints to search over; each is less than K.
    """

    archive: Archive
    directory: RunDirectory
    names: Sequence[str]
    objective: Objective
    individuals: Sequence[Candidate]
    winner: Found
    heldout: bool
    search_over: Callable[[Sequence[int]], Found]
    pool_sizes: Sequence[int]


def analyse(study: Study, asked: Sequence[str]) -> Plain:
    """The analyses that are asked for, by name, and how many evaluations they took.

    Args:
        asked: names of `ANALYSES`; they are made in the order of that table.
    """
    made = {name: make(study) for name, make in ANALYSES.items() if name in asked}
    extra = [line.split for line in study.archive.past if line.origin.startswith(ANALYSIS)]
    evaluations = {split: extra.count(split) for split in ("search", "test", "heldout")}
    return {"evaluations": evaluations, **made}


def nonzero(study: Study) -> Plain:
    """The share of checkpoints whose weight in the winner is not about 0.

    |w_k| > min(0.01, 0.1 / K) counts: with many checkpoints the uniform weight itself is small.
    Where groups of leaves have weights of their own, w_k is their mean.
    """
    threshold = min(_NONZERO, 0.1 / len(study.names))
    weights = study.winner.candidate.by_checkpoint
    used = [name for name, weight in zip(study.names, weights) if abs(weight) > threshold]
    return {
        "threshold": threshold,
        "share": len(used) / len(study.names),
        "checkpoints": used,
    }


def weight_vs_score(study: Study) -> Plain:
    """Spearman's rank correlation of the winner's weights with the checkpoints' own objective.

    The objective is that of each checkpoint by itself on the search split. The p-value is that of
    the two-sided permutation test, exact up to 7 checkpoints, else of 9,999 random pairings. Both
    are None where they say nothing: of two checkpoints, or where weights or scores are all alike.
    """
    own = [study.objective.of(one.scores) for one in study.individuals]
    weights = study.winner.candidate.by_checkpoint
    weights_K, own_K = (rankdata(each) - (len(each) + 1) / 2 for each in (weights, own))
    size = np.sqrt((weights_K**2).sum() * (own_K**2).sum())
    if len(own) < 3 or not size:
        return {"spearman": None, "p": None}
    tested = permutation_test(
        (weights_K,),
        lambda ranks, axis: np.sum(ranks * own_K, axis=axis) / size,
        permutation_type="pairings",
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return {"spearman": float(tested.statistic), "p": float(tested.pvalue)}


def leave_one_out(study: Study) -> list[Plain]:
    """The winner without each of its checkpoints, on the test split; other numbers stay.

    w'_k = w_k sum_j w_j / sum_(j != dropped) w_j: the others keep their proportions, and all have
    the sum of before, in each group of leaves that has weights of its own. Left out are checkpoints
    of weight 0, where nothing changes, and those without which the others' sum is 0 or of the other
    sign, where no scale brings it back.
    """
    K = len(study.names)
    winning = np.array(study.winner.candidate.coefficients)
    weights_K, genes = winning[..., :K], winning[..., K:]
    used = np.flatnonzero(np.any(weights_K.reshape(-1, K) != 0, axis=0))
    others = {k: _without(weights_K, k) for k in used.tolist()}
    rows = {
        k: np.concatenate([row, genes], axis=-1) for k, row in others.items() if row is not None
    }
    dropped = [*rows]
    requests = [_request(LEAVE_ONE_OUT, study.names[k], rows[k]) for k in dropped]
    (winner,) = _evaluated(study, "test", [_request(LEAVE_ONE_OUT, "winner", winning)])
    whole = study.directory.examples(winner)
    entries = []
    for k, candidate in zip(dropped, _evaluated(study, "test", requests)):
        without = study.directory.examples(candidate)
        compared = stats.paired(without, whole, study.objective)
        entries.append(
            {
                "dropped": study.names[k],
                "id": candidate.id,
                "weights": _named(study, candidate),
                "test": candidate.scores,
                "test_objective": study.objective.of(candidate.scores),
                "delta": compared.delta,
                "ci95": [compared.low, compared.high],
            }
        )
    return entries


def pool_size(study: Study) -> list[Plain]:
    """What a search over the best m checkpoints finds, for each m; at last, over all of them.

    Best by their own objective on the search split. The searches are those of the run with fewer
    dimensions.
    """
    own = [study.objective.of(one.scores) for one in study.individuals]
    order = sorted(range(len(own)), key=lambda k: -own[k])
    sizes = [*sorted(study.pool_sizes), len(order)]
    found = [*(study.search_over(order[:m]) for m in sizes[:-1]), study.winner]
    requests = [_request(POOL_SIZE, each.name, each.candidate.coefficients) for each in found]
    return [
        {
            "m": m,
            "checkpoints": [study.names[k] for k in order[:m]],
            "evaluations": each.evaluations,
            "tokens": each.tokens,
            "id": each.candidate.id,
            "weights": _named(study, each.candidate),
            "search_objective": study.objective.of(each.candidate.scores),
            "test": tested.scores,
            "test_objective": study.objective.of(tested.scores),
            "ci95": list(stats.interval(study.directory.examples(tested), study.objective)),
        }
        for m, each, tested in zip(sizes, found, _evaluated(study, "test", requests))
    ]


def transfer(study: Study) -> list[Plain]:
    """For each pair of tasks, the merge that is best for these two, and its scores on all tasks.

    Best by the run's objective over the two tasks alone, on the search split, of all candidates
    that the run evaluated there, checkpoints and baselines too. They come from a search for all
    tasks, so one for the two alone may find better. The scores are on test examples, held-out tasks
    too.
    """
    scored = [
        line
        for line in study.archive.past
        if line.split == "search" and not line.origin.startswith(ANALYSIS) and not line.out_of
    ]
    pairs = list(combinations(study.objective.tasks, 2))
    chosen = [best(scored, study.objective.over(pair)) for pair in pairs]
    requests = [
        _request(TRANSFER, "+".join(pair), candidate.coefficients)
        for pair, candidate in zip(pairs, chosen)
    ]
    tested = [dict(candidate.scores) for candidate in _evaluated(study, "test", requests)]
    if study.heldout:
        unseen = _evaluated(study, "heldout", requests)
        tested = [{**seen, **more.scores} for seen, more in zip(tested, unseen)]
    return [
        {
            "tasks": list(pair),
            "id": candidate.id,
            "weights": _named(study, candidate),
            "test": scores,
        }
        for pair, candidate, scores in zip(pairs, chosen, tested)
    ]


# By the name in results.json. A name with evaluations of its own is asked for in `config.analyses`.
ANALYSES: dict[str, Callable[[Study], Any]] = {
    "nonzero": nonzero,
    "weight_vs_score": weight_vs_score,
    "leave_one_out": leave_one_out,
    "pool_size": pool_size,
    "transfer": transfer,
}


def _without(
    weights_K: Float[np.ndarray, "*G K"], dropped: int
) -> Float[np.ndarray, "*G K"] | None:
    rest_K = weights_K.copy()
    rest_K[..., dropped] = 0.0
    total, remains = (each.sum(axis=-1, keepdims=True) for each in (weights_K, rest_K))
    return rest_K * (total / remains) if np.all(total * remains > 0) else None


def _request(origin: str, name: str, coefficients: Any) -> Request:
    return Request(origin, name, np.asarray(coefficients, np.float32))


def _evaluated(study: Study, split: str, requests: Sequence[Request]) -> list[Candidate]:
    """The requests as evaluated candidates; what the run has scored there, not again."""
    scored = {line.coefficients: line for line in study.archive.past if line.split == split}
    keys = [request.key for request in requests]
    new = {key: request for key, request in zip(keys, requests) if key not in scored}
    scored |= dict(zip(new, study.archive.evaluate(split, list(new.values()))))
    return [scored[key] for key in keys]


def _named(study: Study, candidate: Candidate) -> dict[str, float]:
    return dict(zip(study.names, candidate.by_checkpoint))
