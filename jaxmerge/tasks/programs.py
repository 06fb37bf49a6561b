"""What does a small Python program evaluate to? One of four choices."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jaxmerge.tasks.common import Example, Task
from jaxmerge.tasks.kinds import multiple_choice
from jaxmerge.tasks.splits import draw_splits

# Statements and a last expression, what it evaluates to, and what a careless reader would say.
Program = tuple[str, str, list[str]]


def _digits(rng: np.random.Generator, count: int) -> list[int]:
    return [int(digit) for digit in rng.choice(10, size=count, replace=False)]


def _names(rng: np.random.Generator) -> tuple[str, str]:
    first, second = rng.choice(list("abcdefgh"), size=2, replace=False)
    return str(first), str(second)


def _read(rng: np.random.Generator) -> Program:
    (x, y), (a, b) = _names(rng), _digits(rng, 2)
    value = a if (asked := (x, y)[rng.integers(2)]) == x else b
    return f"{x}={a};{y}={b};{asked}", str(value), [str(a + b - value), str(a + b)]


def _add(rng: np.random.Generator) -> Program:
    (x, y), (a, b) = _names(rng), _digits(rng, 2)
    return f"{x}={a};{y}={b};{x}+{y}", str(a + b), [str(a), str(b), str(abs(a - b))]


def _largest(rng: np.random.Generator) -> Program:
    numbers = _digits(rng, 3)
    function = (max, min)[rng.integers(2)]
    source = f"{function.__name__}({','.join(map(str, numbers))})"
    return source, str(function(numbers)), list(map(str, numbers))


def _index(rng: np.random.Generator) -> Program:
    numbers, index = _digits(rng, 4), int(rng.integers(4))
    source = f"[{','.join(map(str, numbers))}][{index}]"
    return source, str(numbers[index]), list(map(str, numbers))


PROGRAMS: tuple[Callable[[np.random.Generator], Program], ...] = (
    _read,
    _add,
    _largest,
    _index,
)


def _draw(rng: np.random.Generator) -> Example:
    source, value, wrong = PROGRAMS[rng.integers(len(PROGRAMS))](rng)
    spare = map(str, rng.permutation(19))
    wrong = list(dict.fromkeys([*wrong, *spare]))
    # The beginning of the right choice (1 of 14) would always be at least as likely as all of it.
    choices = [value, *[choice for choice in wrong if not value.startswith(choice)][:3]]
    return Example(f"{source} -> ", value, tuple(choices[i] for i in rng.permutation(4)))


def programs(*, seed: int = 0, train: int = 1000, search: int = 192, test: int = 1000) -> Task:
    """`a=3;b=5;a+b -> ` -> `8`, out of `3`, `5`, `2` and `8`; chance is 1/4.

    Args:
        seed: which examples are drawn.
        train: examples in that split; `search` and `test` alike.

    Raises:
        JaxmergeError: more examples were asked for than exist.
    """
    sizes = {"train": train, "search": search, "test": test}
    splits = draw_splits(_draw, name="programs", seed=seed, **sizes)
    return multiple_choice("programs", splits)
