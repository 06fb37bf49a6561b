"""Instructions whose fulfilment a program can check: whatever fulfils one is right.

In the spirit of IFEval (arXiv 2311.07911), at the size of a few words.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxmerge.tasks.common import Example, Task
from jaxmerge.tasks.kinds import generation
from jaxmerge.tasks.splits import draw_splits

# What targets are written with; a judge takes any word, listed here or not.
WORDS = tuple(
    """
    ant arm art bat bed big box bus cab can cap car cat cow cup day dog dot ear egg end eye fan far
    fig fox fun gap gas gem gum hat hen hot ice ink jam jar jet joy key kid kit lab leg lip log map
    mix mud net new nut oak oil old owl pan pen pig pot rat red rib row sad sea sky sun tap tea toy
    urn use van vet wax web wig yak yes zip zoo
    """.split()
)
_STARTING = {first: [w for w in WORDS if w[0] == first] for first in {w[0] for w in WORDS}}
_FIRSTS = "".join(sorted(_STARTING))
_CONSONANTS, _VOWELS = "bcdfghklmnprstvz", "aeiou"


def is_word(text: str) -> bool:
    """Two or more lower-case letters with a vowel (or y) among them."""
    return re.fullmatch(r"[a-z]{2,}", text) is not None and bool(set(text) & set("aeiouy"))


class Instruction(NamedTuple):
    """One kind of instruction: how to ask, and how to check.

    Attributes:
        draw: a prompt and one answer that fulfils it.
        pattern: matches the prompts of this kind; its groups are the arguments of `check`.
        check: `(output, *groups) -> fulfilled`.
    """

    draw: Callable[[np.random.Generator], tuple[str, str]]
    pattern: str
    check: Callable[..., bool]


def _syllable(rng: np.random.Generator) -> str:
    first, last = (_CONSONANTS[rng.integers(len(_CONSONANTS))] for _ in range(2))
    return first + _VOWELS[rng.integers(5)] + last


def _draw_repeat(rng: np.random.Generator) -> tuple[str, str]:
    word, times = _syllable(rng), int(rng.integers(2, 4))
    return f"Say {word} {times}x: ", " ".join([word] * times)


def _check_repeat(output: str, word: str, times: str) -> bool:
    return output.split() == [word] * int(times)


def _draw_capitals(rng: np.random.Generator) -> tuple[str, str]:
    word = _syllable(rng)
    return f"Capitals {word}: ", word.upper()


def _check_capitals(output: str, word: str) -> bool:
    return output == word.upper()


def _draw_backwards(rng: np.random.Generator) -> tuple[str, str]:
    word = _syllable(rng) + _VOWELS[rng.integers(5)]
    return f"Backwards {word}: ", word[::-1]


def _check_backwards(output: str, word: str) -> bool:
    return output == word[::-1]


def _draw_initials(rng: np.random.Generator) -> tuple[str, str]:
    count = int(rng.integers(2, 4))
    firsts = [_FIRSTS[i] for i in rng.choice(len(_FIRSTS), size=count, replace=False)]
    words = [_STARTING[first][rng.integers(len(_STARTING[first]))] for first in firsts]
    return f"Words {' '.join(firsts)}: ", " ".join(words)


def _check_initials(output: str, firsts: str) -> bool:
    words = output.split()
    return all(map(is_word, words)) and [word[0] for word in words] == firsts.split()


def _draw_without(rng: np.random.Generator) -> tuple[str, str]:
    word = WORDS[rng.integers(len(WORDS))]
    banned = [letter for letter in "abcdefghiklmnoprstuvw" if letter not in word]
    return f"A {word[0]} word, no {banned[rng.integers(len(banned))]}: ", word


def _check_without(output: str, first: str, banned: str) -> bool:
    return is_word(output) and output[0] == first and banned not in output


INSTRUCTIONS = {
    "repeat": Instruction(_draw_repeat, r"Say (\w+) (\d)x: ", _check_repeat),
    "capitals": Instruction(_draw_capitals, r"Capitals (\w+): ", _check_capitals),
    "backwards": Instruction(_draw_backwards, r"Backwards (\w+): ", _check_backwards),
    "initials": Instruction(_draw_initials, r"Words ([a-z ]+): ", _check_initials),
    "without": Instruction(_draw_without, r"A (\w) word, no (\w): ", _check_without),
}


def follows(example: Example, output: str) -> float:
    """1 when the output fulfils the instruction of the prompt, white space at the ends aside."""
    for instruction in INSTRUCTIONS.values():
        if match := re.fullmatch(instruction.pattern, example.prompt):
            return float(instruction.check(output.strip(), *match.groups()))
    raise ValueError(f"not a prompt of this task: {example.prompt!r}")


def _draw(rng: np.random.Generator) -> Example:
    kinds = tuple(INSTRUCTIONS.values())
    return Example(*kinds[rng.integers(len(kinds))].draw(rng))


def instructions(*, seed: int = 0, train: int = 1000, search: int = 192, test: int = 1000) -> Task:
    """`Words b s: ` -> `bus sun`, or any other two words that start so; five such kinds.

    Args:
        seed: which examples are drawn.
        train: examples in that split; `search` and `test` alike.

    Raises:
        JaxmergeError: more examples were asked for than exist.
    """
    sizes = {"train": train, "search": search, "test": test}
    splits = draw_splits(_draw, name="instructions", seed=seed, **sizes)
    return generation("instructions", splits, follows, max_new_tokens=12)
