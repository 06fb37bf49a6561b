"""Splits of examples that are there already: disjoint, and stable when others are added."""

import pytest

from jaxmerge.errors import JaxmergeError
from jaxmerge.tasks.common import Example
from jaxmerge.tasks.splits import divide, owner

EXAMPLES = [Example(f"question {i}") for i in range(500)]


def split(examples, search=10_000, test=10_000):
    return divide(examples, lambda each: each.prompt, name="mine", search=search, test=test)


def test_each_example_is_in_one_split_two_of_five_in_search():
    splits = split(EXAMPLES)
    found = [example.prompt for examples in splits.values() for example in examples]
    assert sorted(found) == sorted(example.prompt for example in EXAMPLES)
    # 500 draws of probability 2/5: 200 expected, standard deviation 11; five of them either way.
    assert 145 < len(splits["search"]) < 255


def test_an_example_stays_in_its_split_when_others_are_added():
    before, after = split(EXAMPLES[100:200]), split(EXAMPLES)
    assert set(before["search"]) < set(after["search"])
    assert set(before["test"]) < set(after["test"])


def test_what_generated_tasks_own_is_owned_here_too():
    for name, examples in split(EXAMPLES).items():
        assert {owner(example.prompt) for example in examples} == {name, "train"}


def test_a_smaller_split_begins_a_larger_one_and_order_does_not_matter():
    small, large = split(EXAMPLES[::-1], search=7, test=9), split(EXAMPLES)
    assert (small["search"], small["test"]) == (large["search"][:7], large["test"][:9])


def test_equal_examples_count_once():
    assert split(EXAMPLES[:10] * 2) == split(EXAMPLES[:10])


def test_a_split_without_examples_is_an_error_unless_it_is_not_wanted():
    only = split(EXAMPLES)["search"][0]
    with pytest.raises(JaxmergeError, match=r"task mine: no example belongs to the test split"):
        split([only])
    assert split([only], test=0) == {"search": (only,), "test": ()}
