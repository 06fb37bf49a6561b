"""Which form of a soft score is climbed, and what it says of the true score."""

import math

import numpy as np
import pytest

from jaxmerge.scores.calibration import FORMS, line

TRUE = np.array([0.1, 0.5, 0.3, 0.8])


def told(**soft):
    """Soft scores in each form; those that are not named say nothing."""
    return np.stack([soft.get(form, np.zeros(4)) for form in FORMS], axis=1)


def test_probability_is_taken_unless_another_is_clearly_better():
    """Its slope is 1, and the line goes through the last merge."""
    found = line(told(probability=TRUE / 2, per_token=TRUE, log=TRUE), TRUE)
    assert (found.form, found.spearman, found.slope) == ("probability", pytest.approx(1), 1.0)
    assert found.of(told(probability=TRUE / 2)[-1]) == pytest.approx(0.8)
    assert found.of(np.array([0.3, 0, 0])) == pytest.approx(0.7)


def test_where_it_is_flat_another_form_is_scaled_to_the_true_score():
    nats = 5 * TRUE - 7
    found = line(told(log=nats), TRUE)
    assert (found.form, found.slope) == ("log", pytest.approx(0.2))
    np.testing.assert_allclose([found.of(row) for row in told(log=nats)], TRUE)
    found = line(told(probability=-TRUE, per_token=TRUE), TRUE)
    assert found.form == "per_token"


def test_scores_that_are_all_alike_say_nothing():
    found = line(told(probability=TRUE), np.full(4, 0.5))
    assert found.form == "probability"
    assert math.isnan(found.spearman)
    assert found.slope == 1.0
