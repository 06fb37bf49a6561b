"""Sums, written out as digits."""

from __future__ import annotations

import numpy as np

from jaxmerge.tasks.common import Example, Task
from jaxmerge.tasks.kinds import generation
from jaxmerge.tasks.splits import draw_splits


def _draw(rng: np.random.Generator) -> Example:
    a, b = int(rng.integers(100, 1000)), int(rng.integers(1, 10))
    return Example(f"What is {a}+{b}? ", str(a + b))


def arithmetic(*, seed: int = 0, train: int = 1000, search: int = 192, test: int = 1000) -> Task:
    """`What is 347+8? ` -> `355`: three digits and one, with the carry.

    Args:
        seed: which examples are drawn.
        train: examples in that split; `search` and `test` alike.

    Raises:
        JaxmergeError: more examples were asked for than exist.
    """
    sizes = {"train": train, "search": search, "test": test}
    splits = draw_splits(_draw, name="arithmetic", seed=seed, **sizes)
    return generation("arithmetic", splits, max_new_tokens=4)
