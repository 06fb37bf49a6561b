"""Racing: which candidates of a generation can't be among the selected any more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from jaxmerge.errors import JaxmergeError
from jaxmerge.scores import stats
from jaxmerge.scores.objective import Objective
from jaxmerge.search.strategies import BY_RANK

_DRAWS = 20  # bootstrap samples beyond the end of an interval, at least


def check(subset: float, racing: float, finalists: int, strategy: str) -> None:
    """Raises `JaxmergeError`, which names the field of a config, unless a search can be so.

    Args:
        subset: share of the examples that a generation sees.
        racing: confidence of a race; 0: there is none.
        finalists: candidates that are scored on all examples at the end.
        strategy: its name.
    """
    for name, value, right, expected in (
        ("subset", subset, 0 < subset <= 1, "above 0, at most 1"),
        ("racing", racing, 0 <= racing < 1, "at least 0, below 1"),
        ("finalists", finalists, finalists >= 1, "at least 1"),
    ):
        if not right:
            raise JaxmergeError(
                "out of range", where=f"search.{name}", expected=expected, found=str(value)
            )
    if racing and strategy not in BY_RANK:
        raise JaxmergeError(
            "a race needs a strategy that moves by the ranks of the better half of a generation",
            where="search.racing",
            expected=f"0, or search.strategy one of {', '.join(BY_RANK)}",
            found=strategy,
        )


class Race(NamedTuple):
    """The test that drops candidates, after Maron & Moore (Hoeffding races, NIPS 1993).

    Birattari et al. (GECCO 2002) made the comparisons paired, on the same examples for all; in
    CMA-ES it is Heidrich-Meisner & Igel's (ICML 2009), who bound means where this has a bootstrap.

    Of the candidates that are left, let b be the one on the boundary: the mu-th best by its
    estimate so far. A candidate is dropped when the objective of b is higher than its own with
    confidence 1 - alpha / (P L), for a generation of P candidates and L looks: by Bonferroni, one
    that belongs above b is dropped in at most a share alpha of all generations. The interval is
    the bootstrap's for the difference on the same examples (`stats.paired`), narrowed by
    sqrt(1 - n/N): n of the N examples of the race are scored, and when all are nothing is unsure.
    The selected go on to the end: how they rank among themselves matters, and so does which of them
    may be the winner.

    Attributes:
        objective: what candidates are ranked by.
        selected: mu, how many of a generation the strategy selects.
        confidence: 1 - alpha, for a whole generation.
        tests: P L.
        seed: of the bootstrap.
    """

    objective: Objective
    selected: int
    confidence: float
    tests: int
    seed: int = 0

    def kept(
        self, rows: Mapping[str, Float[np.ndarray, "A _"]], share: float
    ) -> Bool[np.ndarray, " A"]:
        """Which of the A candidates that are left go on.

        Args:
            rows: per task, their scores on the examples that they have been scored on.
            share: n/N; the least of all tasks.
        """
        value_A = self.objective({task: scores.mean(axis=1) for task, scores in rows.items()})
        order = np.argsort(-value_A, kind="stable").tolist()
        kept_A = np.ones(len(value_A), bool)
        for i in order[self.selected :]:
            kept_A[i] = not self._beaten(rows, order[self.selected - 1], i, share)
        return kept_A

    def _beaten(self, rows: Mapping[str, np.ndarray], boundary: int, i: int, share: float) -> bool:
        alpha = (1 - self.confidence) / self.tests
        of_boundary, own = ({task: row[k] for task, row in rows.items()} for k in (boundary, i))
        compared = stats.paired(
            of_boundary,
            own,
            self.objective,
            confidence=1 - 2 * alpha,  # one end of it is looked at
            resamples=int(np.ceil(_DRAWS / alpha)),
            seed=self.seed,
        )
        return bool(compared.delta > (compared.delta - compared.low) * np.sqrt(1 - share))
