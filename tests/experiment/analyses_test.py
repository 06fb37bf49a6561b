"""The analyses of a finished search, over an evaluator that is a formula."""

import dataclasses
import json
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from scipy.stats import spearmanr

from jaxmerge.evaluation.evaluator import Evaluator, Step
from jaxmerge.experiment import analyses
from jaxmerge.experiment.analyses import Study
from jaxmerge.rundir import Candidate, RunDirectory
from jaxmerge.scores import stats
from jaxmerge.scores.objective import Objective, define
from jaxmerge.search import baselines, space
from jaxmerge.search.archive import Archive, Request
from jaxmerge.search.baselines import Found
from jaxmerge.search.loop import search
from jaxmerge.search.strategies import evosax

NAMES: tuple[str, ...] = ("north", "east", "south", "west")
TASKS = ("sums", "words", "code")
# How well each checkpoint answers 8 questions of each task, on each split.
ABILITY = {
    split: {
        task: np.random.default_rng([i, j]).uniform(size=(4, 8)) for j, task in enumerate(tasks)
    }
    for i, (split, tasks) in enumerate({"search": TASKS, "test": TASKS, "heldout": "u"}.items())
}


class Killed(BaseException):
    """What a SIGKILL is in these tests."""


class Formula(Evaluator):
    """An evaluator without a model: scores are a formula of the weights."""

    def __init__(self, split: str, lives: list[float]):
        self.candidates_per_step, self.ability, self.lives = 3, ABILITY[split], lives

    @property
    def examples(self):
        return dict.fromkeys(self.ability, 8)

    @property
    def read(self):
        return 40

    def steps(self, weights_PxK):
        for start in range(0, len(weights_PxK), self.candidates_per_step):
            rows = weights_PxK[start : start + self.candidates_per_step]
            self.lives[0] -= 1
            if self.lives[0] < 0:
                raise Killed
            yield Step(_scores(rows, self.ability), np.full(len(rows), 5))


def _scores(rows_PxK, ability) -> dict[str, np.ndarray]:
    """Peaks inside the simplex."""
    rows_PxK = np.asarray(rows_PxK, np.float64)
    return {task: np.sin(3 * rows_PxK @ a_KxN).astype("f4") for task, a_KxN in ability.items()}


def _study(directory: RunDirectory, lives: float, pool_sizes: Sequence[int] = (2, 3)) -> Study:
    """A run up to where the analyses begin."""
    left = [lives]
    archive = Archive(directory, {split: Formula(split, left) for split in ABILITY})
    individuals = baselines.individuals(archive, NAMES)
    objective = define(TASKS)

    def search_over(chosen: Sequence[int], origin: str = analyses.POOL_SIZE) -> Found:
        name = f"best-{len(chosen)}"
        best = search(
            archive,
            evosax("CMA_ES", len(chosen), 6),
            lambda z: space.spread(space.weights(z, "softmax", (-8.0, 8.0)), chosen, 4),
            objective=objective,
            budget=26,
            seed=1,
            states=directory.path / name,
            save_seconds=0.0,
            origin=origin,
            name=name,
        )
        return Found(name, best, 24, 24 * 10)

    winner = search_over(range(4), "search")
    weights = [np.asarray(one.weights, np.float32) for one in (*individuals, winner.candidate)]
    archive.evaluate("test", [Request("final", str(k), row) for k, row in enumerate(weights)])
    archive.evaluate("heldout", [Request("final", "4", weights[4])])
    return Study(
        *(archive, directory, NAMES, objective, individuals, winner),
        heldout=True,
        search_over=search_over,
        pool_sizes=pool_sizes,
    )


def _run(path, lives: float = float("inf")):
    """All analyses; the log without times, what was found, and the study."""
    directory = RunDirectory(path, {})
    try:
        study = _study(directory, lives)
        found = analyses.analyse(study, list(analyses.ANALYSES))
    finally:
        directory.close()
    lines = [json.loads(line) for line in (path / "candidates.jsonl").read_text().splitlines()]
    return [{**line, "seconds": 0} for line in lines], found, study


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return _run(tmp_path_factory.mktemp("analyses"))


def _objective(scores) -> float:
    return float(np.mean([scores[task] for task in TASKS]))


def _tested(weights: Mapping[str, float], split: str = "test") -> dict[str, float]:
    """Mean scores of named weights, by the formula."""
    rows = _scores([[weights[name] for name in NAMES]], ABILITY[split])
    return {task: float(row[0].mean(dtype=np.float64)) for task, row in rows.items()}


def _fake(weights: Sequence[float], own: Sequence[float]) -> Study:
    """A study of which only weights and the individuals' scores are known."""
    K = len(weights)
    individuals = [
        Candidate(k, 0, "individual", f"m{k}", "search", k, (1.0,), {"sums": score}, {}, 0.0)
        for k, score in enumerate(own)
    ]
    winner = Candidate(K, 0, "search", "search", "search", K, tuple(weights), {}, {}, 0.0)
    names = [f"m{k}" for k in range(K)]
    nothing = object.__new__(Archive)
    directory = object.__new__(RunDirectory)
    return Study(
        *(nothing, directory, names, define(["sums"]), individuals, Found("search", winner, 1, 10)),
        heldout=False,
        search_over=lambda chosen: pytest.fail("no search is needed"),
        pool_sizes=(),
    )


