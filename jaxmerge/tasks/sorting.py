"""Digits put in order: held out, never part of the search objective."""

from __future__ import annotations

import numpy as np

from jaxmerge.tasks.common import Example, Task
from jaxmerge.tasks.kinds import generation
from jaxmerge.tasks.splits import draw_splits


def _draw(rng: np.random.Generator) -> Example:
    digits = [str(digit) for digit in rng.integers(0, 10, size=rng.integers(3, 5))]
    return Example(f"Sort {' '.join(digits)}: ", " ".join(sorted(digits)))


def sorting(*, seed: int = 0, train: int = 1000, search: int = 192, test: int = 1000) -> Task:
    """`Sort 7 2 9 2: ` -> `2 2 7 9`: three or four digits.

    Args:
        seed: which examples are drawn.
        train: examples in that split; `search` and `test` alike.

    Raises:
        JaxmergeError: more examples were asked for than exist.
    """
    sizes = {"train": train, "search": search, "test": test}
    splits = draw_splits(_draw, name="sorting", seed=seed, **sizes)
    return generation("sorting", splits, max_new_tokens=10)
