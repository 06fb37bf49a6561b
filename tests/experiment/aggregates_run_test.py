"""Whole searches with aggregates other than the mean, over a task whose scores are no shares."""

import json

import jsonschema
import numpy as np
import pytest

from jaxmerge import config as configs
from jaxmerge.errors import JaxmergeError
from jaxmerge.experiment import results
from jaxmerge.experiment.search import search as run
from tests import tiny
from tests.command import ROOT


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return tiny.pool(tmp_path_factory.mktemp("pool"))


def _config(pool, aggregate: str, tasks: tuple[str, ...]):
    config = tiny.run_config(configs.default(), pool)
    config.tasks.text = {"builder": "tests.tiny:text"}
    config.objective.tasks, config.objective.aggregate = tasks, aggregate
    config.baselines, config.heldout = ("uniform",), ("unseen",)
    config.search.budget = 8
    return config


def _log(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "candidates.jsonl").read_text().splitlines()]


def test_the_worst_task(pool, tmp_path, capsys):
    config = _config(pool, "worst", ("generation", "choice"))
    found = run(config, str(tmp_path))
    searched = [line for line in _log(tmp_path) if line["origin"] == "search"]
    assert found["best"]["search_objective"] == max(
        min(line["scores"].values()) for line in searched
    )
    for entry in (*found["individuals"], *found["baselines"], found["best"]):
        assert entry["test_objective"] == min(entry["test"].values())
        low, high = entry["ci95"]["objective"]
        assert low < high
    assert found["hypervolume_reference"] == {"generation": 0.0, "choice": 0.0}
    assert results.table(found).split("\n")[0].split()[-1] == "worst"
    assert "%" in results.table(found).split("\n")[0]
    assert "is public" not in capsys.readouterr().err  # that task is not in this run


def test_chebyshev_over_shares_and_bits_per_byte(pool, tmp_path, capsys):
    config = _config(pool, "chebyshev", ("choice", "text"))
    config.objective.weights = (1, 3)
    found = run(config, str(tmp_path), "the command")
    warned = capsys.readouterr().err
    jsonschema.validate(
        json.loads((tmp_path / "results.json").read_text()),
        json.loads((ROOT / "jaxmerge/report/results.schema.json").read_text()),
    )
    pool_scores = {
        task: [entry["search"][task] for entry in found["individuals"]]
        for task in ("choice", "text")
    }
    assert max(pool_scores["text"]) < 0

    def value(scores: dict[str, float]) -> float:
        gains = np.array([(scores[t] - max(s)) / np.ptp(s) for t, s in pool_scores.items()])
        weighted = 2 * np.array([0.25, 0.75]) * gains
        return weighted.min() + 0.05 * weighted.sum()

    searched = [line for line in _log(tmp_path) if line["origin"] == "search"]
    best = found["best"]
    assert best["search_objective"] == pytest.approx(
        max(value(line["scores"]) for line in searched)
    )
    # Test scores are measured by the search scores of the pool.
    assert best["test_objective"] == pytest.approx(value(best["test"]))
    assert found["bounds"]["text"] == [None, 0.0]
    assert found["hypervolume_reference"] == {"choice": 0.0, "text": min(pool_scores["text"])}
    assert found["hypervolume"] > 0

    heading = results.table(found).split("\n")[0]
    assert heading.split()[2:] == ["choice,", "%", "text", "chebyshev"]
    assert found["warnings"] == ["text: it is public"]
    assert warned.count("it is public") == 1
    page = (tmp_path / "report.html").read_text()
    assert "<li>text: it is public</li>" in page
    assert "weights choice&nbsp;0.25, text&nbsp;0.75" in page


def test_no_task_is_called_objective(pool):
    config = _config(pool, "mean", ("choice",))
    config.heldout = ("objective",)
    config.tasks.objective = {"builder": "tests.tiny:choice"}
    with pytest.raises(JaxmergeError, match="can't have this name"):
        configs.check(config)


def test_a_contradiction_ends_before_anything_is_read(pool, tmp_path):
    config = _config(pool, "worst", ("generation", "choice"))
    config.objective.weights = (1.0, 2.0)
    with pytest.raises(JaxmergeError, match=r"objective\.weights: the aggregate worst"):
        run(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
