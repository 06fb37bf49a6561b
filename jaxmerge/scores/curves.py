"""How good the best candidate of a search was by the tokens that the search had taken."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate


def rises(costs: Sequence[int], values: Sequence[float]) -> list[tuple[int, int]]:
    """Where the best so far gets better: the tokens taken by then, and which candidate it is.

    Args:
        costs: tokens of each candidate, in the order of evaluation.
        values: their objective; NaN of those that were not scored on all examples: an estimate may
            be above what is surely better.
    """
    best, found = -math.inf, []
    for i, (took, value) in enumerate(zip(accumulate(costs), values)):
        if value > best:  # NaN is not
            best = value
            found.append((took, i))
    return found
