"""Tasks: splits that cannot leak, and judges that know right from wrong."""

from __future__ import annotations

import random
import re

import pytest

from jaxmerge.errors import JaxmergeError
from jaxmerge.evaluation.tokenizer import Bytes
from jaxmerge.tasks import BUILDERS, TASKS, build
from jaxmerge.tasks.common import Example
from jaxmerge.tasks.instructions import INSTRUCTIONS, follows
from jaxmerge.tasks.requests import Generate, Likelihood, Prompt
from jaxmerge.tasks.splits import owner

SIZES = {"train": 300, "search": 60, "test": 120}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_called_as_the_table_says_and_has_the_sizes_asked_for(name):
    task = TASKS[name](**SIZES)
    assert task.name == name
    assert {split: len(examples) for split, examples in task.splits.items()} == SIZES


@pytest.mark.parametrize("name", TASKS)
def test_the_default_sizes_exist(name):
    task = TASKS[name]()
    assert len(task.splits["search"]) == 192
    assert len(task.splits["test"]) == 1000


@pytest.mark.parametrize("name", TASKS)
def test_no_prompt_is_in_two_splits_of_any_two_seeds(name):
    for seed in (0, 1, 1000):
        for split, examples in TASKS[name](seed=seed, **SIZES).splits.items():
            prompts = [example.prompt for example in examples]
            assert len(set(prompts)) == len(prompts)
            assert {owner(prompt) for prompt in prompts} == {split}


@pytest.mark.parametrize("name", TASKS)
def test_the_same_seed_gives_the_same_examples_and_another_seed_others(name):
    build = TASKS[name]
    assert build(seed=3, **SIZES).splits == build(seed=3, **SIZES).splits
    assert build(seed=3, **SIZES).splits["search"] != build(seed=4, **SIZES).splits["search"]


@pytest.mark.parametrize("name", TASKS)
def test_a_larger_split_begins_with_the_smaller_and_leaves_the_others_alone(name):
    small = TASKS[name](**SIZES).splits
    large = TASKS[name](**{**SIZES, "test": 200}).splits
    assert large["test"][: SIZES["test"]] == small["test"]
    assert large["search"] == small["search"]
    assert large["train"] == small["train"]


def test_more_examples_than_exist_is_an_error_that_names_task_and_split():
    with pytest.raises(JaxmergeError, match=r"task arithmetic, split test: .*fewer examples"):
        TASKS["arithmetic"](train=0, search=0, test=10_000)


@pytest.mark.parametrize("name", TASKS)
def test_targets_are_right_and_others_are_wrong(name):
    task = TASKS[name](**SIZES)
    for example in task.splits["search"]:
        match task.requests(example):
            case [Generate() as request]:
                assert len(Bytes().encode(example.target)) < request.max_new_tokens
                assert task.judge(example, [example.target]) == 1.0
                assert task.judge(example, [f" {example.target} "]) == 1.0
                assert task.judge(example, [""]) == 0.0
                assert task.judge(example, [example.target + "7"]) == 0.0
            case requests:
                prompt = Prompt(example.prompt)
                assert requests == [Likelihood(prompt, choice) for choice in example.choices]
        if example.choices:
            assert len(set(example.choices)) == 4
            begins_target = [c for c in example.choices if example.target.startswith(c)]
            assert begins_target == [example.target]


def test_the_right_choice_is_at_no_favourite_place():
    examples = TASKS["programs"](search=400, train=0, test=0).splits["search"]
    places = [example.choices.index(example.target) for example in examples]
    # 400 draws of probability 1/4: 100 expected, standard deviation 9; five of them either way.
    assert all(55 < places.count(place) < 145 for place in range(4))


def test_arithmetic_is_what_python_computes():
    for example in TASKS["arithmetic"](**SIZES).splits["test"]:
        question = re.fullmatch(r"What is ([\d+-]+)\? ", example.prompt)
        assert question is not None
        assert int(example.target) == eval(question[1])


def test_programs_print_what_python_computes():
    for example in TASKS["programs"](**SIZES).splits["test"]:
        *statements, expression = example.prompt.removesuffix(" -> ").split(";")
        scope: dict[str, int] = {}
        exec(";".join(statements), scope)
        assert example.target == str(eval(expression, scope))


def test_the_held_out_tasks_are_what_python_computes():
    for example in TASKS["sorting"](**SIZES).splits["test"]:
        digits = example.prompt.removeprefix("Sort ").removesuffix(": ").split()
        assert example.target.split() == sorted(digits)
    for example in TASKS["counting"](**SIZES).splits["test"]:
        _, letter, _, word = example.prompt.removesuffix(": ").split()
        assert int(example.target) == word.count(letter)


@pytest.mark.parametrize("kind", INSTRUCTIONS)
def test_every_kind_of_instruction_occurs(kind):
    prompts = [example.prompt for example in TASKS["instructions"](**SIZES).splits["search"]]
    assert any(re.fullmatch(INSTRUCTIONS[kind].pattern, prompt) for prompt in prompts)


@pytest.mark.parametrize(
    ("prompt", "right", "wrong"),
    [
        (
            "Say tam 3x: ",
            ["tam tam tam", "tam  tam tam"],
            ["tam tam", "tam tam tam tam", "tamtamtam"],
        ),
        ("Capitals tam: ", ["TAM"], ["tam", "Tam", "TAN"]),
        ("Backwards tamo: ", ["omat"], ["tamo", "oma"]),
        (
            "Words b s: ",
            ["bus sun", "beetle say"],
            ["bus", "sun bus", "bus sun sun", "b s", "bb ss"],
        ),
        ("A b word, no u: ", ["bat", "by", "banana"], ["bus", "cat", "b", "bat cat", "BAT"]),
    ],
)
def test_an_instruction_is_judged_by_what_it_asks(prompt, right, wrong):
    example = Example(prompt, right[0])
    assert [follows(example, output) for output in right] == [1.0] * len(right)
    assert [follows(example, output) for output in wrong] == [0.0] * len(wrong)


def test_another_answer_that_fulfils_the_instruction_is_right():
    shuffled = random.Random(0)
    for example in TASKS["instructions"](**SIZES).splits["search"]:
        if example.prompt.startswith("Words "):
            other = " ".join(
                f"{word[0]}{shuffled.choice('aeiou')}zz" for word in example.target.split()
            )
        elif example.prompt.startswith("A "):
            banned = example.prompt[-3]
            other = example.target[0] + shuffled.choice([v for v in "aeiou" if v != banned])
        else:
            continue
        if "z" not in example.prompt[-3:]:
            assert other != example.target
            assert follows(example, other) == 1.0


def test_tasks_are_built_by_name():
    assert build("sorting", search=3, test=4).name == "sorting"
    with pytest.raises(JaxmergeError, match="no such task") as caught:
        build("sorted", search=3, test=4)
    assert caught.value.expected == ", ".join(BUILDERS)
