"""Searches along gradients, and what they start from and go on to."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from jaxmerge import config as configs
from jaxmerge import report
from jaxmerge.checkpoints import orbax
from jaxmerge.errors import JaxmergeError
from jaxmerge.evaluation.soft import Slope
from jaxmerge.experiment import budget
from jaxmerge.experiment.search import search
from jaxmerge.rundir import Candidate, cost
from jaxmerge.scores.calibration import Line
from jaxmerge.scores.objective import define
from jaxmerge.search import baselines, gradient, space
from jaxmerge.search.archive import Archive
from jaxmerge.search.baselines import Setting
from jaxmerge.trees import named_leaves
from tests import tiny


@pytest.mark.parametrize("shrink", [0.0, 0.5])
@pytest.mark.parametrize("constraint", space.CONSTRAINTS)
def test_genotypes_give_their_weights_back(constraint, shrink):
    z_PxD = np.random.default_rng(3).normal(size=(1, 6))
    (weights,) = space.weights(z_PxD, constraint, groups=2, shrink=shrink)
    found = space.genotypes(weights, constraint, shrink=shrink).reshape(1, 6)
    again = space.weights(found, constraint, groups=2, shrink=shrink)
    # A mean over groups of logarithms of sums is another than that of the genotypes.
    np.testing.assert_allclose(again[0], weights, atol=1e-6)


def straight(seen):
    """Soft scores are the true ones."""
    return dict.fromkeys("ab", Line("probability", 1.0, 1.0, 0.0))


@pytest.mark.parametrize("constraint", space.CONSTRAINTS)
def test_the_objective_rises_to_a_known_optimum(constraint):
    """On a soft score that is a parabola in the weights, whose best are known."""
    best = np.array([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]])

    def slopes(weights_GxK, step, forms):
        off = weights_GxK.astype(np.float64) - best
        return {"a": Slope(np.full(3, 1 - np.sum(off**2)), -2 * off)}

    settings = gradient.Settings("adam", 0.1, "cosine", 300, 100)
    strategy = gradient.gradient(
        *(slopes, straight, settings, define(["a"])),
        start=np.zeros((2, 3), np.float32),
        mapped=functools.partial(space.mapped, constraint=constraint),
        summing=0 if constraint == "free" else 3,
    )
    state = strategy.init(0)
    for generation in range(settings.generations):
        z_PxD, state = strategy.ask(0, generation, state)
    found = space.weights(z_PxD, constraint, groups=2)
    np.testing.assert_allclose(found[0], best, atol=0.02)
    np.testing.assert_allclose(found[1], best, atol=0.05)  # the mean of the last half


@pytest.mark.parametrize(("smoothing", "expected"), [(0.0, 0.5), (0.5, 0.8)])
def test_a_narrow_maximum_does_not_hold_a_smoothed_search(smoothing, expected):
    """The soft score has a wide maximum at a weight of 0.8, and a narrow one where it starts."""

    def slopes(weights_GxK, step, forms):
        off = weights_GxK[0, 0] - np.array([0.8, 0.5])
        height, width = np.array([1.0, 0.5]), np.array([0.4, 0.02])
        each = height * np.exp(-((off / width) ** 2) / 2)
        by_first = np.sum(-off / width**2 * each)
        return {"a": Slope(np.full(3, each.sum()), np.array([[by_first, 0.0]]))}

    settings = gradient.Settings("adam", 0.05, "cosine", 200, 200, smoothing)
    strategy = gradient.gradient(
        *(slopes, straight, settings, define(["a"])),
        start=np.zeros((1, 2), np.float32),
        mapped=functools.partial(space.mapped, constraint="signed"),
        summing=2,
    )
    found = [strategy.ask(seed, 0, strategy.init(seed))[0] for seed in (1, 1, 2)]
    np.testing.assert_array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2]) == (smoothing == 0)
    assert space.weights(found[0], "signed")[0, 0] == pytest.approx(expected, abs=0.1)


def test_the_two_numbers_of_a_window_are_climbed():
    """From the uniform merge to a window whose weights are the best."""
    best = np.asarray(space.window(np.log(np.array([3.4 / 6, 0.6])), 6))

    def slopes(weights_GxK, step, forms):
        off = weights_GxK.astype(np.float64) - best
        return {"a": Slope(np.full(3, 1 - np.sum(off**2)), -2 * off)}

    settings = gradient.Settings("adam", 0.1, "cosine", 200, 200)
    strategy = gradient.gradient(
        *(slopes, straight, settings, define(["a"])),
        start=np.zeros((1, 2), np.float32),
        mapped=functools.partial(space.mapped, constraint=space.WINDOW, checkpoints=6),
        summing=6,
    )
    z_PxD, _ = strategy.ask(0, 0, strategy.init(0))
    (numbers, _) = space.numbers_of_window(z_PxD, 6)
    assert numbers["length"] == pytest.approx(3.4, abs=0.1)
    assert numbers["exponent"] == pytest.approx(0.6, abs=0.05)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("optimizer", "adamm"),
        ("optimizer", "cosine_decay_schedule"),
        ("optimizer", "lbfgs"),
        ("optimizer", "clip"),
        ("schedule", "cosin"),
        ("steps", 0),
        ("learning_rate", 0.0),
        ("score_every", 0),
        ("smoothing", -0.1),
    ],
)
def test_settings_that_can_not_be(field, value):
    config = configs.default()
    config.search[field] = value
    with pytest.raises(JaxmergeError, match=f"search.{field}"):
        gradient.check(configs.settings(config))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    pool = tiny.pool(tmp_path_factory.mktemp("pool"))
    workdir = tmp_path_factory.mktemp("run")
    return pool, workdir, search(_config(pool), str(workdir))


def _config(pool):
    config = tiny.run_config(configs.default(), pool)
    config.objective.tasks, config.heldout = ("words", "choice"), ()
    config.tasks.words = {"builder": "sorting"}
    config.search.strategy = "gradient"
    config.search.population = 0
    config.search.steps, config.search.score_every, config.search.minibatch = 6, 2, 4
    config.analyses.leave_one_out = config.analyses.transfer = False
    return config


def test_a_whole_run(finished):
    """It logs the iterates and their means, and says what it cost and found."""
    _, workdir, found = finished
    assert found["evaluations_by_origin"]["search"] == 6
    log = [line for line in tiny.log(workdir) if line["origin"] == "search"]
    kinds_of = [sorted(line["tokens"]) for line in log]
    # The first of each two has the steps before it; the first of all, the choice of the forms too.
    assert kinds_of == [["differentiated", "read", "written"], ["read", "written"]] * 3
    assert log[0]["tokens"]["read"] > log[2]["tokens"]["read"] > 0
    steps = sum(line["tokens"].get("differentiated", 0) for line in log)
    assert found["tokens"]["differentiated"] == steps
    assert found["best"]["tokens"] == sum(cost(line["tokens"]) for line in log)
    assert found["curves"]["search"][-1]["search_objective"] == max(
        np.mean([*line["scores"].values()]) for line in log
    )
    (random,) = [entry for entry in found["baselines"] if entry["name"] == "random"]
    dearest = max(cost(line["tokens"]) for line in tiny.log(workdir) if line["split"] == "search")
    assert found["best"]["tokens"] - dearest < random["tokens"] <= found["best"]["tokens"]
    assert found["groups"][0] == "embedding"
    best = max(
        (line for line in tiny.log(workdir) if line["split"] == "search"),
        key=lambda line: np.mean([*line["scores"].values()]),
    )
    assert found["best"]["search_objective"] == pytest.approx(np.mean([*best["scores"].values()]))
    assert set(found["soft"]) == {"words", "choice"}
    expected = [sorted(line["expected"] or ()) for line in log]
    assert expected == [["choice", "words"], []] * 3
    page = (workdir / "report.html").read_text()
    assert "What was climbed" in page
    assert "Weights by group" in page or "groups" not in found["best"]
    schema = Path(report.__file__).with_name("results.schema.json")
    written = (workdir / "results.json").read_text()
    jsonschema.validate(json.loads(written), json.loads(schema.read_text()))


def _within(tokens):
    """Before the first step 1,000 tokens, each 300 more, and every ten of them 2 x 650 more."""
    settings = configs.settings(configs.default())
    found = budget.within_tokens(settings, tokens, 1_000, lambda steps: 100 * len([*steps]), 1_300)
    assert found == settings._replace(steps=found.steps)
    return found.steps


@pytest.mark.parametrize(
    ("tokens", "steps"),
    [(0, 60), (10**6, 60), (26_800, 60), (26_799, 59), (5_300, 10), (6_899, 10), (6_900, 11)],
)
def test_steps_are_as_many_as_the_tokens_are_enough_for(tokens, steps):
    assert _within(tokens) == steps


def test_tokens_for_less_than_a_step(tmp_path_factory, finished):
    assert _within(2_600) == 1
    assert _within(2_599) == 0
    config = _config(finished[0])
    config.search.budget_tokens = 100
    with pytest.raises(JaxmergeError, match=r"search\.budget_tokens") as caught:
        search(config, str(tmp_path_factory.mktemp("poor")))
    config.search.budget_tokens = int(str(caught.value.expected).split()[-1])
    search(config, str(tmp_path_factory.mktemp("enough")))


def test_it_starts_from_the_best_that_there_is(finished, tmp_path):
    """A single checkpoint or a baseline, with a twentieth of the uniform merge; also among some."""
    config = _config(finished[0])
    config.search.start, config.search.steps, config.search.learning_rate = "best", 1, 1e-6
    config.analyses.pool_sizes = (2,)
    search(config, str(tmp_path))
    log = tiny.log(tmp_path)
    known = [one for one in log if one["origin"] in ("individual", "baseline:uniform")]
    known += [one for one in log if one["origin"] in ("baseline:greedy", "baseline:best-per-task")]
    best = max(known, key=lambda one: (np.mean([*one["scores"].values()]), -one["id"]))
    (first, *_) = [one for one in log if one["origin"] == "search"]
    expected = 0.95 * np.array(best["weights"]) + 0.05 / 3
    np.testing.assert_allclose(np.array(first["weights"])[0], expected, atol=1e-5)
    (of_two, *_) = [one for one in log if one["origin"] == "analysis:pool-size"]
    rows = np.array(of_two["weights"])
    assert np.count_nonzero(rows.max(axis=0)) == 2
    chosen = np.where(rows[0] > 0, expected, 0)
    np.testing.assert_allclose(rows[0], chosen / chosen.sum(), atol=1e-5)


@pytest.mark.parametrize(
    ("start", "strategy", "granularity"),
    [
        ("metagpt", "gradient", "leaf"),
        ("lm-cocktail", "CMA_ES", "model"),
        ("best", "surrogate", "layer"),
    ],
)
def test_published_recipes_are_baselines_and_starts(tmp_path, start, strategy, granularity):
    """MetaGPT's weights are those of its formula in float64; the search begins at what it names."""
    trees = tiny.trees(4)
    pool, base = tiny.pool(tmp_path / "pool"), tmp_path / "base"
    orbax.save(base, trees[3], architecture=tiny.model().architecture)
    config = _config(pool)
    config.pool.base, config.space.granularity = str(base), granularity
    config.baselines = ("uniform", "greedy", "lm-cocktail", "metagpt")
    config.search.start, config.search.strategy = start, strategy
    config.search.steps, config.search.learning_rate, config.search.sigma = 1, 1e-6, 1e-6
    config.search.budget = 12
    found = search(config, str(tmp_path / "run"))
    weights = {one["name"]: [*one["weights"].values()] for one in found["baselines"]}
    leaves = [named_leaves(tree) for tree in trees]
    squares = [
        sum(np.sum((np.float64(tree[name]) - np.float64(leaves[3][name])) ** 2) for name in tree)
        for tree in leaves[:3]
    ]
    np.testing.assert_allclose(weights["metagpt"], np.array(squares) / sum(squares), rtol=1e-5)
    (cocktail,) = [one for one in found["baselines"] if one["name"] == "lm-cocktail"]
    log = tiny.log(tmp_path / "run")
    (scored,) = [one for one in log if one["origin"] == "baseline:lm-cocktail"]
    assert cocktail["tokens"] > cost(scored["tokens"])  # the losses took some
    (first, *_) = [one for one in log if one["origin"] == "search"]
    known = [one for one in log if one["origin"] == "individual" or "baseline" in one["origin"]]
    begun = [one for one in known if one["name"] == start]
    begun = begun or [max(known, key=lambda one: np.mean([*one["scores"].values()]))]
    expected = 0.95 * np.array(begun[-1]["weights"]) + 0.05 / 3
    for row in np.reshape(first["weights"], (-1, 3)):
        np.testing.assert_allclose(row, expected, atol=1e-4)