def test_only_what_is_asked_for(tmp_path):
    directory = RunDirectory(tmp_path, {})
    study = _study(directory, float("inf"))
    count = len(study.archive.past)
    found = analyses.analyse(study, ["nonzero", "weight_vs_score"])
    directory.close()
    assert list(found) == ["evaluations", "nonzero", "weight_vs_score"]
    assert found["evaluations"] == {"search": 0, "test": 0, "heldout": 0}
    assert len(study.archive.past) == count


def test_evaluations_are_those_in_the_log(made):
    lines, found, _ = made
    extra = [line for line in lines if line["origin"].startswith("analysis:")]
    first = next(i for i, line in enumerate(lines) if line in extra)
    assert lines[first:] == extra  # after all that the run itself needs
    for split, count in found["evaluations"].items():
        assert count == sum(line["split"] == split for line in extra)
    # Two searches of 4 generations of 6.
    assert found["evaluations"]["search"] == 48
    assert {line["origin"] for line in extra} == {
        "analysis:leave-one-out",
        "analysis:pool-size",
        "analysis:transfer",
    }


def test_nonzero_by_size():
    found = analyses.nonzero(_fake([0.6, -0.3, 0.01, 0.02], [0.0] * 4))
    assert found == {"threshold": 0.01, "share": 0.75, "checkpoints": ["m0", "m1", "m3"]}
    many = analyses.nonzero(_fake([0.005] * 199 + [0.0001], [0.0] * 200))
    assert many["threshold"] == pytest.approx(0.0005)
    assert many["share"] == pytest.approx(199 / 200)


def test_weight_against_score_is_exact_for_few():
    """Of 24 pairings of 4, one is perfectly in order, and one perfectly against it."""
    found = analyses.weight_vs_score(_fake([0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]))
    assert found["spearman"] == pytest.approx(1)
    assert found["p"] == pytest.approx(2 / 24)
    found = analyses.weight_vs_score(_fake([0.1, 0.2, 0.7], [0.9, 0.6, 0.1]))
    assert found["spearman"] == pytest.approx(-1)
    assert found["p"] == pytest.approx(2 / 6)


def test_weight_against_score_is_spearmans():
    """With ties; the p-value of 40 pairs is near that of the t distribution."""
    rng = np.random.default_rng(0)
    weights = rng.integers(20, size=40) / 20
    own = (weights + rng.normal(size=40)).round(1)
    found = analyses.weight_vs_score(_fake(weights.tolist(), own.tolist()))
    rho, p = spearmanr(weights, own)
    assert found["spearman"] == pytest.approx(rho)
    # Of 10,000 pairings the standard error is below 0.005; the t distribution is an approximation.
    assert found["p"] == pytest.approx(p, abs=0.02)


@pytest.mark.parametrize(
    ("weights", "own"),
    [
        ([0.25] * 4, [0.1, 0.2, 0.3, 0.4]),
        ([0.1, 0.2, 0.3, 0.4], [0.5] * 4),
        ([0.4, 0.6], [0.1, 0.2]),
    ],
)
def test_weight_against_score_may_say_nothing(weights, own):
    assert analyses.weight_vs_score(_fake(weights, own)) == {"spearman": None, "p": None}


def test_leave_one_out_renormalises(made):
    lines, found, study = made
    winner = dict(zip(NAMES, study.winner.candidate.weights))
    assert [entry["dropped"] for entry in found["leave_one_out"]] == list(NAMES)
    for entry in found["leave_one_out"]:
        weights = {**winner, entry["dropped"]: 0.0}
        total = sum(weights.values())
        expected = {name: weight / total for name, weight in weights.items()}
        assert entry["weights"] == pytest.approx(expected, abs=1e-6)
        assert entry["test"] == pytest.approx(_tested(entry["weights"]), abs=1e-6)
        assert entry["test_objective"] == pytest.approx(_objective(entry["test"]))
        delta = entry["test_objective"] - _objective(_tested(winner))
        assert entry["delta"] == pytest.approx(delta, abs=1e-6)
        assert entry["ci95"][0] <= entry["delta"] <= entry["ci95"][1]
        line = lines[entry["id"]]
        assert (line["split"], line["scores"]) == ("test", entry["test"])


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([0.5, 0.5, 0.0, 0.0], {"north": "east", "east": "north"}),  # what is left was tested
        ([0.0, 0.0, 1.0, 0.0], {}),  # nothing is left
        ([1.5, -0.5, 0.0, 0.0], {"east": "north"}),  # -0.5 can't be scaled to 1
    ],
)
def test_leave_one_out_where_little_is_left(tmp_path, weights, expected):
    directory = RunDirectory(tmp_path, {})
    study = _study(directory, float("inf"))
    row = np.asarray(weights, np.float32)
    study.archive.evaluate("test", [Request("final", "other", row)])
    winner = dataclasses.replace(study.winner.candidate, weights=tuple(weights))
    found = analyses.analyse(
        study._replace(winner=Found("search", winner, 24, 240)), ["leave_one_out"]
    )
    directory.close()
    alone = {
        entry["dropped"]: next(name for name, w in entry["weights"].items() if w == 1)
        for entry in found["leave_one_out"]
    }
    assert alone == expected
    assert found["evaluations"]["test"] == 0


