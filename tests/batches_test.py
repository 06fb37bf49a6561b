"""Padding, the order of rows, and scores made by hand."""

from typing import Any

import numpy as np
import pytest

from jaxmerge.errors import JaxmergeError
from jaxmerge.tasks import batches
from jaxmerge.tasks.common import Example, Task
from jaxmerge.tokenizer import Bytes

TOKENIZER = Bytes()


def generation(*prompts: str, judge=None) -> tuple[Task, list[Example]]:
    """A generation task and its examples."""
    examples = [Example(prompt, f"target {i}") for i, prompt in enumerate(prompts)]
    options = {} if judge is None else {"judge": judge}
    return Task("write", "generation", {"search": examples}, **options), examples


def choices(*examples: Example, normalize: Any = "none") -> tuple[Task, list[Example]]:
    """A multiple-choice task and its examples."""
    task = Task("choose", "multiple_choice", {"search": examples}, normalize=normalize)
    return task, list(examples)


def random_texts(count: int, longest: int) -> list[str]:
    """Texts of many lengths, no two alike."""
    rng = np.random.default_rng(0)
    return [
        "".join(chr(97 + c) for c in rng.integers(26, size=rng.integers(1, longest + 1))) + f"{i}"
        for i in range(count)
    ]


def test_prompts_are_padded_on_the_left():
    """Each row of the microbatches is its prompt, after as much padding as is said."""
    prompts = random_texts(23, 60)
    task, examples = generation(*prompts)
    seen = []
    for rows_B, (tokens_BxT, padding_B) in batches.encode(task, examples, TOKENIZER, 8):
        assert len(rows_B) == len(tokens_BxT) == len(padding_B) == 8
        for row, tokens, padding in zip(rows_B, tokens_BxT, padding_B):
            if row < 0:
                assert padding == len(tokens)  # filling: nothing but padding
                continue
            seen.append(row)
            assert TOKENIZER.decode(tokens[padding:].tolist()) == prompts[row]
            assert (tokens[:padding] == 0).all()
    assert sorted(seen) == list(range(23))


