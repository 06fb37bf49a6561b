"""Searches that score fewer examples: on parts of them, and no weights twice."""

import copy
import dataclasses
import json
import shutil

import jsonschema
import numpy as np
import pytest

from jaxmerge import config as configs
from jaxmerge.errors import JaxmergeError
from jaxmerge.evaluation.evaluator import Evaluator, Step
from jaxmerge.experiment.held import Held
from jaxmerge.experiment.search import search as run
from jaxmerge.rundir import RunDirectory, cost
from jaxmerge.scores.objective import define
from jaxmerge.search import baselines
from jaxmerge.search.archive import Archive, Request
from jaxmerge.search.loop import Economy, search
from jaxmerge.search.parts import deal
from jaxmerge.search.strategies import evosax
from tests import tiny
from tests.command import ROOT

TASKS = ("sums", "words")
OBJECTIVE = define(TASKS)
N = {"sums": 160, "words": 128}
NAMES = ("north", "east", "south", "west")
EASE = {task: np.random.default_rng(i).uniform(size=(4, N[task])) for i, task in enumerate(TASKS)}


class Killed(BaseException):
    """What a SIGKILL is in these tests."""


class Formula(Evaluator):
    """Questions that a merge answers when its checkpoints, weighted, find them easy enough."""

    def __init__(self, lives: float = float("inf")):
        self.candidates_per_step = 3
        self._places = {task: np.arange(count) for task, count in N.items()}
        self.asked: list[tuple] = []  # weights and example, of all parts
        self._lives = [lives]

    @property
    def examples(self):
        return {task: len(at) for task, at in self._places.items()}

    @property
    def read(self):
        return 10 * sum(self.examples.values())

    def part(self, places):
        made = copy.copy(self)
        made._places = places
        return made

    def steps(self, weights_PxK):
        for start in range(0, len(weights_PxK), self.candidates_per_step):
            rows = weights_PxK[start : start + self.candidates_per_step]
            self._lives[0] -= 1
            if self._lives[0] < 0:
                raise Killed
            for task, at in self._places.items():
                self.asked += [(row.tobytes(), task, int(i)) for row in rows for i in at]
            scores = {
                task: (rows @ EASE[task][:, at] > 0.55).astype(np.float32)
                for task, at in self._places.items()
            }
            yield Step(scores, np.full(len(rows), 5))


def _softmax(z_PxD):
    """Rounded, so that weights come back; the last is what the others leave."""
    w = np.exp(z_PxD) / np.exp(z_PxD).sum(axis=1, keepdims=True)
    return np.round(w, 1).astype(np.float32)


STRATEGY = evosax("CMA_ES", 4, 8)


def _run(path, lives=float("inf"), *, saved=0.0, budget_tokens=0):
    """A search; its log without seconds, the winner, and what was asked of the evaluator."""
    directory, formula = RunDirectory(path, {}), Formula(lives)
    try:
        archive = Archive(directory, {"search": formula})
        alone = baselines.individuals(archive, NAMES)
        rows = [directory.examples(one) for one in alone]
        scores = {task: np.stack([row[task] for row in rows]) for task in TASKS}
        parts = deal(scores, subset=0.5, seed=0)
        best = search(
            archive,
            STRATEGY,
            _softmax,
            objective=OBJECTIVE,
            budget=48,
            budget_tokens=budget_tokens,
            seed=1,
            states=path / "state",
            save_seconds=saved,
            economy=Economy(parts, selected=4, finalists=3),
        )
        examples = [directory.examples(one) for one in directory.candidates]
    finally:
        directory.close()
    lines = [json.loads(line) for line in (path / "candidates.jsonl").read_text().splitlines()]
    return [{**line, "seconds": 0} for line in lines], best, formula.asked, examples


def test_killed_at_any_step_it_ends_the_same(tmp_path):
    whole = _run(tmp_path / "whole")
    for lives, saved in ((4, 0.0), (9, 1e9), (14, 0.0)):
        path = tmp_path / str(lives)
        with pytest.raises(Killed):
            _run(path, lives, saved=saved)
        lines, best, _, examples = _run(path, saved=saved)
        assert lines == whole[0]
        assert best.weights == whole[1].weights
        for ours, theirs in zip(examples, whole[3]):
            for task in TASKS:
                np.testing.assert_array_equal(ours[task], theirs[task])


def test_what_is_scored_and_who_can_win(tmp_path):
    lines, best, asked, examples = _run(tmp_path)
    assert len(set(asked)) == len(asked)  # never the same weights on the same example
    searched = [line for line in lines if line["origin"] == "search"]
    assert len(searched) == 48
    for line, rows in zip(lines, examples):
        assert line["n"] == {task: int(np.isfinite(rows[task]).sum()) for task in TASKS}
        assert line["out_of"] == (None if line["n"] == N else N)
    assert best.out_of is None
    whole = [line for line in lines if line["origin"] == "search:decision"]
    assert OBJECTIVE.of(best.scores) == max(OBJECTIVE.of(line["scores"]) for line in whole)
    late = [line for line in searched if line["generation"] >= 3]
    averages = [_average_of_selected(late, first) for first in (3, 5)]
    best_estimate = max(late, key=lambda line: (OBJECTIVE.of(line["scores"]), -line["id"]))
    np.testing.assert_allclose(
        [line["weights"] for line in whole], [*averages, best_estimate["weights"]], rtol=1e-6
    )
    read = sum(line["tokens"]["read"] for line in lines)
    assert read == 10 * len(asked)


