"""Generation, multiple choice and perplexity: what is asked, and scores made by hand."""

import dataclasses
import math
from typing import Any

import pytest

from jaxmerge.errors import JaxmergeError
from jaxmerge.tasks.common import Example
from jaxmerge.tasks.kinds import generation, multiple_choice, perplexity
from jaxmerge.tasks.requests import Generate, Likelihood, Likely, Prompt, Rolling

TRAIN = [Example("1+1=", "2"), Example("2+2=", "4"), Example("3+3=", "6")]
CHOOSE = Example("p", "bb", ("a", "bb", "yellow"))


def test_generation_asks_for_one_greedy_text():
    task = generation("sums", {"train": TRAIN}, max_new_tokens=3, until=["\n"], form="chat")
    assert task.requests(TRAIN[0]) == [Generate(Prompt("1+1=", (), "chat"), 3, ("\n",))]
    assert task.judge(TRAIN[0], [" 2 "]) == 1.0
    assert task.judge(TRAIN[0], ["22"]) == 0.0


def test_samples_are_drawn_with_seeds_of_their_own():
    """The same again for the same seed; others for other examples and seeds."""

    def seeds(example: Example, seed: int) -> list[int]:
        task = generation("sums", {}, temperature=0.7, top_p=0.9, samples=4, seed=seed)
        requests = [request for request in task.requests(example) if isinstance(request, Generate)]
        drawn = [request.sampling for request in requests if request.sampling]
        assert {sampling[:2] for sampling in drawn} == {(0.7, 0.9)}
        return [sampling.seed for sampling in drawn]

    drawn = [*seeds(TRAIN[0], 0), *seeds(TRAIN[1], 0), *seeds(TRAIN[0], 1)]
    assert len(set(drawn)) == 12
    assert seeds(TRAIN[0], 0) == drawn[:4]
    assert all(0 <= seed < 2**31 for seed in drawn)


def test_samples_are_averaged():
    task = generation("sums", {}, samples=4, temperature=1.0)
    assert task.judge(TRAIN[0], ["2", "3", "2", "4"]) == 0.5


@pytest.mark.parametrize("kind", [generation, multiple_choice])
def test_shots_are_of_the_train_split(kind):
    """The first of them, and no more than there are."""
    task = kind("sums", {"train": TRAIN}, shots=2)
    (request, *_) = task.requests(CHOOSE)
    assert request.prompt.shots == (("1+1=", "2"), ("2+2=", "4"))
    with pytest.raises(JaxmergeError, match="too few") as caught:
        kind("sums", {"train": TRAIN}, shots=4)
    assert caught.value.where == "task sums, shots"


def test_choices_are_asked_for_one_by_one():
    task = multiple_choice("choose", {}, ended=True)
    assert task.requests(CHOOSE) == [
        Likelihood(Prompt("p"), choice, True) for choice in CHOOSE.choices
    ]


@pytest.mark.parametrize(
    ("normalize", "chosen"),
    [
        # First -1 > -3 > -3.9, by bytes -1, -1.5, -0.65, by tokens -1, -1.5, -3.9.
        # Then -1 > -1.5 > -9, by bytes -1, -0.75, -1.5, by tokens -1, -0.75, -9.
        ("none", ["a", "a"]),
        ("bytes", ["yellow", "bb"]),
        ("tokens", ["a", "bb"]),
    ],
)
def test_choices_by_hand(normalize: Any, chosen):
    """The best (normalised) log-likelihood is compared with the target."""
    task = multiple_choice("choose", {}, normalize=normalize)
    for nats, choice in zip([(-1.0, -3.0, -3.9), (-1.0, -1.5, -9.0)], chosen):
        responses = [Likely(n, False, tokens) for n, tokens in zip(nats, (1, 2, 1))]
        for target in CHOOSE.choices:
            example = dataclasses.replace(CHOOSE, target=target)
            assert task.judge(example, responses) == float(target == choice)


def test_perplexity_is_bits_per_byte():
    """The mean of the scores is that of all bytes, however they are divided into examples."""
    texts = ["abcd", "é", "abcdefghij"]  # 4, 2 and 10 bytes
    nats = [-3.0, -5.0, -7.0]
    task = perplexity("text", {"test": [Example(text) for text in texts]})
    examples = task.splits["test"]
    assert task.requests(examples[1]) == [Rolling("é")]
    scores = [task.judge(e, [Likely(n, False, 3)]) for e, n in zip(examples, nats)]
    assert sum(scores) / 3 == pytest.approx(-15 / math.log(2) / 16)
    assert task.bounds == (-math.inf, 0)