def test_what_recipes_and_starts_want():
    """A start is a baseline of the run, MetaGPT a base, LM-Cocktail losses: of them a softmax."""
    config = _config("pool")
    config.search.start = "metagpt"
    with pytest.raises(JaxmergeError, match=r"(?s)search\.start.*metagpt"):
        configs.check(config)  # no baseline of the run
    config.baselines = ("uniform", "metagpt")
    with pytest.raises(JaxmergeError, match=r"pool\.base"):
        configs.check(config)
    asked = []

    class Scored(Archive):
        def __init__(self):
            """Without a directory."""

        def evaluate(self, split, requests):
            asked.extend(request.coefficients for request in requests)
            return [Candidate(0, 0, "", "", split, 0, (), {"a": 0.0}, {}, 0.0)]

    given = Setting(Scored(), (), define(["a"]), 0, losses=lambda: (np.array([1.0, 6.0]), 7))
    assert baselines.lm_cocktail(given).tokens == 7
    np.testing.assert_allclose(asked[0], [np.e / (np.e + 1), 1 / (np.e + 1)], rtol=1e-6)


def test_a_judge_takes_part(tmp_path_factory):
    """Texts of single checkpoints that a program accepted are climbed; then a strategy goes on."""
    pool = tiny.pool(tmp_path_factory.mktemp("judged"))
    config = _config(pool)
    config.tasks.words = {"builder": "tests.search.gradient_test:judged"}
    config.search.strategy, config.search.warm_start = "Sep_CMA_ES", "gradient"
    config.search.population, config.search.budget = 4, 8
    workdir = tmp_path_factory.mktemp("warm")
    found = search(config, str(workdir))
    assert 0 < found["soft"]["words"]["by_texts"] < 12
    log = tiny.log(workdir)
    assert [line["origin"] for line in log].count("warm-start") == 6
    assert [line["origin"] for line in log].count("search") == 8
    after = np.array([line["weights"] for line in log if line["origin"] == "search"][:4])
    before = np.array([line["weights"] for line in log if line["origin"] == "warm-start"][-1])
    assert np.abs(after.mean(0) - before).max() < 0.1  # it starts where gradients ended
    (workdir / "candidates.jsonl").write_text(
        "".join((workdir / "candidates.jsonl").read_text().splitlines(keepends=True)[:13])
    )
    shutil.rmtree(workdir / "state", ignore_errors=True)
    assert search(config, str(workdir))["best"] == found["best"]
    assert tiny.log(workdir) == log