def test_the_decision_is_within_a_budget_in_tokens(tmp_path):
    """With room left for less than a generation on a part, and for finalists scored in full."""
    whole = 10 * sum(N.values()) + 5  # tokens of a candidate
    reserved, generation = 3 * whole, 8 * whole // 2
    for tokens in (reserved + generation, reserved + 3 * generation):
        lines, best, *_ = _run(tmp_path / str(tokens), budget_tokens=tokens)
        own = [line for line in lines if line["origin"].startswith("search")]
        assert best.id in [line["id"] for line in own if line["origin"] == "search:decision"]
        assert 0 <= tokens - sum(cost(line["tokens"]) for line in own) < generation + reserved
    with pytest.raises(JaxmergeError, match=r"search\.budget_tokens"):
        _run(tmp_path / "none", budget_tokens=reserved + generation - 1)


def _average_of_selected(lines, first):
    """Of the upper half of each generation by the estimates."""
    rows = []
    for generation in range(first, lines[-1]["generation"] + 1):
        asked = [line for line in lines if line["generation"] == generation]
        asked.sort(key=lambda line: OBJECTIVE.of(line["scores"]), reverse=True)
        rows += [line["weights"] for line in asked[: STRATEGY.population // 2]]
    return np.mean(rows, axis=0)


def test_the_same_weights_are_scored_once(tmp_path):
    """Within a step, between steps and calls, and with a log that ends anywhere."""
    order = [0, 1, 0, 2, 3, 1, 4, 4, 5, 0]
    eye = [np.array([k / 8, 1 - k / 8, 0, 0], np.float32) for k in range(6)]

    def evaluated(path, lives=float("inf")):
        directory, formula = RunDirectory(path, {}), Formula(lives)
        try:
            archive = Archive(directory, {"search": formula})
            archive.evaluate("search", [Request("a", "a", eye[0]), Request("a", "b", eye[5])])
            requests = [Request("b", str(k), eye[k]) for k in order]
            made = archive.evaluate("search", requests)
            rows = np.stack([directory.examples(one)["sums"] for one in made])
        finally:
            directory.close()
        return [dataclasses.replace(one, seconds=0.0) for one in made], rows, formula.asked

    made, rows, asked = evaluated(tmp_path / "whole")
    assert len(set(asked)) == len(asked) == 6 * sum(N.values())
    assert [one.name for one in made if one.tokens != {"read": 0, "written": 0}] == list("1234")
    np.testing.assert_array_equal(rows, [EASE["sums"].T @ eye[k] > 0.55 for k in order])
    log = (tmp_path / "whole" / "candidates.jsonl").read_text().splitlines(keepends=True)
    for cut in range(len(log)):
        path = tmp_path / "cut"
        evaluated(path)
        (path / "candidates.jsonl").write_text("".join(log[:cut]))
        again, same_rows, _ = evaluated(path)
        assert again == made
        np.testing.assert_array_equal(same_rows, rows)


def test_parts_are_alike_in_difficulty():
    """The mean over a part is unbiased also for a model that they were not made by, and surer."""
    rng = np.random.default_rng(0)
    ease_N = rng.beta(0.5, 0.5, 200)
    known_KxN = (rng.uniform(size=(8, 200)) < ease_N).astype(np.float32)
    other_N = (rng.uniform(size=200) < ease_N).astype(np.float32)
    drawn = [deal({"a": known_KxN}, subset=1 / 8, seed=i) for i in range(500)]
    means = [other_N[parts[0]["a"]].mean() for parts in drawn]
    # Four standard errors.
    assert abs(np.mean(means) - other_N.mean()) < 4 * np.std(means) / 500**0.5
    plain = [other_N[rng.permutation(200)[:25]].mean() for _ in range(500)]
    assert np.std(means) < 0.8 * np.std(plain)


def test_parts_are_a_partition():
    rng = np.random.default_rng(0)
    known = {task: (rng.uniform(size=(4, n)) < 0.5).astype(np.float32) for task, n in N.items()}
    parts = deal(known, subset=0.2, seed=3)
    assert len(parts) == 5
    for task, n in N.items():
        assert {len(part[task]) for part in parts} <= {n // 5, n // 5 + 1}
        assert sorted(np.concatenate([part[task] for part in parts])) == list(range(n))
    assert len(deal(known, subset=0.001, seed=3)) == N["words"]


def test_a_run(tmp_path):
    """Its winner is scored in full, the report marks estimates, and a cut log gives the same."""
    config = tiny.run_config(configs.default(), tiny.pool(tmp_path / "pool"))
    config.baselines, config.heldout, config.search.budget = ("uniform",), (), 8
    config.search.subset, config.search.finalists = 0.5, 2
    config.analyses.leave_one_out = config.analyses.transfer = False
    held = Held()  # what is compiled
    found = run(config, str(tmp_path / "run"), held=held)
    jsonschema.validate(
        found, json.loads((ROOT / "jaxmerge/report/results.schema.json").read_text())
    )
    log = tiny.log(tmp_path / "run")
    origins = [line["origin"] for line in log]
    assert origins.count("search:decision") == 2
    assert found["best"]["evaluations"] == 8 + 2
    assert log[found["best"]["id"]]["origin"] == "search:decision"
    assert not any(log[i]["out_of"] for i in found["pareto"])
    estimates = [line for line in log if line["origin"] == "search"]
    assert {sum(line["n"].values()) for line in estimates} == {10}
    assert "estimate from 10 of 20 examples" in (tmp_path / "run" / "report.html").read_text()
    lines = (tmp_path / "run" / "candidates.jsonl").read_text().splitlines(keepends=True)
    for kept in (origins.index("search") + 6, origins.index("search:decision") + 1):
        shutil.rmtree(tmp_path / "run" / "state", ignore_errors=True)
        (tmp_path / "run" / "candidates.jsonl").write_text("".join(lines[:kept]) + lines[kept][:9])
        again = run(config, str(tmp_path / "run"), held=held)
        assert tiny.log(tmp_path / "run") == log
        assert again["best"] == found["best"]
