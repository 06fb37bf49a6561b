"""Sweeps on a tiny pool: cells are what separate runs would be, failures, shards, kills."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxmerge import config as configs
from jaxmerge.durable import Lock
from jaxmerge.errors import JaxmergeError
from jaxmerge.experiment import prepare as preparing
from jaxmerge.experiment.search import search as run
from jaxmerge.sweep.runs import sweep, table
from tests import tiny
from tests.command import ROOT, Command

AXES = ["search.strategy=CMA_ES,SNES", "seed=0,1"]


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return tiny.pool(tmp_path_factory.mktemp("pool"))


def _config(pool: Path):
    """Two devices with a candidate each, so that steps have two."""
    config = tiny.run_config(configs.default(), pool)
    config.mesh.pop = 2
    return config


@pytest.fixture(scope="module")
def swept(pool, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sweep")
    return workdir, sweep(_config(pool), AXES, str(workdir), command="a command")


def test_a_cell_is_what_a_separate_run_is(swept, pool, tmp_path):
    """Bit for bit, in the log, the examples and the results; but for seconds and the command."""
    workdir, outcome = swept
    assert not outcome.failed
    name = "search.strategy=SNES,seed=1"
    config = _config(pool)
    config.search.strategy, config.seed = "SNES", 1
    alone = run(config, str(tmp_path))
    assert tiny.log(workdir / name) == tiny.log(tmp_path)
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.f32"))
    assert len(files) == 5  # two tasks on search and test, and the held-out one
    for file in files:
        assert (workdir / name / file).read_bytes() == (tmp_path / file).read_bytes()
    but = {"seconds": None, "command": None}
    assert {**outcome.finished[name], **but} == {**alone, **but}
    for file in ("config.json", "pool.json", "tasks.json"):
        assert (workdir / name / file).read_bytes() == (tmp_path / file).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {
        path.name for path in (workdir / name).iterdir()
    }


def test_a_run_goes_on_with_a_cell(swept, pool):
    """The directory of a cell is that of a run, with a command to run it again."""
    workdir, outcome = swept
    directory = workdir / "search.strategy=CMA_ES,seed=1"
    config = _config(pool)
    config.seed = 1
    log = (directory / "candidates.jsonl").read_bytes()
    again = run(config, str(directory))
    assert (directory / "candidates.jsonl").read_bytes() == log
    found = outcome.finished[directory.name]
    assert again["best"] == found["best"]
    assert found["command"] == (
        "a command --config.search.strategy=CMA_ES --config.seed=1 "
        f"--workdir={workdir}/search.strategy=CMA_ES,seed=1"
    )


def test_the_pool_is_loaded_once_and_nothing_compiles_in_later_cells(
    pool, tmp_path, monkeypatch, compilations
):
    loads = []
    load = preparing.load
    monkeypatch.setattr(preparing, "load", lambda *a, **k: loads.append(1) or load(*a, **k))
    counted = []
    monkeypatch.setattr(
        "jaxmerge.sweep.runs.search",
        lambda *given: (run(*given), counted.append(compilations()))[0],
    )
    sweep(_config(pool), ["seed=0,1,2"], str(tmp_path))
    assert len(loads) == 1
    assert counted[0] > 0
    assert counted == [counted[0]] * 3


def test_what_is_the_same_in_cells_is_scored_once(pool, tmp_path, monkeypatch):
    """The individuals and, of one seed, the random draws; on the test split too."""
    scored = {}
    evaluator = preparing.Evaluator

    class Counting(evaluator):
        def steps(self, weights_PxK):
            split = len(self.examples), next(iter(self.examples.values()))
            scored[split] = scored.get(split, 0) + len(weights_PxK)
            return super().steps(weights_PxK)

    monkeypatch.setattr(preparing, "Evaluator", Counting)
    config = _config(pool)
    config.baselines, config.heldout = ("random",), ()
    config.analyses.leave_one_out = config.analyses.transfer = False
    sweep(config, ["search.sigma=0.5,0.25"], str(tmp_path))
    # By the number of tasks and of examples: 3 individuals, 12 draws, 2 searches of 12; then the
    # individuals and the best draw, which fill two steps, and each winner.
    assert scored == {(2, 10): 3 + 12 + 2 * 12, (2, 20): 3 + 1 + 2}


def test_the_same_command_runs_nothing_again(swept, pool, monkeypatch):
    workdir, outcome = swept
    monkeypatch.setattr("jaxmerge.sweep.runs.search", None)
    again = sweep(_config(pool), AXES, str(workdir))
    assert list(again.finished) == list(outcome.finished)
    best = [{name: run["best"] for name, run in each.finished.items()} for each in (again, outcome)]
    assert best[0] == json.loads(json.dumps(best[1]))
    assert not again.failed


def test_a_cell_whose_report_is_missing_is_not_finished(pool, tmp_path):
    config = _config(pool)
    config.search.budget, config.baselines, config.heldout = 4, (), ()
    sweep(config, ["seed=3"], str(tmp_path))
    (tmp_path / "seed=3/report.html").unlink()
    sweep(config, ["seed=3"], str(tmp_path))
    assert (tmp_path / "seed=3/report.html").exists()


def test_another_grid_or_config_is_refused(swept, pool):
    workdir, _ = swept
    files = sorted(workdir.rglob("*"))
    with pytest.raises(JaxmergeError, match=r"sweep.seed: \['0', '1'\] there, \['0', '2'\] now"):
        sweep(_config(pool), [AXES[0], "seed=0,2"], str(workdir))
    config = _config(pool)
    config.search.budget = 20
    with pytest.raises(JaxmergeError, match=r"search.budget: 14 there, 20 now"):
        sweep(config, AXES, str(workdir))
    assert sorted(workdir.rglob("*")) == files


def test_a_directory_of_something_else_is_refused(swept, pool, tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(JaxmergeError, match="no run directory"):
        sweep(_config(pool), AXES, str(tmp_path))
    with pytest.raises(JaxmergeError, match="no run directory"):
        sweep(_config(pool), AXES, str(swept[0] / "search.strategy=SNES,seed=0"))


def test_shards_make_the_whole(swept, pool, tmp_path):
    """In any order, in one directory."""
    halves = [sweep(_config(pool), AXES, str(tmp_path), shard=part) for part in ("2/2", "1/2")]
    assert [len(half.finished) for half in halves] == [2, 2]
    for name in swept[1].finished:
        assert tiny.log(tmp_path / name) == tiny.log(swept[0] / name)
    read = [json.loads((path / "sweep.json").read_text()) for path in (tmp_path, swept[0])]
    assert read[0] == read[1]


def test_two_processes_do_not_share_a_shard(pool, tmp_path):
    """The second is refused at once, and not cell by cell; that of another shard is not."""
    config, axes = _config(pool), ["seed=0,1"]
    (tmp_path / "sweep").mkdir()
    with contextlib.closing(Lock(tmp_path / "sweep" / ".lock-1-2")):
        with pytest.raises(JaxmergeError, match="another process") as raised:
            sweep(config, axes, str(tmp_path / "sweep"), shard="1/2")
        assert raised.value.where == str(tmp_path / "sweep")
        other = sweep(config, axes, str(tmp_path / "sweep"), shard="2/2")
    assert (list(other.finished), other.failed) == (["seed=1"], {})
    assert not (tmp_path / "sweep" / "seed=0").exists()
    assert list(sweep(config, axes, str(tmp_path / "sweep"), shard="1/2").finished) == ["seed=0"]


def test_a_cell_that_fails_does_not_stop_the_others(pool, tmp_path):
    config = _config(pool)
    config.search.budget, config.baselines, config.heldout = 4, (), ()
    outcome = sweep(config, ["search.strategy=CMAES,SNES"], str(tmp_path))
    assert list(outcome.finished) == ["search.strategy=SNES"]
    assert list(outcome.failed) == ["search.strategy=CMAES"]
    assert "CMA_ES" in outcome.failed["search.strategy=CMAES"]


def test_a_config_that_can_be_known_to_be_wrong_runs_nothing(pool, tmp_path):
    with pytest.raises(JaxmergeError, match=r"objective\.aggregate"):
        sweep(_config(pool), ["objective.aggregate=mean,maen"], str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_two_pools_are_not_held_at_once(pool, tmp_path, monkeypatch):
    """Cells of one pool follow each other; it is let go before the next one is loaded."""
    held = []
    release = preparing.Held.release

    def watched(self, made_of):
        release(self, made_of)
        held.append("pool" in self._parts)

    monkeypatch.setattr(preparing.Held, "release", watched)
    config = _config(pool)
    config.search.budget, config.baselines, config.heldout = 4, (), ()
    outcome = sweep(config, ["seed=0,1", "pool.system=,other"], str(tmp_path))
    assert held == [False, True, False, True]
    assert list(outcome.finished) == [
        f"seed={seed},pool.system={system}" for seed in (0, 1) for system in ("", "other")
    ]


def test_the_table_has_a_line_per_cell(swept):
    lines = table(swept[1].finished).splitlines()
    assert len(lines) == 2 + 4
    assert lines[2].startswith("search.strategy=CMA_ES,seed=0 ")
    best = swept[1].finished["search.strategy=CMA_ES,seed=0"]["best"]
    assert f"{100 * best['test_objective']:.1f}" in lines[2]


class Sweep(Command):
    """The command line of a sweep over the tiny pool."""

    module = "jaxmerge.sweep"

    def lines(self) -> int:
        logs = self.workdir.glob("*/candidates.jsonl")
        return sum(log.read_bytes().count(b"\n") for log in logs)


@pytest.mark.slow
def test_killed_at_random_instants_it_ends_the_same(pool, tmp_path):
    """SIGKILL, then the same command, until it ends; nothing that was in a log is lost."""
    axes = ["--sweep=seed=0,1", "--sweep=search.strategy=CMA_ES,SNES"]
    (tmp_path / "whole").mkdir()
    whole = Sweep(tmp_path / "whole", pool)
    code, _, err = whole.run(*axes)
    assert code == 0, err
    (tmp_path / "killed").mkdir()
    killed = Sweep(tmp_path / "killed", pool)
    instants, kills = random.Random(0), 0
    for _ in range(3):
        before = killed.lines()
        process = killed.start(*axes)
        while process.poll() is None and killed.lines() <= before:
            time.sleep(0.01)
        time.sleep(instants.uniform(0, 1.5))
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert killed.lines() >= before - 1  # half a step is evaluated whole again
    assert kills >= 2
    code, out, err = killed.run(*axes)
    assert code == 0, err
    assert out.count("search.strategy=") == 4
    assert "seed=1,search.strategy=SNES" in (killed.workdir / "comparison.html").read_text()
    for directory in whole.workdir.glob("seed=*"):
        assert tiny.log(killed.workdir / directory.name) == tiny.log(directory)
        results = [c.workdir / directory.name / "results.json" for c in (whole, killed)]
        first, second = (json.loads(path.read_text())["best"] for path in results)
        assert first == second


@pytest.mark.slow
def test_the_command_line(pool, tmp_path):
    """A cell that fails: the others are in the table, the message is told, the exit code is 2."""
    command = Sweep(tmp_path, pool, "config.baselines, config.heldout = (), ()")
    flags = ["--config.search.budget=4", "--config.seed=7", "--sweep=search.strategy=CMAES,SNES"]
    code, out, err = command.run(*flags)
    assert code == 2
    assert "search.strategy=SNES" in out
    assert "1 of 2 cells failed" in err
    assert "Traceback" not in err
    results = json.loads((command.workdir / "search.strategy=SNES/results.json").read_text())
    again = subprocess.run(
        [sys.executable, *results["command"].split()[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert again.returncode == 0, again.stderr


def test_a_wrong_field_ends_in_one_message(pool, tmp_path):
    command = Sweep(tmp_path, pool)
    code, out, err = command.run("--sweep=search.sigmo=0.1,0.2")
    assert code == 2
    assert "search.sigmo" in err
    assert "Traceback" not in err
    assert out == ""
    assert not command.workdir.exists()


def test_help_explains_itself():
    shown = subprocess.run(
        [sys.executable, "-m", "jaxmerge.sweep", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "--shard=i/n" in shown
    assert "config.search.budget_tokens = 0" in shown
