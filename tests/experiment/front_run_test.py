"""Searches for a front: from the config to tested points, by each kind of strategy."""

import json
import os
import re
import shutil
import subprocess
import sys

import jax
import jsonschema
import numpy as np
import pytest

from jaxmerge import config as configs
from jaxmerge import report
from jaxmerge.checkpoints import orbax
from jaxmerge.checkpoints.stream import LeafStream
from jaxmerge.errors import JaxmergeError
from jaxmerge.experiment import front
from jaxmerge.experiment.search import search
from jaxmerge.rundir import cost
from jaxmerge.scores import pareto
from jaxmerge.scores.objective import Range
from jaxmerge.trees import named_leaves
from tests import tiny
from tests.command import ROOT


def config_of(pool, strategy="gradient"):
    config = tiny.run_config(configs.default(), pool)
    config.front.points, config.front.steps, config.front.search_examples = 3, 2, 12
    config.search.strategy, config.search.steps, config.search.score_every = strategy, 2, 1
    config.search.minibatch = 4
    config.tasks.text = {"builder": "tests.tiny:text"}
    config.objective.tasks = ("text", "choice")
    config.heldout, config.baselines = (), ("uniform",)
    config.analyses.leave_one_out = config.analyses.transfer = False
    config.export.formats = ("orbax",)
    return config


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return tiny.pool(tmp_path_factory.mktemp("pool"))


