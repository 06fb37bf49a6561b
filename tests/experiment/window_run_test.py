"""Searches over the window of a run: two numbers, from the config to results, report and card."""

import json

import jsonschema
import numpy as np
import pytest

from jaxmerge import config as configs
from jaxmerge.checkpoints import orbax
from jaxmerge.errors import JaxmergeError
from jaxmerge.experiment.search import search
from jaxmerge.merge import schedules
from tests import tiny
from tests.command import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["SNES", "gradient"])
def test_a_search_over_the_window_of_a_run(tmp_path, strategy):
    for step, tree in zip((2000, 500, 1000, 1500), tiny.trees(4)):
        path = tmp_path / "checkpoints" / str(step)
        orbax.save(path, tree, architecture=tiny.model().architecture)
    config = tiny.run_config(configs.default(), tmp_path)
    config.pool.checkpoints, config.pool.steps = (str(tmp_path / "checkpoints"),), "500:2000:500"
    config.space.constraint, config.search.strategy = "window", strategy
    config.objective.tasks, config.heldout, config.baselines = ("choice",), (), ("uniform",)
    config.search.population, config.search.budget = 4, 8
    config.search.steps, config.search.score_every = 2, 1
    config.analyses.leave_one_out = config.analyses.transfer = False
    found = search(config, str(tmp_path / "run"), "the command")
    schema = json.loads((ROOT / "jaxmerge/report/results.schema.json").read_text())
    jsonschema.validate(json.loads((tmp_path / "run" / "results.json").read_text()), schema)
    assert list(found["best"]["weights"]) == ["500", "1000", "1500", "2000"]
    searched = [line for line in tiny.log(tmp_path / "run") if line["origin"] == "search"]
    assert len({line["window"]["length"] for line in searched}) > 1
    for line in searched:
        length, exponent = map(np.float64, line["window"].values())
        expected = schedules.window(length, exponent, 4)
        np.testing.assert_allclose(line["weights"], expected, atol=1e-6)
    if "window" in found["best"]:  # else a baseline has won
        assert "decayed by 1 - x^" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("field", "value"), [("merge.method", "ties"), ("search.warm_start", "gradient")]
)
def test_what_a_window_does_not_go_with(field, value):
    config = configs.default()
    config.pool.checkpoints, config.pool.base = ("a",), "b"
    config.space.constraint, config.search.strategy = "window", "CMA_ES"
    config.objective.tasks = ("sorting",)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(JaxmergeError, match=field.replace(".", r"\.")):
        configs.check(config)
