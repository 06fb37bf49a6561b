"""The soft score and its derivatives, and searches along them."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge import config as configs
from jaxmerge.errors import JaxmergeError
from jaxmerge.evaluation.rows import Limits
from jaxmerge.evaluation.soft import FORMS, Slope, SoftScore
from jaxmerge.evaluation.tokenizer import Bytes
from jaxmerge.experiment import climb
from jaxmerge.experiment.search import search
from jaxmerge.merge.differences import QuantisedMerger, quantised
from jaxmerge.merge.groups import groups
from jaxmerge.merge.leafwise import LeafwiseMerger
from jaxmerge.merge.linear import merger
from jaxmerge.merge.pullback import pullback
from jaxmerge.merge.rematerialised import RematerialisingMerger
from jaxmerge.rundir import Candidate, cost
from jaxmerge.scores.objective import define
from jaxmerge.search import gradient, space
from jaxmerge.sharding import make_mesh, shardings
from jaxmerge.tasks import build, kinds
from jaxmerge.tasks.common import Example, accepting, wants_texts
from jaxmerge.tasks.requests import Likelihood, Prompt
from jaxmerge.trees import named_leaves
from tests import tiny

K = 3
MODEL = tiny.model()
TREES = tiny.trees(K, scale=1.0)
FINEST = groups(TREES[0], "leaf", layers="layers")
WORDS = tiny.letters(7, 24)
SPLITS = {"search": [Example(word, word[:2]) for word in WORDS], "test": []}
OPTIONS = {
    "search": [
        Example(word, word[:2], (word[:2], word[1:4], "zq")[: 2 + i % 2])
        for i, word in enumerate(WORDS)
    ],
    "test": [],
}
TASKS = {
    "answer": kinds.generation("answer", SPLITS),
    "ended": kinds.generation("ended", SPLITS, until=("\n",)),
    "choice": kinds.multiple_choice("choice", OPTIONS),
    "bytes": kinds.multiple_choice("bytes", OPTIONS, normalize="bytes"),
    "tokens": kinds.multiple_choice("tokens", OPTIONS, normalize="tokens"),
    "text": kinds.perplexity("text", SPLITS),
}


def placed(mesh):
    where = shardings(TREES[0], MODEL.sharding_rules, mesh)
    return [jax.device_put(tree, where) for tree in TREES]


def soft_score(tasks, *, mesh=None, of=FINEST, minibatch=8, merge=None):
    mesh = mesh or make_mesh(pop=1, data=1, fsdp=1, tensor=1)
    merge = merge or merger(placed(mesh), of)
    return SoftScore(
        merge, K, MODEL, Bytes(), tasks, mesh, Limits(), groups=of, minibatch=minibatch
    )


def some_weights():
    count = len(FINEST.names) if FINEST else 1
    return np.random.default_rng(0).dirichlet(np.ones(K) * 3, count).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *(("answer", form) for form in FORMS),
        *((name, FORMS[0]) for name in TASKS if name != "answer"),
    ],
)
def test_derivatives_equal_differences(name, form):
    """Of all weights by group, along random directions, against central differences."""
    soft = soft_score([TASKS[name]], minibatch=24)
    soft.forms[name] = form
    weights = some_weights()
    found = soft.slopes(weights, 0)[name]
    assert found.score == pytest.approx(soft.score(weights)[name], rel=1e-5)
    rng = np.random.default_rng(1)
    for _ in range(3):
        direction = rng.normal(size=weights.shape).astype(np.float32)
        direction /= np.linalg.norm(direction)
        step = np.float32(2e-2)
        ahead, behind = (soft.score(weights + s * direction)[name] for s in (step, -step))
        # In float32, with steps that its rounding allows: their square is what is left out.
        expected = (ahead - behind) / (2 * step)
        assert np.sum(found.by_weights * direction) == pytest.approx(expected, rel=3e-2, abs=2e-4)


def test_scores_are_what_they_say():
    """Probabilities of right answers, and of right choices, as the evaluator's likelihoods."""
    soft = soft_score([TASKS["choice"], TASKS["answer"]], of=None)
    one = soft.score(np.eye(K, dtype=np.float32)[:1])
    assert 0 < one["answer"] < 1e-2  # a random model knows nothing
    assert 0.2 < one["choice"] < 0.8
    assert soft.score(np.eye(K, dtype=np.float32)[:1], "log")["answer"] < 0


@pytest.mark.parametrize("axes", [(8, 1, 1, 1), (2, 1, 2, 2)])
def test_devices_make_no_difference(axes):
    """Sums are in another order: float32 roundings."""
    mesh = make_mesh(*axes)
    alone, spread = soft_score([TASKS["choice"]]), soft_score([TASKS["choice"]], mesh=mesh)
    weights = some_weights()
    assert spread.score(weights)["choice"] == pytest.approx(
        alone.score(weights)["choice"], rel=1e-4
    )
    whole = soft_score([TASKS["choice"]], minibatch=24).slopes(weights, 0)["choice"]
    parts = soft_score([TASKS["choice"]], mesh=mesh, minibatch=24).slopes(weights, 0)["choice"]
    np.testing.assert_allclose(parts.by_weights, whole.by_weights, rtol=2e-3, atol=2e-5)


