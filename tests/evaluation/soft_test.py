"""The soft score: what it is, and its derivatives by merge weights, wherever the pool lives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge.errors import JaxmergeError
from jaxmerge.evaluation.rows import Limits
from jaxmerge.evaluation.soft import SoftScore
from jaxmerge.evaluation.tokenizer import Bytes
from jaxmerge.merge.differences import QuantisedMerger, quantised
from jaxmerge.merge.groups import groups
from jaxmerge.merge.leafwise import LeafwiseMerger
from jaxmerge.merge.linear import merger
from jaxmerge.merge.rematerialised import RematerialisingMerger
from jaxmerge.scores.calibration import FORMS
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


def value(soft, weights, name, form=FORMS[0]):
    return float(soft.scores(weights)[name][FORMS.index(form)])


def slopes(soft, weights, form=FORMS[0]):
    """At the first step, of the only task."""
    (found,) = soft.slopes(weights, 0, dict.fromkeys(soft.tasks, form)).values()
    return found


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
    weights = some_weights()
    found = slopes(soft, weights, form)
    np.testing.assert_allclose(found.scores_F, soft.scores(weights)[name], rtol=1e-5)
    rng = np.random.default_rng(1)
    for _ in range(3):
        direction = rng.normal(size=weights.shape).astype(np.float32)
        direction /= np.linalg.norm(direction)
        step = np.float32(2e-2)
        ahead, behind = (value(soft, weights + s * direction, name, form) for s in (step, -step))
        # In float32, with steps that its rounding allows: their square is what is left out.
        expected = (ahead - behind) / (2 * step)
        assert np.sum(found.by_weights * direction) == pytest.approx(expected, rel=3e-2, abs=2e-4)


def test_scores_are_what_they_say():
    """Probabilities of right answers, and of right choices, as the evaluator's likelihoods."""
    soft = soft_score([TASKS["choice"], TASKS["answer"]], of=None)
    first = np.eye(K, dtype=np.float32)[:1]
    assert 0 < value(soft, first, "answer") < 1e-2  # a random model knows nothing
    assert 0.2 < value(soft, first, "choice") < 0.8
    assert value(soft, first, "answer", "log") < 0
    losses = soft.losses(first)
    assert losses["answer"] == -value(soft, first, "answer", "log")
    assert losses["choice"] == pytest.approx(-np.log(value(soft, first, "choice")))


@pytest.mark.parametrize("axes", [(8, 1, 1, 1), (2, 1, 2, 2)])
def test_devices_make_no_difference(axes):
    """Sums are in another order: float32 roundings."""
    mesh = make_mesh(*axes)
    alone, spread = soft_score([TASKS["choice"]]), soft_score([TASKS["choice"]], mesh=mesh)
    weights = some_weights()
    found, expected = (value(one, weights, "choice") for one in (spread, alone))
    assert found == pytest.approx(expected, rel=1e-4)
    whole = slopes(soft_score([TASKS["choice"]], minibatch=24), weights)
    parts = slopes(soft_score([TASKS["choice"]], mesh=mesh, minibatch=24), weights)
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
    there = slopes(soft_score(tasks, mesh=mesh, merge=elsewhere(kind, mesh)), weights)
    here = slopes(soft_score(tasks, mesh=mesh), weights)
    # Half a step of 8 bits is 1/254 of the largest difference in a block.
    rtol, atol = (0.05, 2e-3) if kind == "int8" else (1e-4, 1e-6)
    rel = 1e-2 if kind == "int8" else 1e-5
    np.testing.assert_allclose(there.scores_F, here.scores_F, rtol=rel)
    np.testing.assert_allclose(there.by_weights, here.by_weights, rtol=rtol, atol=atol)


def test_examples_without_an_answer_are_left_out():
    none = {"search": [*SPLITS["search"], Example("abc")], "test": []}
    assert soft_score([kinds.generation("answer", none)]).left_out == {"answer": 1}
    judged = kinds.generation("judged", {"search": [Example("abc")], "test": []})
    with pytest.raises(JaxmergeError, match="nothing that a gradient could climb"):
        soft_score([judged])
    beside = soft_score([judged, TASKS["answer"]], of=None)
    assert beside.without == ("judged",)
    assert beside.tasks == ("answer",)
    assert slopes(beside, np.full((1, K), 1 / K, np.float32)).by_weights.shape == (1, K)


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
        value(soft_score([accepting(judged, [texts, (), ()])]), weights, "judged")
        for texts in (("ab",), ("e",), ("ab", "e"))
    ]
    assert each[2] == pytest.approx(each[0] + each[1], rel=1e-4)
    both = soft_score([accepting(judged, [("ab", "e"), (), ()])])
    alone = [
        value(soft_score([accepting(judged, [texts, (), ()])]), weights, "judged", "log")
        for texts in (("ab",), ("e",))
    ]
    assert value(both, weights, "judged", "log") == pytest.approx(np.mean(alone), rel=1e-4)


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


def test_leaves_that_are_no_floats_have_no_derivatives():
    trees = [{**tree, "steps": jnp.arange(3)} for tree in TREES]
    gradients = {"steps": None, "final_norm": {"scale": jnp.ones((1, 16))}}
    of_one = merger(trees).pullback(gradients, np.ones((1, K), np.float32))
    expected = [np.sum(tree["final_norm"]["scale"]) for tree in TREES]
    np.testing.assert_allclose(of_one[0, 0], expected, rtol=1e-5)