def test_choices_are_padded_on_the_right():
    """Each row is prompt, choice and padding; the tokens of the choice are scored, no others."""
    texts = random_texts(24, 30)
    questions = [
        Example(texts[0], texts[1], tuple(texts[1:3])),
        Example(texts[3], texts[8], tuple(texts[4:10])),
        Example("é?", "ü", ("ü", "ß!")),
        *(Example(texts[i], texts[i + 1], (texts[i + 1],)) for i in range(10, 23)),
    ]
    pairs = [(example.prompt, choice) for example in questions for choice in example.choices]
    task, examples = choices(*questions)
    seen = []
    for rows_B, (tokens_BxT, scored_BxT) in batches.encode(task, examples, TOKENIZER, 4):
        for row, tokens, scored in zip(rows_B, tokens_BxT, scored_BxT):
            if row < 0:
                assert not scored.any()
                continue
            seen.append(row)
            prompt, choice = (text.encode() for text in pairs[row])
            end = len(prompt) + len(choice)
            assert bytes(tokens[:end].tolist()) == prompt + choice
            assert (tokens[end:] == 0).all()
            assert scored.tolist() == [len(prompt) <= t < end for t in range(len(tokens))]
    assert sorted(seen) == list(range(len(pairs)))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_every_microbatch_is_full(batch_size):
    """All have the same number of rows; only the last has rows that fill up, at its end."""
    task, examples = generation(*random_texts(10, 20))
    encoded = batches.encode(task, examples, TOKENIZER, batch_size)
    assert len(encoded) == -(-10 // batch_size)
    rows = np.concatenate([microbatch.rows_B for microbatch in encoded])
    assert len(rows) == batch_size * len(encoded)
    assert (rows[:10] >= 0).all()
    assert (rows[10:] == -1).all()


def test_little_is_spent_on_padding():
    """A microbatch is at most 1/8 or 7 tokens longer than its longest row; rows are sorted."""
    task, examples = generation(*random_texts(400, 500))
    longest_before = 0
    for _, (tokens_BxT, padding_B) in batches.encode(task, examples, TOKENIZER, 16):
        T = tokens_BxT.shape[1]
        lengths = T - padding_B
        assert T - lengths.max() <= max(7, lengths.max() / 8)
        assert lengths.min() >= longest_before
        longest_before = lengths.max()


def test_few_shapes():
    """Each shape is a program to compile: at most 8 for every doubling of the length."""
    task, examples = generation(*("x" * length for length in range(1, 513)))
    shapes = {arrays[0].shape for _, arrays in batches.encode(task, examples, TOKENIZER, 1)}
    # 8, 16, ..., 64 by 8; then 8 in each of 64-128, 128-256, 256-512.
    assert len(shapes) == 8 + 3 * 8
    assert max(shapes) == (1, 512)


@pytest.mark.parametrize("kind", ["generation", "multiple_choice"])
@pytest.mark.parametrize("empty", ["prompt", "choice"])
def test_an_empty_text_is_refused(kind, empty):
    """Nothing would come before the first token; the task is named."""
    prompt, choice = ("", "a") if empty == "prompt" else ("a", "")
    examples = [Example("fine", "b", ("b",)), Example(prompt, choice, (choice, "b"))]
    task = Task("holes", kind, {"search": examples})
    if kind == "generation" and empty == "choice":
        batches.encode(task, examples, TOKENIZER, 2)  # a target may be empty
        return
    with pytest.raises(JaxmergeError, match="empty") as caught:
        batches.encode(task, examples, TOKENIZER, 2)
    assert caught.value.where == "task holes"


def test_texts_end_at_stop():
    """The judge sees what stands before the first stop token, and its own example."""
    heard = []

    def judge(example: Example, output: str) -> float:
        heard.append((example.prompt, output))
        return len(output) / 10

    task, examples = generation("p0", "p1", judge=judge)
    texts = [["ab\ncd\n", "\nabcd\n"], ["abcdef", "abcde\n"]]
    tokens_CxRxM = np.array([[list(text.encode()) for text in rows] for rows in texts], np.int32)
    scores = batches.judge_texts(task, examples, TOKENIZER, tokens_CxRxM)
    assert heard == [("p0", "ab"), ("p1", ""), ("p0", "abcdef"), ("p1", "abcde")]
    np.testing.assert_array_equal(scores, np.array([[0.2, 0.0], [0.6, 0.5]], np.float32))
    assert scores.dtype == np.float32


# Choices of 1, 2 and 6 bytes; the last is 1 token for a tokenizer that knows the word.
QUESTIONS = (
    Example("p", "yellow", ("a", "bb", "yellow")),
    Example("p", "b", ("b", "cc")),
)
#                              a     bb   yellow    b     cc
LOG_LIKELIHOOD_CxR = np.array(
    [
        [-1.0, -3.0, -3.9, -2.0, -3.0],
        [-1.0, -1.5, -9.0, -1.0, -3.0],
        [-3.0, -5.0, -2.0, -5.0, -2.0],
    ],
    np.float32,
)


class Words(Bytes):
    """A tokenizer with one token for the word that it knows."""

    def encode(self, text: str) -> list[int]:
        return [0] if text == "yellow" else super().encode(text)


@pytest.mark.parametrize(
    ("normalize", "expected"),
    [
        # Candidate 0: -1 > -3 > -3.9 picks a; bytes: -1, -1.5, -0.65 picks yellow.
        # Candidate 1: -0.75 for bb is the best of -1, -0.75, -1.5.
        # Candidate 2: yellow always; b against cc: -5 < -2, and -5 < -1.
        ("none", [[0, 1], [0, 1], [1, 0]]),
        ("bytes", [[1, 0], [0, 1], [1, 0]]),
        ("tokens", [[0, 0], [0, 1], [1, 0]]),
    ],
)
def test_choices_by_hand(normalize, expected):
    """The best (normalised) log-likelihood against the target; bytes and tokens differ."""
    task, examples = choices(*QUESTIONS, normalize=normalize)
    scores = batches.judge_choices(task, examples, Words(), LOG_LIKELIHOOD_CxR)
    np.testing.assert_array_equal(scores, np.array(expected, np.float32))
    assert scores.dtype == np.float32


@pytest.mark.parametrize("given", [float("nan"), -0.1, 1.5, float("inf")])
def test_a_score_outside_its_range_is_refused(given):
    """One NaN would make the mean, the log and the report meaningless."""
    task = Task("odd", "generation", {}, judge=lambda example, output: given)
    tokens = np.full((1, 1, 3), Bytes.stops[0], np.int32)
    with pytest.raises(JaxmergeError, match="task odd"):
        batches.judge_texts(task, [Example("a", "b")], Bytes(), tokens)
