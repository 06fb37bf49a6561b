"""The best so far, by tokens."""

import math

from jaxmerge.scores.curves import rises


def test_only_what_is_better_than_all_before_counts():
    costs, values = [10, 20, 0, 5, 5, 7], [0.3, 0.2, 0.3, math.nan, 0.9, 0.5]
    assert rises(costs, values) == [(10, 0), (40, 4)]


def test_what_was_never_scored_in_full_has_no_curve():
    assert rises([3, 4], [math.nan, math.nan]) == []
