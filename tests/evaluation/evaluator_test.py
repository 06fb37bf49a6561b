"""Populations of merges, scored: against a plain loop, on meshes, without compiling or copying."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge.errors import JaxmergeError
from jaxmerge.evaluation.batches import Limits
from jaxmerge.evaluation.evaluator import Evaluator, Scores
from jaxmerge.evaluation.tokenizer import Bytes
from jaxmerge.merge.linear import merger
from jaxmerge.models.decoder import decoder
from jaxmerge.sharding import make_mesh, shardings
from jaxmerge.tasks import kinds
from jaxmerge.tasks.common import Example
from jaxmerge.tasks.requests import Response
from tests import tiny

MODEL, TREES, TOKENIZER = tiny.model(), tiny.trees(3), Bytes()
WRITE, CHOOSE = tiny.generation(search=7, test=2), tiny.choice(search=6, test=2)
# Ordinary, uniform, one-hot, with a zero, and one that extrapolates.
WEIGHTS_PxK = np.array(
    [[0.2, 0.5, 0.3], [1 / 3] * 3, [0.0, 1.0, 0.0], [0.6, 0.0, 0.4], [1.4, -0.7, 0.3]]
)
NEW_TOKENS = 6  # of tiny.generation
WIDTH = 40  # longer than any prompt with its choice or continuation


def make_evaluator(sizes: Any = None, tasks=(WRITE, CHOOSE), **options: Any):
    """An evaluator of the pool on a mesh, by default of one device."""
    mesh = make_mesh(**(sizes or {}))
    placed = [jax.device_put(t, shardings(t, MODEL.sharding_rules, mesh)) for t in TREES]
    options = {"candidates_per_step": 2, "limits": Limits(rows=8), **options}
    return Evaluator(merger(placed), MODEL, TOKENIZER, tasks, "search", mesh, **options)


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    """On one device; 5 candidates are 3 steps, the last of them half full."""
    return make_evaluator()


@functools.cache
def expected() -> Scores:
    """One candidate merged in float64, one example at a time, no padding that a model could see.

    Scores are of tokens and of which choice is best, so they are equal, not close, as long as no
    decision is nearer than rounding: float32 moves logits by less than 1e-5 of the largest (see
    decoder_test), a log-likelihood of up to 12 tokens by less than 12 times that.
    """
    apply = jax.jit(MODEL.apply)

    def logits(params, tokens: list[int]) -> np.ndarray:
        row = np.zeros((1, WIDTH), np.int32)  # padded on the right: later than all that counts
        row[0, : len(tokens)] = tokens
        return np.asarray(apply(params, jnp.asarray(row)), np.float64)[0]

    def write(params, example: Example) -> float:
        prompt, new = TOKENIZER.encode(example.prompt), []
        while len(new) < NEW_TOKENS:
            logits_V = logits(params, prompt + new)[len(prompt) + len(new) - 1]
            second, first = np.sort(logits_V)[-2:]
            assert first - second > 2e-5 * np.abs(logits_V).max()
            if logits_V.argmax() in TOKENIZER.stops:
                break
            new.append(int(logits_V.argmax()))
        return WRITE.judge(example, [TOKENIZER.decode(new)])

    def choose(params, example: Example) -> float:
        rated = []
        for choice in example.choices:
            prompt, tokens = TOKENIZER.encode(example.prompt), TOKENIZER.encode(choice)
            logits_TxV = logits(params, prompt + tokens)[len(prompt) - 1 :][: len(tokens)]
            peak = logits_TxV.max(axis=-1)
            log_z = peak + np.log(np.exp(logits_TxV - peak[:, None]).sum(axis=-1))
            rated.append((logits_TxV[np.arange(len(tokens)), tokens] - log_z).sum() / len(tokens))
        second, first = np.sort(rated)[-2:]
        assert first - second > 2 * 12 * 1e-5 * abs(first)
        return float(example.choices[int(np.argmax(rated))] == example.target)

    scores = {"generation": [], "choice": []}
    for weights_K in WEIGHTS_PxK:
        params = jax.tree.map(
            lambda *leaves, w=weights_K: np.tensordot(
                w, np.stack(leaves).astype(np.float64), axes=1
            ).astype(np.float32),
            *TREES,
        )
        scores["generation"].append([write(params, e) for e in WRITE.splits["search"]])
        scores["choice"].append([choose(params, e) for e in CHOOSE.splits["search"]])
    return {name: np.asarray(rows, np.float32) for name, rows in scores.items()}


def assert_equal(scores: Scores, other: Scores) -> None:
    """The same tasks and the same numbers."""
    assert scores.keys() == other.keys()
    for name, score_PxN in scores.items():
        np.testing.assert_array_equal(score_PxN, other[name])


def test_equals_a_plain_loop(evaluator):
    """Scores of every candidate and example; questions have 2, 3 and 4 choices."""
    assert {len(example.choices) for example in CHOOSE.splits["search"]} == {2, 3, 4}
    scores = evaluator(WEIGHTS_PxK)
    assert_equal(scores, expected())
    assert {name: score.shape for name, score in scores.items()} == {
        "generation": (5, 7),
        "choice": (5, 6),
    }
    # Not the same for all: a row in the place of another would be seen.
    assert len(np.unique(np.concatenate(list(expected().values()), axis=1), axis=0)) == 5
    assert evaluator.examples == {"generation": 7, "choice": 6}


def test_steps_are_the_same_a_few_rows_at_a_time(evaluator, monkeypatch):
    """2, 2 and 1 candidates; what is merged is always 2, the last step filled with its last."""
    merged = []
    program = evaluator._merge
    monkeypatch.setattr(
        evaluator, "_merge", lambda w: merged.append(w.astype(np.float32)) or program(w)
    )
    steps = list(evaluator.steps(WEIGHTS_PxK))
    assert [len(step.scores["choice"]) for step in steps] == [2, 2, 1]
    whole = {name: np.concatenate([s.scores[name] for s in steps]) for name in steps[0].scores}
    assert_equal(whole, expected())
    filled = np.concatenate([WEIGHTS_PxK, WEIGHTS_PxK[-1:]]).astype(np.float32)
    np.testing.assert_array_equal(np.concatenate(merged), filled)
    assert [len(weights) for weights in merged] == [2, 2, 2]


@pytest.mark.parametrize(
    ("sizes", "per_step"),
    [
        ({"pop": 2, "fsdp": 2, "tensor": 2}, 4),
        ({"pop": 2, "data": 2, "tensor": 2}, 3),  # rounded up to 4
        ({"fsdp": 2, "tensor": 4}, 2),  # more than there are key/value heads
    ],
    ids=str,
)
def test_a_mesh_gives_the_same_scores(sizes, per_step):
    """Sums over `fsdp` and `tensor` are in another order, `pop` and `data` change no sum: either
    way logits move by less than any decision is near (checked in `expected`).
    """
    evaluator = make_evaluator(sizes, candidates_per_step=per_step)
    assert evaluator.candidates_per_step % sizes.get("pop", 1) == 0
    assert_equal(evaluator(WEIGHTS_PxK), expected())


def test_candidates_and_examples_lie_where_promised():
    """Candidates on `pop`, examples on `data`: a device holds its part of either."""
    evaluator = make_evaluator({"pop": 2, "data": 4}, tasks=[WRITE], candidates_per_step=4)
    (microbatch,) = evaluator._tasks[0].prepared.groups[0].microbatches
    # They are on the devices already.
    tokens, padding, _ = map(jnp.asarray, microbatch.arrays)
    assert {shard.data.shape[0] for shard in tokens.addressable_shards} == {8 // 4}
    assert {shard.data.shape for shard in padding.addressable_shards} == {(8 // 4,)}
    _, ((((output,),),),) = evaluator._launch(WEIGHTS_PxK[:4])
    assert output.shape == (4, 8, NEW_TOKENS)
    assert {shard.data.shape[0] for shard in output.addressable_shards} == {4 // 2}


def test_vmap_of_candidates_gives_the_same_scores():
    """Side by side in twos, two after two; `evaluator` has them one after the other on CPU."""
    evaluator = make_evaluator(candidates_per_step=4, vmap_candidates=2)
    assert_equal(evaluator(WEIGHTS_PxK), expected())


def test_nothing_compiles_after_the_first_generation(compilations):
    """Nor with fewer or more candidates than before, which are filled up to whole steps."""
    evaluator = make_evaluator(candidates_per_step=3)
    evaluator(WEIGHTS_PxK[:3])
    before = compilations()
    assert before > 0
    for weights_PxK in (WEIGHTS_PxK[2:], WEIGHTS_PxK[:1], WEIGHTS_PxK, WEIGHTS_PxK[:4]):
        evaluator(weights_PxK)
    assert compilations() == before


@pytest.mark.parametrize(
    ("sizes", "per_step"), [({}, 2), ({"pop": 2, "fsdp": 2, "tensor": 2}, 4)], ids=str
)
def test_nothing_but_tokens_and_log_likelihoods_leaves_the_device(monkeypatch, sizes, per_step):
    """And nothing but weights goes there."""
    evaluator = make_evaluator(sizes, candidates_per_step=per_step)
    evaluator(WEIGHTS_PxK)
    fetched, sent = [], []
    get, put = jax.device_get, jax.device_put
    monkeypatch.setattr(jax, "device_get", lambda x: fetched.append(x) or get(x))
    monkeypatch.setattr(jax, "device_put", lambda x, where: sent.append(x) or put(x, where))
    # Refuses everything that is not asked for with device_put or device_get. On the CPU backend it
    # sees transfers to and between devices alone, since arrays there are in the host's memory.
    with jax.transfer_guard("disallow"):
        scores = evaluator(WEIGHTS_PxK)
        with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device"):
            jnp.asarray(WEIGHTS_PxK)
    assert_equal(scores, expected())
    # 7 prompts are a microbatch of 8; the 18 choices are branches of as many rows as questions.
    steps, C = -(-len(WEIGHTS_PxK) // per_step), per_step
    (group,) = evaluator._tasks[1].prepared.groups
    asked = [batch.requests for batch in group.microbatches]
    assert sum((each >= 0).any(axis=1).sum() for each in asked) == len(CHOOSE.splits["search"])
    step = [((C, 8, NEW_TOKENS), "int32")]
    step += [((C, *each.shape), dtype) for each in asked for dtype in ("float32", "bool")]
    assert [(x.shape, str(x.dtype)) for x in jax.tree.leaves(fetched)] == steps * step
    assert [(x.shape, str(x.dtype)) for x in sent] == steps * [((C, 3), "float32")]


def test_judging_overlaps_the_device(monkeypatch):
    """Step i + 1 is on its way before step i is fetched and judged; no third step is."""
    events: list[str] = []

    def judge(example: Example, responses: Sequence[Response]) -> float:
        events.append("judge")
        return 0.0

    evaluator = make_evaluator(tasks=[dataclasses.replace(WRITE, judge=judge)])
    launch, get = evaluator._launch, jax.device_get
    monkeypatch.setattr(evaluator, "_launch", lambda w: events.append("launch") or launch(w))
    monkeypatch.setattr(jax, "device_get", lambda x: events.append("fetch") or get(x))
    seen = []
    for step in evaluator.steps(WEIGHTS_PxK):
        judged = events.count("judge")
        assert 7 <= judged <= 14
        assert events[-judged:] == judged * ["judge"]
        seen.append((len(step.scores["generation"]), *events[:-judged]))
        events.clear()
    assert seen == [(2, "launch", "launch", "fetch"), (2, "launch", "fetch"), (1, "fetch")]


def test_an_empty_split_is_refused():
    """With the task and the split, whether it is empty or not there at all."""
    for splits in ({"test": WRITE.splits["test"]}, {"search": [], "test": WRITE.splits["test"]}):
        with pytest.raises(JaxmergeError, match="the search split has no examples") as caught:
            make_evaluator(tasks=[WRITE, kinds.generation("hollow", splits)])
        assert caught.value.where == "task hollow"


def test_a_vocabulary_that_does_not_fit_is_refused():
    """A token that the model has no embedding for would read another's without a word."""
    small = decoder(dataclasses.replace(tiny.DECODER, vocab=255))
    with pytest.raises(JaxmergeError, match="tokens that the model does not know") as caught:
        Evaluator(
            merger(TREES), small, TOKENIZER, [WRITE], "search", make_mesh(), candidates_per_step=1
        )
    assert "255" in caught.value.expected
    assert caught.value.found == "256"
