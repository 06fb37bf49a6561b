"""How often a letter occurs in a word: held out, never part of the search objective."""

from __future__ import annotations

import numpy as np

from jaxmerge.tasks.common import Example, Task
from jaxmerge.tasks.kinds import generation
from jaxmerge.tasks.splits import draw_splits


def _draw(rng: np.random.Generator) -> Example:
    letters = rng.choice(list("abcdefghiklmnoprst"), size=3, replace=False)
    word = "".join(rng.choice(letters, size=rng.integers(3, 7)))
    return Example(f"Count {letters[0]} in {word}: ", str(word.count(str(letters[0]))))


def counting(*, seed: int = 0, train: int = 1000, search: int = 192, test: int = 1000) -> Task:
    """`Count n in banana: ` -> `2`.

    Args:
        seed: which examples are drawn.
        train: examples in that split; `search` and `test` alike.

    Raises:
        JaxmergeError: more examples were asked for than exist.
    """
    sizes = {"train": train, "search": search, "test": test}
    splits = draw_splits(_draw, name="counting", seed=seed, **sizes)
    return generation("counting", splits, max_new_tokens=2)
