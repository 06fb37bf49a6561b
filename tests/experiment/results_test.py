"""The table at the end of a run, and the front, for scores of every kind."""

import numpy as np
import pytest

from jaxmerge.experiment import results
from jaxmerge.rundir import Candidate
from jaxmerge.scores.objective import define

TASKS = ["sums", "text"]


def _entry(name: str, sums: float, text: float, objective: float) -> dict:
    return {
        "name": name,
        "test": {"sums": sums, "text": text},
        "test_objective": objective,
        "ci95": {"objective": [objective - 0.1, objective + 0.1]},
        "heldout": {"unseen": 0.25} if name != "worse" else {},
    }


def _findings(aggregate: str, text_bounds: list[float | None]) -> dict:
    versus = {"delta": 0.125, "ci95": [-0.05, 0.3], "p": 0.04}
    return {
        "tasks": TASKS,
        "heldout_tasks": ["unseen"],
        "objective": define(TASKS, (), aggregate).plain(),
        "bounds": {"sums": [0.0, 1.0], "text": text_bounds, "unseen": [0.0, 1.0]},
        "individuals": [_entry("good", 0.5, -1.25, 0.25), _entry("worse", 0.25, -2.0, 0.125)],
        "baselines": [],
        "best": {**_entry("search", 0.625, -1.0, 0.375), "vs": {"good": versus}},
    }


def test_shares_are_in_percent():
    lines = results.table(_findings("worst", [0.0, 1.0])).split("\n")
    assert lines[0].split() == ["test", "scores,", "%", "sums", "text", "worst"]
    assert lines[2].split() == ["good", "50.0", "-125.0", "25.0", "[15.0,", "35.0]"]
    assert lines[-2].endswith("(good): +12.5 points [-5.0, +30.0], p = 0.04.")
    assert lines[-1] == "Held out, unseen: good 25.0, search 25.0"
    assert len({line.index("[") for line in lines[2:5]}) == 1


@pytest.mark.parametrize("aggregate", ["mean", "chebyshev"])
def test_what_is_no_share_is_a_plain_number(aggregate):
    lines = results.table(_findings(aggregate, [None, 0.0])).split("\n")
    assert lines[0].split() == ["test", "scores", "sums,", "%", "text", aggregate]
    assert lines[2].split() == ["good", "50.0", "-1.250", "0.250", "[0.150,", "0.350]"]
    assert lines[-2].endswith("(good): +0.125 [-0.050, +0.300], p = 0.04.")


def test_a_gain_is_no_share_even_over_shares():
    lines = results.table(_findings("normalised", [0.0, 1.0])).split("\n")
    assert lines[0].split()[-3:] == ["text,", "%", "normalised"]
    assert lines[2].split()[-3:] == ["0.250", "[0.150,", "0.350]"]


def test_the_front_is_measured_from_the_least_score_or_the_worst_checkpoint():
    scores = [(0.5, -1.0), (0.25, -2.0), (0.75, -1.5)]
    searched = [
        Candidate(i, 0, "search", "", "search", i, (1.0,), dict(zip(TASKS, pair)), {}, 0.0)
        for i, pair in enumerate(scores)
    ]
    objective = define(TASKS).measured_by([searched[0].scores, searched[1].scores])
    found = results._front(searched, objective, {"sums": [0.0, 1.0], "text": [None, 0.0]})
    assert found["pareto"] == [0, 2]
    assert found["hypervolume_reference"] == {"sums": 0.0, "text": -2.0}
    # 0.5 x 1 for the first, and 0.25 x 0.5 more for the third.
    assert found["hypervolume"] == pytest.approx(0.625)
    with np.errstate(all="raise"):
        bounded = results._front(searched, objective, {"sums": [0.25, 1.0], "text": [-4.0, 0.0]})
    assert bounded["hypervolume_reference"] == {"sums": 0.25, "text": -4.0}