def judged(search, test):
    return dataclasses.replace(
        tiny.generation(search=search, test=test),
        judge=lambda _, texts: float(any(letter in "aeiou" for letter in texts[0])),
    )


@pytest.mark.parametrize("kept", [12, 17])
def test_goes_on_where_it_stopped(finished, tmp_path, kept):
    """With any part of the log there, and the optimiser's state or without, it ends the same."""
    pool, workdir, found = finished
    shutil.copytree(workdir, tmp_path / "run")
    log = tmp_path / "run" / "candidates.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:kept]))
    if kept % 2:
        shutil.rmtree(tmp_path / "run" / "state")
    again = search(_config(pool), str(tmp_path / "run"))
    assert tiny.log(tmp_path / "run") == tiny.log(workdir)
    assert again["best"] == found["best"]
    assert again["tokens"] == found["tokens"]


@pytest.mark.parametrize(("aggregate", "share"), [("mean", 1.0), ("worst", 0.5)])
def test_the_worst_task_is_climbed(aggregate, share):
    """Two tasks that each want one of two checkpoints; one gains twice as much, the other starts
    below it by what its line says."""

    def slopes(weights_GxK, step, forms):
        (first, second) = weights_GxK[0].astype(np.float64)
        return {
            "a": Slope(np.full(3, 2 * first), np.array([[2.0, 0.0]])),
            "b": Slope(np.full(3, second), np.array([[0.0, 1.0]])),
        }

    def lines(seen):
        return {**straight(seen), "b": Line("probability", 1.0, 1.0, 0.5)}

    settings = gradient.Settings("adam", 0.3, "cosine", 400, 400)
    strategy = gradient.gradient(
        *(slopes, lines, settings, define(["a", "b"], aggregate=aggregate)),
        start=np.zeros((1, 2), np.float32),
        mapped=space.mapped,
        summing=2,
    )
    z_PxD, state = strategy.ask(0, 0, strategy.init(0))
    found = space.weights(z_PxD)[0]
    np.testing.assert_allclose(found[0], share, atol=0.05)
    assert strategy.expected(0, state)["b"] > 0.5


def test_weights_that_change_nothing_stay():
    """Of groups that are equal in all checkpoints, whatever rounding their derivatives have."""

    def slopes(weights_GxK, step, forms):
        noise = 1e-3 * np.array([[1.0, 1.0, 1.0], [1.0, 2.0, 3.0]])
        return {"a": Slope(np.full(3, 0.5), noise)}

    settings = gradient.Settings("adam", 0.1, "constant", 50, 50)
    strategy = gradient.gradient(
        *(slopes, straight, settings, define(["a"])),
        start=np.array([[0.3, -0.2, 0.1]] * 2, np.float32),
        mapped=space.mapped,
        summing=3,
    )
    z_PxD, _ = strategy.ask(0, 0, strategy.init(0))
    np.testing.assert_allclose(z_PxD[0, :3], [0.3, -0.2, 0.1], atol=1e-6)
    assert z_PxD[0, 5] > 0.1 + 1.0
