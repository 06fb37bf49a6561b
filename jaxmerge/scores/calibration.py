"""How a task's soft score stands to its true one: which form of it to climb, and on which line.

What stands for an answer's score is made of its log-likelihood in one of several forms. Where every
model is far from right, the probability of a whole answer is flat, and the others keep a signal.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

# exp(nats), exp(nats / tokens) and nats / tokens of an answer.
FORMS = ("probability", "per_token", "log")

_BETTER = 0.1  # by which another form's rank correlation must be above the first's to be chosen


class Line(NamedTuple):
    """The true score as intercept + slope x soft score.

    Attributes:
        form: of the soft score, a name in `FORMS`.
        spearman: its rank correlation with the true score; NaN where either is the same everywhere.
        slope: above 0.
        intercept: in the unit of the true score.
    """

    form: str
    spearman: float
    slope: float
    intercept: float

    def of(self, soft_F: Float[np.ndarray, " F"]) -> float:
        """The true score to be expected of soft scores in each of `FORMS`."""
        return self.intercept + self.slope * float(soft_F[FORMS.index(self.form)])


def line(soft_NxF: Float[np.ndarray, "N F"], true_N: Float[np.ndarray, " N"]) -> Line:
    """The line of a task, from N merges whose scores are known, the latest last.

    The form is the first whose ranks agree clearly better with the true ones than those before it.
    A probability is a share of right answers, so its slope is 1; that of other forms is the
    regression's, if that rises. The line goes through the latest merge, where the search is.

    Args:
        soft_NxF: in each of `FORMS`.
        true_N: the true scores.
    """
    chosen, spearman = 0, _spearman(soft_NxF[:, 0], true_N)
    for f in range(1, len(FORMS)):
        now = _spearman(soft_NxF[:, f], true_N)
        if now > spearman + _BETTER or (math.isnan(spearman) and not math.isnan(now)):
            chosen, spearman = f, now
    slope, soft_N = 1.0, soft_NxF[:, chosen]
    if chosen and spearman > 0:
        off_N = soft_N - soft_N.mean()
        slope = float(off_N @ true_N / (off_N @ off_N))
    slope = slope if slope > 0 else 1.0
    return Line(FORMS[chosen], spearman, slope, float(true_N[-1] - slope * soft_N[-1]))


def _spearman(soft_N: Float[np.ndarray, " N"], true_N: Float[np.ndarray, " N"]) -> float:
    from scipy.stats import rankdata  # takes a second to import

    if min(len(set(soft_N)), len(set(true_N))) < 2:
        return math.nan
    return float(np.corrcoef(rankdata(soft_N), rankdata(true_N))[0, 1])
