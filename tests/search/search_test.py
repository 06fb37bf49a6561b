"""The search and its baselines, over an evaluator that is a formula."""

import dataclasses
import json
from collections.abc import Iterable, Sequence

import numpy as np
import pytest

from jaxmerge.errors import JaxmergeError
from jaxmerge.evaluation.evaluator import Evaluator, Step
from jaxmerge.merge import schedules
from jaxmerge.rundir import Candidate, RunDirectory, cost
from jaxmerge.scores.objective import define
from jaxmerge.search import baselines
from jaxmerge.search.archive import Archive, Request
from jaxmerge.search.baselines import Setting
from jaxmerge.search.loop import search
from jaxmerge.search.space import WINDOW, numbers_of_window, weights
from jaxmerge.search.strategies import Strategy, evosax

NAMES = ("north", "east", "south", "west")
OBJECTIVE = define(["sums", "words"])
COST = 45  # tokens of a candidate
# How well each checkpoint answers 8 questions of each task; a merge scores the weighted mean,
# squashed, so that the optimum lies inside the simplex.
ABILITY = {
    "sums": np.random.default_rng(0).uniform(size=(4, 8)),
    "words": np.random.default_rng(1).uniform(size=(4, 8)),
}


class Killed(BaseException):
    """What a SIGKILL is in these tests."""


class Formula(Evaluator):
    """An evaluator without a model: scores are a formula of the weights."""

    def __init__(self, lives: float = float("inf")):
        self.candidates_per_step = 3
        self.evaluated, self.lives = 0, lives

    @property
    def examples(self):
        return {"sums": 8, "words": 8}

    @property
    def read(self):
        return 40

    def steps(self, weights_PxK):
        for start in range(0, len(weights_PxK), self.candidates_per_step):
            rows = weights_PxK[start : start + self.candidates_per_step].astype(np.float64)
            self.lives -= 1
            if self.lives < 0:
                raise Killed
            self.evaluated += len(rows)
            scores = {task: np.tanh(2 * rows @ ability) for task, ability in ABILITY.items()}
            yield Step(scores, np.full(len(rows), COST - self.read))