def elsewhere(kind, mesh):
    """The same pool, kept otherwise."""
    trees = placed(mesh)
    if kind == "late":
        return RematerialisingMerger(trees, "layers", FINEST)
    names = [named_leaves(tree) for tree in trees]
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), trees[0]
    )
    leafwise = LeafwiseMerger(like, lambda k, name: names[k][name], K, FINEST)
    if kind == "leafwise":
        return leafwise
    others = [
        {name: quantised(leaf, names[0][name], kind) for name, leaf in each.items()}
        for each in names[1:]
    ]
    return QuantisedMerger(trees[0], others, leafwise, FINEST)


@pytest.mark.parametrize(
    ("kind", "axes"),
    [("late", (2, 1, 2, 2)), ("leafwise", (1, 1, 1, 1)), ("int8", (2, 1, 2, 2))],
)
def test_wherever_the_pool_lives(kind, axes):
    """Derivatives are those of a pool on the devices; of one in bits, of what the bits say."""
    mesh = make_mesh(*axes)
    weights, tasks = some_weights(), [TASKS["choice"]]
    there = soft_score(tasks, mesh=mesh, merge=elsewhere(kind, mesh)).slopes(weights, 0)["choice"]
    here = soft_score(tasks, mesh=mesh).slopes(weights, 0)["choice"]
    # Half a step of 8 bits is 1/254 of the largest difference in a block.
    rtol, atol = (0.05, 2e-3) if kind == "int8" else (1e-4, 1e-6)
    assert there.score == pytest.approx(here.score, rel=1e-2 if kind == "int8" else 1e-5)
    np.testing.assert_allclose(there.by_weights, here.by_weights, rtol=rtol, atol=atol)


def test_examples_without_an_answer_are_left_out():
    none = {"search": [*SPLITS["search"], Example("abc")], "test": []}
    assert soft_score([kinds.generation("answer", none)]).left_out == {"answer": 1}
    judged = kinds.generation("judged", {"search": [Example("abc")], "test": []})
    with pytest.raises(JaxmergeError, match="nothing that a gradient could climb"):
        soft_score([judged])
    beside = soft_score([judged, TASKS["answer"]], of=None)
    assert beside.without == ("judged",)
    assert beside.slopes(np.full((1, K), 1 / K, np.float32), 0).keys() == {"answer"}


def vowels(example, text):
    """What only a program can judge."""
    return float(sum(letter in "aeiou" for letter in text) >= 1)


def test_accepted_texts_stand_for_scores():
    """Their probabilities are added up; an example that nobody solved is left out."""
    judged = kinds.generation("judged", {"search": [*map(Example, WORDS[:3])]}, vowels)
    assert wants_texts(judged)
    assert not wants_texts(TASKS["answer"])
    told = accepting(judged, [("ab", "e"), (), ("i",)])
    first, second, _ = (told.soft(example) for example in told.splits["search"])
    assert second is None
    assert first is not None
    prompt = Prompt(WORDS[0])
    assert first.requests == tuple(Likelihood(prompt, text, ended=True) for text in ("ab", "e"))
    weights = some_weights()
    each = [
        soft_score([accepting(judged, [texts, (), ()])]).score(weights)["judged"]
        for texts in (("ab",), ("e",), ("ab", "e"))
    ]
    assert each[2] == pytest.approx(each[0] + each[1], rel=1e-4)
    both = soft_score([accepting(judged, [("ab", "e"), (), ()])])
    alone = [
        soft_score([accepting(judged, [texts, (), ()])]).score(weights, "log")["judged"]
        for texts in (("ab",), ("e",))
    ]
    assert both.score(weights, "log")["judged"] == pytest.approx(np.mean(alone), rel=1e-4)


@pytest.mark.parametrize("shrink", [0.0, 0.5])
@pytest.mark.parametrize("constraint", space.CONSTRAINTS)
def test_genotypes_give_their_weights_back(constraint, shrink):
    z_PxD = np.random.default_rng(3).normal(size=(1, 6))
    (weights,) = space.weights(z_PxD, constraint, groups=2, shrink=shrink)
    found = space.genotypes(weights, constraint, shrink=shrink).reshape(1, 6)
    again = space.weights(found, constraint, groups=2, shrink=shrink)
    # A mean over groups of logarithms of sums is another than that of the genotypes.
    np.testing.assert_allclose(again[0], weights, atol=1e-6)


def test_forms_follow_the_true_scores():
    soft = soft_score([TASKS["answer"]], of=None)
    one_hot = np.eye(K, dtype=np.float32)
    own = [soft.score(row[None])["answer"] for row in one_hot]
    assert soft.choose_forms([{"answer": value} for value in own])["answer"] == pytest.approx(1.0)
    assert soft.forms == {"answer": "probability"}
    soft.choose_forms([{"answer": 1.0}] * K)  # says nothing
    assert soft.forms == {"answer": "probability"}