@pytest.fixture(scope="module")
def finished(pool, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("front")
    config = config_of(pool)
    config.front.export = True
    return workdir, search(config, str(workdir), "the command")


def check_points(workdir, found):
    """The points are what `results.json` says they are."""
    of_front, log = found["front"], tiny.log(workdir)
    box = front.box({task: Range(**of) for task, of in found["objective"]["reference"].items()})
    assert of_front["corner"]["search"] == dict(zip(box.tasks, box.corner_T.tolist()))
    searched = [line for line in log if line["split"] == "search"]
    assert {count for line in searched for count in line["n"].values()} == {12}  # 10 for a winner
    scores = np.array([[line["scores"][task] for task in box.tasks] for line in searched])
    on_front = {json.dumps(searched[i]["scores"]) for i in pareto.front(scores)}
    assert 1 <= len(of_front["points"]) <= 3
    for number, point in enumerate(of_front["points"], 1):
        assert point["name"] == str(number)
        assert json.dumps(point["search"]) in on_front
        (tested,) = [
            line
            for line in log
            if (line["origin"], line["name"], line["split"]) == ("front", str(number), "test")
        ]
        assert tested["scores"] == point["test"]
        low, high = point["ci95"]["objective"]
        assert low <= point["test_objective"] <= high
    firsts = [point["search"][box.tasks[0]] for point in of_front["points"]]
    assert firsts == sorted(firsts)
    volume = box.volume(np.array([[*point["search"].values()] for point in of_front["points"]]))
    assert of_front["hypervolume"]["search"] == pytest.approx(volume)
    curve = of_front["curves"]["search"]
    assert (np.diff([at["hypervolume"] for at in curve]) >= 0).all()
    own = [one for one in searched if one["origin"] in ("search", "front")]
    assert curve[-1]["tokens"] == sum(cost(line["tokens"]) for line in own)
    schema = json.loads((ROOT / "jaxmerge/report/results.schema.json").read_text())
    jsonschema.validate(json.loads((workdir / "results.json").read_text()), schema)
    page = (workdir / "report.html").read_text()
    assert "What each task is worth to you" in page


def test_gradients_climb_along_preferences(finished):
    workdir, found = finished
    check_points(workdir, found)
    log = tiny.log(workdir)
    climbs = [line["name"] for line in log if line["origin"] == "front" and line["split"] != "test"]
    assert climbs == [f"front-{n}" for n in range(3)]
    # The winner is the best of all in the mean, whoever found it; what is at equal tokens counts
    # the climbs.
    best = max(np.mean([*line["scores"].values()]) for line in log if line["split"] == "search")
    assert found["best"]["search_objective"] == pytest.approx(best)
    origins = ("search", "front")
    own = [one for one in log if one["origin"] in origins and one["split"] == "search"]
    assert found["best"]["tokens"] == sum(cost(line["tokens"]) for line in own)


@pytest.mark.parametrize(
    "strategy", ["optuna:NSGAIISampler", "optuna:CmaEsSampler", "surrogate", "CMA_ES"]
)
def test_other_strategies(pool, tmp_path, strategy):
    found = search(config_of(pool, strategy), str(tmp_path), "the command")
    check_points(tmp_path, found)
    log = tiny.log(tmp_path)
    assert len([line for line in log if line["origin"] == "search"]) == 12
    # Cut off after the second generation, it ends the same.
    lines = (tmp_path / "candidates.jsonl").read_text().splitlines(keepends=True)
    searched = [n for n, line in enumerate(lines) if '"origin": "search"' in line]
    (tmp_path / "candidates.jsonl").write_text("".join(lines[: searched[7]]))
    again = search(config_of(pool, strategy), str(tmp_path), "the command")
    assert tiny.log(tmp_path) == log
    assert again["front"] == found["front"]


@pytest.mark.parametrize("climbs", [0, 1, 2])
def test_it_goes_on_to_the_same_front(finished, pool, tmp_path, climbs):
    """From before the climbs, from between them, and from before the last."""
    workdir, found = finished
    shutil.copytree(workdir, tmp_path / "run")
    log = tmp_path / "run" / "candidates.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    first = next(n for n, line in enumerate(lines) if '"origin": "front"' in line)
    log.write_text("".join(lines[: first + climbs]))
    config = config_of(pool)
    config.front.export = True
    again = search(config, str(tmp_path / "run"), "the command")
    assert tiny.log(tmp_path / "run") == tiny.log(workdir)
    assert again["front"] == found["front"]


def test_no_climbs(pool, tmp_path):
    config = config_of(pool)
    config.front.steps = 0
    found = search(config, str(tmp_path), "the command")
    assert {line["origin"] for line in tiny.log(tmp_path) if line["split"] == "search"} == {
        *("individual", "baseline:uniform", "search")
    }
    assert found["front"]["points"]


def test_within_tokens(pool, finished, tmp_path):
    """A third goes to the search, the rest to the climbs; none passes the budget."""
    _, whole = finished
    config = config_of(pool)
    config.search.steps, config.front.steps = 20, 20
    config.search.budget_tokens = round(1.5 * whole["best"]["tokens"])
    found = search(config, str(tmp_path), "the command")
    assert 0.5 * config.search.budget_tokens < found["best"]["tokens"]
    assert found["best"]["tokens"] <= config.search.budget_tokens


def leaves(path):
    source = orbax.describe("it", orbax.absolute(path))
    stream = LeafStream([source], jax.devices()[0])
    return {name: np.asarray(stream(name)[0]) for name in named_leaves(source.abstract)}


def export(run, *flags):
    return subprocess.run(
        [sys.executable, "-m", "jaxmerge", "export", str(run), *flags],
        cwd=run.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_points_are_exported_at_once_and_later(finished, pool, tmp_path):
    """To the same bits; `jaxmerge export` reads the checkpoints again."""
    workdir, found = finished
    for number in range(1, len(found["front"]["points"]) + 1):
        at_once = leaves(workdir / "points" / str(number) / "orbax")
        for name, leaf in at_once.items():
            assert np.isfinite(leaf).all(), name
    out = tmp_path / "later"
    ended = export(workdir, "--point=1", f"--out={out}")
    assert ended.returncode == 0, ended.stderr
    at_once = leaves(workdir / "points" / "1" / "orbax")
    for name, leaf in leaves(out).items():
        np.testing.assert_array_equal(leaf, at_once[name])
    winner = tmp_path / "winner.npz"
    assert export(workdir, "--format=npz", f"--out={winner}").returncode == 0
    ended = export(workdir, "--point=9", f"--out={tmp_path / 'none'}")
    assert (ended.returncode, "no such point" in ended.stderr) == (2, True)


@pytest.mark.slow
def test_checkpoints_that_have_changed_are_not_exported(finished, pool, tmp_path):
    workdir, _ = finished
    shutil.copytree(workdir, tmp_path / "run")
    record = tmp_path / "run" / "pool.json"
    said = record.read_text()
    first = json.loads(said)["checkpoints"][0]["fingerprint"]
    record.write_text(said.replace(first, "0" * len(first)))
    ended = export(tmp_path / "run", f"--out={tmp_path / 'out'}")
    assert ended.returncode == 2
    assert "is not the one" in ended.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"objective.tasks": ("text",)}, "objective.tasks"),
        ({"search.strategy": "CMA_ES", "search.subset": 0.5}, "search.subset"),
        ({"search.strategy": "surrogate", "analyses.pool_sizes": (2,)}, "analyses.pool_sizes"),
    ],
)
def test_what_a_front_does_not_go_with(pool, fields, said):
    config = config_of(pool)
    config.update_from_flattened_dict(fields)
    with pytest.raises(JaxmergeError, match=re.escape(said)):
        configs.check(config)


def test_reports_compare_fronts(finished, pool, tmp_path):
    workdir, _ = finished
    search(config_of(pool, "CMA_ES"), str(tmp_path / "b"), "the command")
    page = report.compare([workdir, tmp_path / "b"], tmp_path / "c.html").read_text()
    assert "<h2>Fronts</h2>" in page