# One argument is one that the tests vary.
def _run(
    path,
    lives=float("inf"),
    budget=40,
    save_seconds=0.0,
    strategy="CMA_ES",
    aggregate="mean",
    budget_tokens=0,
):
    """A whole search with baselines; the log as written, the winner, and evaluations made."""
    directory = RunDirectory(path, {})
    formula = Formula(lives)
    objective = define(["sums", "words"], (), aggregate)
    try:
        archive = Archive(directory, {"search": formula})
        individuals = baselines.individuals(archive, NAMES)
        objective = objective.measured_by([one.scores for one in individuals])
        setting = Setting(
            *(archive, individuals, objective, 0, 10 * COST),
            losses=lambda: (np.arange(len(NAMES), dtype=np.float64), COST),
            distances=lambda: np.arange(len(NAMES), dtype=np.float64),
        )
        for baseline in baselines.BASELINES.values():
            baseline.find(setting)
        best = search(
            archive,
            STRATEGIES[strategy],
            lambda z: weights(z, "softmax", (-8.0, 8.0)),
            objective=objective,
            budget=budget,
            budget_tokens=budget_tokens,
            seed=1,
            states=path / "state",
            save_seconds=save_seconds,
        )
    finally:
        directory.close()
    lines = [json.loads(line) for line in (path / "candidates.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"]
    return lines, best, formula.evaluated


def _scored(lines: Iterable[str]) -> int:
    """Those that are no copies of earlier ones of the same weights."""
    return sum(json.loads(line)["tokens"]["read"] > 0 for line in lines)


STRATEGIES: dict[str, Strategy] = {name: evosax(name, 4, 8) for name in ("CMA_ES", "SimpleGA")}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("save_seconds", [0.0, 1e9])
def test_killed_at_any_step_it_ends_the_same(tmp_path, save_seconds, strategy):
    """With the state saved every generation, or never, when the log alone brings it back."""
    options = {"save_seconds": save_seconds, "strategy": strategy}
    lines, best, evaluated = _run(tmp_path / "whole", **options)
    for lives in range(1, 25, 4):  # of 25 steps
        path = tmp_path / str(lives)
        with pytest.raises(Killed):
            _run(path, lives, **options)
        before = _scored((path / "candidates.jsonl").read_text().splitlines())
        again, same_best, rest = _run(path, **options)
        assert again == lines
        assert same_best.weights == best.weights
        assert rest == evaluated - before
    assert evaluated == _scored(json.dumps(line) for line in lines)


def test_a_search_over_a_window_has_its_two_numbers_in_the_log(tmp_path):
    """Each candidate's weights are those of its numbers, also as the log is read again."""
    directory = RunDirectory(tmp_path, {})
    best = search(
        Archive(directory, {"search": Formula()}),
        evosax("CMA_ES", 2, 4),
        lambda z: weights(z, WINDOW, checkpoints=4),
        objective=OBJECTIVE,
        budget=12,
        numbers=lambda z: numbers_of_window(z, 4),
    )
    directory.close()
    again = RunDirectory(tmp_path, {})
    again.close()
    assert again.candidates == directory.candidates
    assert best in again.candidates
    for one in again.candidates:
        assert one.window is not None
        length, exponent = (np.asarray(each) for each in one.window.values())
        expected = schedules.window(length, exponent, 4)
        np.testing.assert_allclose(one.weights, expected, atol=1e-6)  # float32


def test_a_finished_search_evaluates_nothing_again(tmp_path):
    lines, *_ = _run(tmp_path)
    again, _, evaluated = _run(tmp_path)
    assert evaluated == 0
    assert again == lines


def test_half_a_step_is_evaluated_again_as_a_whole(tmp_path):
    """A torn write leaves part of a step; steps stay the same groups of candidates."""
    lines, *_ = _run(tmp_path)
    log = tmp_path / "candidates.jsonl"
    text = log.read_text().splitlines(keepends=True)
    cut = next(line["id"] for line in lines if line["origin"] == "search") + 4
    log.write_text("".join(text[:cut]) + text[cut][:20])
    again, _, evaluated = _run(tmp_path)
    assert again == lines
    assert evaluated == sum(line["tokens"]["read"] > 0 for line in lines[cut - 1 :])


def test_another_log_is_refused(tmp_path):
    lines, *_ = _run(tmp_path)
    log = tmp_path / "candidates.jsonl"
    first_searched = next(line["id"] for line in lines if line["origin"] == "search")
    text = log.read_text().splitlines(keepends=True)
    changed = json.loads(text[first_searched])
    changed["weights"][0] += 0.01
    text[first_searched] = json.dumps(changed) + "\n"
    log.write_text("".join(text))
    for state in (tmp_path / "state").iterdir():
        state.rename(tmp_path / "moved")
    with pytest.raises(JaxmergeError, match=f"candidate {first_searched}"):
        _run(tmp_path)
    assert log.read_text() == "".join(text)


def test_a_damaged_state_is_refused(tmp_path):
    with pytest.raises(Killed):
        _run(tmp_path, lives=24)
    (state,) = (tmp_path / "state").iterdir()
    for data in state.glob("state/**/d/*"):  # Orbax leaves files that are not read any more
        content = bytearray(data.read_bytes())
        content[len(content) // 3] ^= 1
        data.write_bytes(content)
    with pytest.raises(JaxmergeError, match="state"):
        _run(tmp_path)


def test_the_winner_is_the_best_of_the_search(tmp_path):
    lines, best, _ = _run(tmp_path)
    searched = [line for line in lines if line["origin"] == "search"]
    value = {line["id"]: sum(line["scores"].values()) for line in searched}
    assert best.id == max(value, key=lambda number: (value[number], -number))
    assert len(searched) == 40
    assert [line["generation"] for line in searched] == [i // 8 for i in range(40)]


def test_the_search_beats_the_individuals(tmp_path):
    """On a smooth objective; and its last generation is better than its first."""
    lines, best, _ = _run(tmp_path, budget=160)
    value = [sum(line["scores"].values()) / 2 for line in lines]
    origin = [line["origin"] for line in lines]
    individual = max(v for v, o in zip(value, origin) if o == "individual")
    assert OBJECTIVE.of(best.scores) > individual
    searched = [v for v, o in zip(value, origin) if o == "search"]
    assert np.mean(searched[-8:]) > np.mean(searched[:8])


@pytest.mark.parametrize("aggregate", ["worst", "normalised", "chebyshev"])
def test_the_search_follows_the_aggregate(tmp_path, aggregate):
    """Its winner is the best of its candidates by that aggregate, computed here from the log."""
    lines, best, _ = _run(tmp_path, budget=80, aggregate=aggregate)
    individuals = [line["scores"] for line in lines if line["origin"] == "individual"]
    top = {task: max(scores[task] for scores in individuals) for task in ABILITY}
    span = {task: top[task] - min(scores[task] for scores in individuals) for task in ABILITY}

    def value(scores):
        gains = [(scores[task] - top[task]) / span[task] for task in ABILITY]
        return {
            "worst": min(scores.values()),
            "normalised": sum(gains) / 2,
            "chebyshev": min(gains) + 0.05 * sum(gains),
        }[aggregate]

    searched = [line for line in lines if line["origin"] == "search"]
    assert value(best.scores) == pytest.approx(max(value(line["scores"]) for line in searched))
    assert value(best.scores) > max(map(value, individuals))


def test_budget_below_a_generation(tmp_path):
    with pytest.raises(JaxmergeError, match=r"search\.budget"):
        _run(tmp_path, budget=7)


# Asking for a generation takes 7 + 3 * 10 tokens, for the first 30 more.
DEAR = STRATEGIES["CMA_ES"]._replace(
    tokens=lambda generation: {"read": 7 if generation else 37, "differentiated": 10}
)


@pytest.mark.parametrize(
    ("strategy", "tokens", "generations"),
    [
        ("CMA_ES", 24 * COST, 3),
        ("CMA_ES", 24 * COST - 1, 2),
        ("dear", 16 * COST + 30 + 2 * 37, 2),
        ("dear", 16 * COST + 30 + 2 * 37 - 1, 1),
        ("CMA_ES", 10**6, 5),  # the evaluations end it
    ],
)
def test_a_budget_in_tokens_is_never_passed(tmp_path, monkeypatch, strategy, tokens, generations):
    """It is used up to the last token where that makes a generation; also when killed."""
    monkeypatch.setitem(STRATEGIES, "dear", DEAR)
    lines, best, _ = _run(tmp_path / "whole", strategy=strategy, budget_tokens=tokens)
    with pytest.raises(Killed):
        _run(tmp_path / "killed", lives=8, strategy=strategy, budget_tokens=tokens)
    again, *_ = _run(tmp_path / "killed", strategy=strategy, budget_tokens=tokens)
    assert again == lines
    searched = [line for line in lines if line["origin"] == "search"]
    assert len(searched) == 8 * generations
    assert best.id in {line["id"] for line in searched}
    first = {"read": 37, "differentiated": 10} if strategy == "dear" else {}
    assert searched[0]["tokens"] == {
        "read": 40 + first.get("read", 0),
        "written": 5,
        **{kind: count for kind, count in first.items() if kind != "read"},
    }
    assert searched[1]["tokens"] == {"read": 40, "written": 5}
    assert sum(cost(line["tokens"]) for line in searched) <= tokens


def test_tokens_for_less_than_a_generation(tmp_path):
    with pytest.raises(JaxmergeError, match=r"(?s)search\.budget_tokens.*360 tokens"):
        _run(tmp_path, budget_tokens=8 * COST - 1)


def test_random_draws_have_the_tokens_of_the_search(tmp_path):
    """Never more, and less by less than one candidate; one is drawn in any case."""

    class Uneven(Formula):
        def steps(self, weights_PxK):
            for step in super().steps(weights_PxK):  # 13 to 15; the checkpoints have a 15 too
                yield step._replace(written_C=13 + np.arange(len(step.written_C)) % 3)

    for tokens in (1, 400, 1000, 3000):
        directory = RunDirectory(tmp_path / str(tokens), {})
        archive = Archive(directory, {"search": Uneven()})
        individuals = baselines.individuals(archive, NAMES)
        found = baselines.random(Setting(archive, individuals, OBJECTIVE, 0, tokens))
        drawn = [one for one in archive.past if one.origin == "baseline:random"]
        assert found.tokens == sum(one.cost for one in drawn)
        assert found.evaluations == len(drawn)
        assert tokens - 55 < found.tokens <= max(tokens, 55)
        directory.close()


def _rated(k: int, scores: dict[str, float]) -> Candidate:
    one_hot = tuple(map(float, np.eye(4)[k]))
    return Candidate(k, 0, "individual", NAMES[k], "search", k, one_hot, scores, {}, 0.0)


class Table(Archive):
    """An archive that looks merges up by the checkpoints in them."""

    def __init__(self, scores: dict[tuple[int, ...], float]):
        self.scores, self.asked = scores, []

    def evaluate(self, split: str, requests: Sequence[Request]) -> list[Candidate]:
        (request,) = requests
        self.asked.append(tuple(np.flatnonzero(request.coefficients).tolist()))
        score = {"sums": self.scores.get(self.asked[-1], 0.0)}
        weights = tuple(map(float, request.coefficients))
        return [dataclasses.replace(_rated(0, score), weights=weights)]


def _setting(individual_scores: list[float], merges: dict[tuple[int, ...], float]) -> Setting:
    individuals = [_rated(k, {"sums": score}) for k, score in enumerate(individual_scores)]
    return Setting(Table(merges), individuals, define(["sums"]), 0)


def test_greedy_soup_keeps_what_helps():
    """Order: best first; kept when at least as good: 2, then 0 (worse), then 3 (equal), then 1."""
    setting = _setting([0.6, 0.2, 0.8, 0.5], {(0, 2): 0.7, (2, 3): 0.8, (1, 2, 3): 0.9})
    found = baselines.greedy(setting)
    assert isinstance(setting.archive, Table)
    assert setting.archive.asked == [(0, 2), (2, 3), (1, 2, 3)]
    assert found.evaluations == 3
    np.testing.assert_allclose(found.candidate.weights, [0, 1 / 3, 1 / 3, 1 / 3], rtol=1e-6)


def test_greedy_soup_may_stay_alone():
    setting = _setting([0.6, 0.2, 0.8, 0.5], {})
    assert baselines.greedy(setting).candidate is setting.individuals[2]


def test_best_per_task_counts_twice_who_is_best_twice():
    scores = {"a": [0.0, 1, 0, 0], "b": [0.0, 2, 1, 0], "c": [5.0, 1, 0, 0]}
    rated = [
        _rated(k, {task: float(values[k]) for task, values in scores.items()}) for k in range(4)
    ]
    found = baselines.best_per_task(Setting(Table({}), rated, define(list(scores)), 0))
    np.testing.assert_allclose(found.candidate.weights, [1 / 3, 2 / 3, 0, 0], rtol=1e-6)


def test_baselines_cost_what_they_say(tmp_path):
    """Tokens for 10 candidates are what `_run` gives them."""
    lines, *_ = _run(tmp_path)
    for name, baseline in baselines.BASELINES.items():
        made = sum(line["origin"] == f"baseline:{name}" for line in lines)
        assert made == baseline.evaluations(len(NAMES), 10)


def test_random_draws_from_the_simplex(tmp_path):
    lines, *_ = _run(tmp_path)
    drawn = np.array([line["weights"] for line in lines if line["origin"] == "baseline:random"])
    assert drawn.shape == (10, 4)
    assert (drawn >= 0).all()
    np.testing.assert_allclose(drawn.sum(axis=1), 1, atol=1e-6)
    assert len(np.unique(drawn, axis=0)) == 10
