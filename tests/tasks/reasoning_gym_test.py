"""Data sets of reasoning-gym: splits that cannot leak, their own judges, and readable errors."""

import importlib
import inspect
import re
import sys
from typing import Any

import pytest

from jaxmerge.errors import JaxmergeError
from jaxmerge.tasks.reasoning_gym import FORMULAS, LITERALS, REFUSED, reasoning_gym
from jaxmerge.tasks.splits import owner

SIZES: dict[str, Any] = {"train": 60, "search": 30, "test": 40}
DATASETS = {
    "chain_sum": {"max_terms": 2, "max_digits": 2},
    "spell_backward": {"max_word_len": 5},
    "letter_counting": {"max_words": 6},
    "family_relationships": {},
    "prime_factorization": {},  # its judge raises on an answer that is no product
    "calendar_arithmetic": {"tasks": ["weekday_of_date"]},
}


@pytest.fixture(params=DATASETS)
def dataset(request):
    return {"dataset": request.param, **DATASETS[request.param]}


def test_sizes_are_those_asked_for_and_no_prompt_is_in_two_splits(dataset):
    for seed in (0, 1):
        task = reasoning_gym(seed=seed, **SIZES, **dataset)
        for split, examples in task.splits.items():
            prompts = [example.prompt for example in examples]
            assert len(set(prompts)) == len(prompts) == SIZES[split]
            assert {owner(prompt) for prompt in prompts} == {split}


def test_a_larger_split_begins_with_the_smaller_and_leaves_the_others_alone(dataset):
    small = reasoning_gym(**SIZES, **dataset).splits
    large = reasoning_gym(**{**SIZES, "test": 80}, **dataset).splits
    assert large["test"][:40] == small["test"]
    assert (large["search"], large["train"]) == (small["search"], small["train"])


def test_the_same_seed_gives_the_same_examples_and_another_seed_others(dataset):
    first = reasoning_gym(seed=3, **SIZES, **dataset).splits
    assert reasoning_gym(seed=3, **SIZES, **dataset).splits == first
    assert reasoning_gym(seed=4, **SIZES, **dataset).splits != first


def test_the_data_sets_own_judge_scores(dataset):
    task = reasoning_gym(**SIZES, **dataset)
    for examples in task.splits.values():
        for example in examples:
            assert task.judge(example, [example.target]) == 1.0
            assert task.judge(example, [f" {example.target}\n"]) == 1.0
            assert task.judge(example, [""]) <= 0.01
            for wrong in ("?", "the answer", "[", "1/0", example.target + "7"):
                assert 0.0 <= task.judge(example, [wrong]) < 1.0


def test_part_of_the_answer_is_part_of_the_score():
    task = reasoning_gym(dataset="letter_counting", **SIZES)
    example = task.splits["search"][0]
    assert 0.0 < task.judge(example, [f"It is {example.target}."]) < 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "chain_sums"}, r"no such data set\n.*expected: one of chain_sum,"),
        ({"dataset": "chain_sum", "max_term": 2}, r"no such argument\n.*one of max_terms,"),
        ({"dataset": "chain_sum", "min_terms": 0}, "refuses its arguments: min_terms must be"),
        ({"dataset": "composite"}, "would run the model's answers"),
        ({"dataset": "gcd", "max_value": 5}, "task gcd, split .*: the task has fewer examples"),
    ],
)
def test_what_is_wrong_with_a_name_or_an_argument_is_said(arguments: Any, message):
    with pytest.raises(JaxmergeError, match=message):
        reasoning_gym(**arguments)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(JaxmergeError, match=r"pip install 'jaxmerge\[reasoning-gym\]'"):
        reasoning_gym(dataset="chain_sum")


def test_data_sets_whose_judges_run_answers_as_python_are_known():
    """A version of reasoning-gym with a new one has to be looked at before it is used."""
    from reasoning_gym.factory import DATASETS

    # eval and exec of what the data set itself made: its problem, its oracle, its own programs.
    looked_at = {"basic_arithmetic", "bitwise_arithmetic", "codeio", "gsm_symbolic"}
    looked_at |= {"number_sorting", "propositional_logic"}  # the latter's parse_expr is its own
    running = {"composite"}
    for name, (kind, _) in DATASETS.items():
        source = inspect.getsource(importlib.import_module(kind.__module__))
        if re.search(r"\b(eval|exec|parse_expr|sympify|__import__|pickle)\(", source):
            running.add(name)
    assert running - looked_at == LITERALS | FORMULAS | REFUSED
    for name in REFUSED:
        with pytest.raises(JaxmergeError):
            reasoning_gym(dataset=name)