def test_pool_sizes_are_searches_over_the_best(made):
    lines, found, study = made
    own = [_objective(one.scores) for one in study.individuals]
    order = [NAMES[k] for k in np.argsort(own)[::-1]]
    *smaller, whole = found["pool_size"]
    for m, entry in zip((2, 3), smaller):
        searched = [line for line in lines if line["name"] == f"best-{m}"][:24]
        assert {line["origin"] for line in searched} == {"analysis:pool-size"}
        assert {line["split"] for line in searched} == {"search"}
        assert entry["m"] == m
        assert entry["evaluations"] == len(searched)
        assert entry["checkpoints"] == order[:m]
        used = np.array([line["weights"] for line in searched]).any(axis=0)
        assert {NAMES[k] for k in np.flatnonzero(used)} == set(order[:m])
        best = max(searched, key=lambda line: (_objective(line["scores"]), -line["id"]))
        assert entry["id"] == best["id"]
        assert list(entry["weights"].values()) == best["weights"]
        assert entry["search_objective"] == pytest.approx(_objective(best["scores"]))
    assert whole["m"] == 4
    assert whole["id"] == study.winner.candidate.id
    assert whole["checkpoints"] == order
    for entry in found["pool_size"]:
        assert entry["test"] == pytest.approx(_tested(entry["weights"]), abs=1e-6)
        sample = {
            t: s[0] for t, s in _scores([[*entry["weights"].values()]], ABILITY["test"]).items()
        }
        assert entry["ci95"] == list(stats.interval(sample, study.objective))


def test_a_search_over_fewer_is_not_the_search(made):
    """Its candidates come after the winner is known, and are not among those of the search."""
    lines, _, study = made
    searched = [line for line in lines if line["origin"] == "search"]
    assert len(searched) == 24
    value = {line["id"]: _objective(line["scores"]) for line in searched}
    assert study.winner.candidate.id == max(value, key=lambda number: (value[number], -number))


def test_transfer_takes_the_best_of_each_pair(made):
    lines, found, _ = made
    eligible = [
        line
        for line in lines
        if line["split"] == "search" and not line["origin"].startswith("analysis:")
    ]
    pairs = [["sums", "words"], ["sums", "code"], ["words", "code"]]
    assert [entry["tasks"] for entry in found["transfer"]] == pairs
    for entry in found["transfer"]:
        a, b = entry["tasks"]
        best = max(eligible, key=lambda line: (line["scores"][a] + line["scores"][b], -line["id"]))
        assert entry["id"] == best["id"]
        expected = {**_tested(entry["weights"]), **_tested(entry["weights"], "heldout")}
        assert entry["test"] == pytest.approx(expected, abs=1e-6)
    assert len({entry["id"] for entry in found["transfer"]}) > 1


def test_transfer_follows_the_objective(tmp_path):
    """Tasks of other units: a gain in units of the pool's range, not the sum of scores."""
    directory = RunDirectory(tmp_path, {})
    study = _study(directory, float("inf"))
    scores = [one.scores for one in study.individuals]
    normalised = define(TASKS, (), "normalised").measured_by(scores)
    found = analyses.analyse(study._replace(objective=normalised), ["transfer"])
    directory.close()
    span = {
        task: max(one[task] for one in scores) - min(one[task] for one in scores) for task in TASKS
    }
    eligible = [line for line in study.archive.past if line.split == "search"]
    for entry in found["transfer"]:
        gain = [sum(line.scores[task] / span[task] for task in entry["tasks"]) for line in eligible]
        assert entry["id"] == eligible[int(np.argmax(gain))].id


def test_over_some_tasks():
    whole = Objective({"a": 0.5, "b": 0.3, "c": 0.2}, "weighted")
    assert whole.over(["a", "b"]).weights == pytest.approx({"a": 0.625, "b": 0.375})
    assert whole.over(["a", "b"]).aggregate == "weighted"


def test_killed_at_any_step_it_ends_the_same(made, tmp_path):
    """In each of the analyses that evaluate."""
    lines, found, _ = made
    for lives, origin in ((14, "leave-one-out"), (20, "pool-size"), (27, "pool-size")):
        path = tmp_path / str(lives)
        with pytest.raises(Killed):
            _run(path, lives)
        last = (path / "candidates.jsonl").read_text().splitlines()[-1]
        assert json.loads(last)["origin"] == f"analysis:{origin}"
        again, other, _ = _run(path)
        assert again == lines
        assert other == found