@pytest.mark.parametrize("constraint", space.CONSTRAINTS)
def test_the_objective_rises_to_a_known_optimum(constraint):
    """On a soft score that is a parabola in the weights, whose best are known."""
    best = np.array([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]])

    def slopes(weights_GxK, step):
        off = weights_GxK.astype(np.float64) - best
        return {"a": Slope(float(1 - np.sum(off**2)), -2 * off)}

    settings = gradient.Settings("adam", 0.1, "cosine", 300, 100)
    strategy = gradient.gradient(
        slopes, settings, define(["a"]), groups=2, checkpoints=3, constraint=constraint
    )
    state = strategy.init(0)
    for generation in range(settings.generations):
        z_PxD, state = strategy.ask(0, generation, state)
    found = space.weights(z_PxD, constraint, groups=2)
    np.testing.assert_allclose(found[0], best, atol=0.02)
    np.testing.assert_allclose(found[1], best, atol=0.05)  # the mean of the last half


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
    config.search.strategy, config.space.granularity = "gradient", "leaf"
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
    assert (
        "Weights by group" in (workdir / "report.html").read_text() or "groups" not in found["best"]
    )


def _within(tokens):
    """Before the first step 1,000 tokens, each 300 more, and every ten of them 2 x 650 more."""
    individuals = [
        Candidate(k, 0, "individual", str(k), "search", k, (1.0,), {}, {}, 0.0, {"read": read})
        for k, read in enumerate((640, 650, 8))
    ]
    config = configs.default()
    config.search.budget_tokens = tokens
    found = climb._within_tokens(config, lambda steps: 100 * len([*steps]), 1_000, individuals)
    assert found == configs.settings(config)._replace(steps=found.steps)
    return found.steps


@pytest.mark.parametrize(
    ("tokens", "steps"),
    [(0, 60), (10**6, 60), (26_800, 60), (26_799, 59), (5_300, 10), (6_899, 10), (6_900, 11)],
)
def test_steps_are_as_many_as_the_tokens_are_enough_for(tokens, steps):
    assert _within(tokens) == steps


def test_tokens_for_less_than_a_step():
    assert _within(2_600) == 1
    with pytest.raises(JaxmergeError, match=r"search\.budget_tokens"):
        _within(2_599)


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
        tiny.generation(search=search, test=test), judge=lambda _, texts: vowels(None, texts[0])
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


def test_targets_that_are_no_answers_have_no_soft_score(tmp_path):
    """Expressions, targets that a stop would cut short, and those that are only partly right."""
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(f'{{"prompt": "{word}", "target": "yes|no"}}\n' for word in WORDS))
    for judge, there in (("regex", False), ("exact", True)):
        task = build("jsonl", path=str(path), search=4, test=4, judge=judge)
        assert (task.soft(task.splits["search"][0]) is not None) == there
    cut = kinds.generation("cut", {"search": [Example("a", "b\nc")]}, until=("\n",))
    assert cut.soft(cut.splits["search"][0]) is None
    partly = kinds.generation("partly", {"search": [Example("a", "b")]}, lambda *_: 0.5)
    assert partly.soft(partly.splits["search"][0]) is None


@pytest.mark.parametrize("aggregate", ["worst", "chebyshev"])
def test_soft_scores_of_tasks_are_not_compared(aggregate):
    config = configs.default()
    config.pool.checkpoints = ("a",)
    config.objective.tasks, config.objective.aggregate = ("sorting", "counting"), aggregate
    config.search.strategy = "gradient"
    with pytest.raises(JaxmergeError, match=r"objective\.aggregate"):
        configs.check(config)


def test_leaves_that_are_no_floats_have_no_derivatives():
    trees = [{**tree, "steps": jnp.arange(3)} for tree in TREES]
    of_one = pullback(trees, {"steps": None, "final_norm": {"scale": jnp.ones((1, 16))}})
    expected = [np.sum(tree["final_norm"]["scale"]) for tree in TREES]
    np.testing.assert_allclose(of_one[0, 0], expected, rtol=1e-5)


def test_weights_that_change_nothing_stay():
    """Of groups that are equal in all checkpoints, whatever rounding their derivatives have."""

    def slopes(weights_GxK, step):
        noise = 1e-3 * np.array([[1.0, 1.0, 1.0], [1.0, 2.0, 3.0]])
        return {"a": Slope(0.5, noise)}

    settings = gradient.Settings("adam", 0.1, "constant", 50, 50)
    strategy = gradient.gradient(
        slopes, settings, define(["a"]), groups=2, checkpoints=3, start=(0.3, -0.2, 0.1)
    )
    z_PxD, _ = strategy.ask(0, 0, strategy.init(0))
    np.testing.assert_allclose(z_PxD[0, :3], [0.3, -0.2, 0.1], atol=1e-6)
    assert z_PxD[0, 5] > 0.1 + 1.0
