"""What tools/bench_strategies.py makes of runs."""

import argparse
import json

import numpy as np
import pytest

from jaxmerge.experiment import prepare as preparing
from jaxmerge.experiment.held import Held
from jaxmerge.scores.objective import define
from tests import tiny
from tests.report.fabricated import TASKS, add_analyses, fabricate
from tools import bench_strategies as bench


def _found(test: float, seed: int, **changes) -> bench.Found:
    rng = np.random.default_rng(seed)
    samples = {"sums": (rng.random(400) < test).astype(np.float32)}
    plain = bench.Found(
        float(samples["sums"].mean()), samples, {"sorting": 0.5}, 1000, 20.0, True, 0.25, 1.0
    )
    return plain._replace(**changes)


RUNS = {
    bench.PLAIN: {seed: _found(0.70, seed) for seed in range(3)},
    "gradient by leaf": {seed: _found(0.85, 10 + seed, tokens=1001) for seed in range(1, 3)},
    "random": {0: _found(0.70, 0, heldout={}, seconds=None)},
}


def test_ways_are_compared_over_the_seeds_of_both():
    said = bench.summary(RUNS, define(["sums"]))
    ours, theirs = said["gradient by leaf"], said[bench.PLAIN]
    assert theirs["test"] == pytest.approx(
        np.mean([one.test for one in RUNS[bench.PLAIN].values()])
    )
    expected = [RUNS["gradient by leaf"][s].test - RUNS[bench.PLAIN][s].test for s in (1, 2)]
    assert ours["over"]["delta"] == pytest.approx(np.mean(expected))
    low, high = ours["over"]["ci95_examples"]
    assert 0.05 < low < ours["over"]["delta"] < high < 0.25
    # Student's t with one degree of freedom is 12.706 at 97.5%.
    wide = 12.706 * np.std(expected, ddof=1) / 2**0.5
    assert np.diff(ours["over"]["ci95_seeds"]) == pytest.approx(2 * wide, rel=1e-4)
    assert ours["tokens"] == 1001
    assert said["random"]["over"]["delta"] == 0
    assert said["random"]["over"]["ci95_seeds"] is None
    turned = bench.summary(RUNS, define(["sums"]), against="gradient by leaf")
    assert turned[bench.PLAIN]["over"]["delta"] == pytest.approx(-np.mean(expected))
    assert "over" not in turned["gradient by leaf"]


def test_the_tables_have_a_line_for_each_way():
    lines = bench.tables(bench.summary(RUNS, define(["sums"])), {"sorting": 0.4}).splitlines()
    assert len(lines) == 2 * (2 + len(RUNS)) + 1
    assert {line.count("|") for line in lines if line} == {8, 6}
    (claims,) = [line for line in lines[6:] if line.startswith("| gradient by leaf")]
    assert claims == "| gradient by leaf | 100% | 0.250 | 100% | +10.0 |"


def test_what_a_run_says(tmp_path):
    fabricate(tmp_path / "run")
    add_analyses(tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    found = bench.found(tmp_path / "run", "search")
    assert (found.test, found.tokens) == (results["best"]["test_objective"], 5000 * 180)
    assert np.mean([found.samples[task].mean() for task in TASKS]) == pytest.approx(found.test)
    assert found.front  # the fabricated winner is the best of its search in the mean
    assert 0.2 < found.hypervolume < 1
    weights = np.array([*results["best"]["weights"].values()])
    assert found.nonzero == np.mean(np.abs(weights) > 0.01)


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # by ml_collections
def test_a_way_is_runs_that_share_the_pool(tmp_path, monkeypatch):
    """Each with the fields of its way; one that is finished is not made again."""
    loads = []
    load = preparing.load
    monkeypatch.setattr(preparing, "load", lambda *a, **k: loads.append(1) or load(*a, **k))
    tiny.pool(tmp_path / "pool")
    config = tmp_path / "config.py"
    config.write_text(
        "from jaxmerge import config\nfrom tests import tiny\n\n"
        f"get_config = lambda: tiny.run_config(config.default(), {str(tmp_path / 'pool')!r})\n"
    )
    given = ["--config.objective.search_examples=4", "--config.objective.test_examples=6"]
    args = argparse.Namespace(config=config, pool="", tokens=800, out=tmp_path, set=given)
    held, ways = Held(), (bench.PLAIN, "CMA-ES, signed")
    for _ in range(2):
        for way in ways:
            for seed in (1, 2):
                workdir = bench.directory(tmp_path, way, seed)
                bench.make(workdir, bench.arguments(args, way, seed), held)
    assert len(loads) == 1
    for way in ways:
        directory = bench.directory(tmp_path, way, 2)
        made = json.loads((directory / "config.json").read_text())
        assert made["seed"] == 2
        assert {field: _at(made, field) for field in bench.WAYS[way]} == bench.WAYS[way]
        assert 0 < bench.found(directory, "search").tokens <= 800
    directory = bench.directory(tmp_path, "CMA-ES, signed", 2)
    told = json.loads((directory / "results.json").read_text())
    assert "--config.space.constraint=signed" in told["command"]
    runs = bench.collected(tmp_path, [0, 1, 2])
    assert {*runs} == {*ways, *bench.BASELINES}
    assert all([*by_seed] == [1, 2] for by_seed in runs.values())


def _at(plain, field):
    """A field of a plain config by its path."""
    for name in field.split("."):
        plain = plain[name]
    return plain
