"""The data sets of the package reasoning-gym (arXiv 2505.24760): problems made and judged by code.

There are about a hundred: arithmetic, algebra, words, logic, games. Each has settings of difficulty
and a judge of its own, which gives part of the score for answers that are nearly right.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxmerge.errors import JaxmergeError
from jaxmerge.tasks.answers import is_formula, literal
from jaxmerge.tasks.common import Example, Task
from jaxmerge.tasks.kinds import Form, generation
from jaxmerge.tasks.splits import draw_splits

# Their judges run the model's answer as Python, which models under test must not get to do; in a
# sandbox it could still make itself the score. So answers are parsed instead of run.
LITERALS = frozenset("binary_matrix n_queens spiral_matrix string_insertion".split())
FORMULAS = frozenset("countdown polynomial_multiplication puzzle24".split())
# Refused: integrals need functions, and SymPy may simplify them for ever; `composite` judges by any
# of the others.
REFUSED = frozenset("composite intermediate_integration simple_integration".split())
_UNREADABLE = "("  # what every judge of formulas takes for a wrong answer
_SIZE = 2**16  # problems to draw from, where the arguments do not say otherwise


def reasoning_gym(
    *,
    dataset: str,
    seed: int = 0,
    train: int = 1000,
    search: int = 192,
    test: int = 1000,
    max_new_tokens: int = 32,
    until: Sequence[str] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    form: Form = "",
    shots: int = 0,
    **arguments: Any,
) -> Task:
    """A data set of reasoning-gym, scored by its own judge; `Calculate 5 - 3 - 6.` -> `-4`.

    Args:
        dataset: its name, such as `chain_sum`.
        seed: which examples are drawn.
        train: examples in that split; `search` and `test` alike.
        max_new_tokens: tokens an answer may have.
        until: see `kinds.generation`; `temperature`, `top_p`, `form` and `shots` alike.
        arguments: fields of the data set's own configuration, such as `max_terms=2`; `size` is
            the number of problems to draw from.

    Raises:
        JaxmergeError: the package is not there; it has no such data set or argument; the judge of
            this data set would run what the model writes; more examples were asked for than exist.
    """
    where = f"task {dataset}"
    problems = _create(dataset, {"size": _SIZE, **arguments, "seed": seed}, where)

    def draw(rng: np.random.Generator) -> Example:
        problem = problems[int(rng.integers(len(problems)))]
        return Example(problem["question"], problem["answer"] or "", data=problem)

    sizes = {"train": train, "search": search, "test": test}
    splits = draw_splits(draw, name=dataset, seed=seed, **sizes)

    score = _safe_score(dataset, problems.score_answer)

    def judge(example: Example, output: str) -> float:
        try:
            return float(score(output.strip(), example.data))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            return 0.0  # some judges stumble over an answer that they cannot read

    return generation(
        dataset,
        splits,
        judge,
        max_new_tokens=max_new_tokens,
        until=until,
        temperature=temperature,
        top_p=top_p,
        form=form,
        shots=shots,
        seed=seed,
    )


def _safe_score(dataset: str, score: Any) -> Callable[[str, Any], float]:
    """The judge of a data set, which runs nothing that a model wrote.

    Judges that call `eval` on lists get a reader of literals in its place; judges that call SymPy's
    parser see formulas only.
    """
    if dataset in LITERALS:
        function = score.__func__
        names = {**function.__globals__, "eval": literal}
        without_eval = types.FunctionType(function.__code__, names, function.__name__)
        return types.MethodType(without_eval, score.__self__)
    if dataset in FORMULAS:
        return lambda answer, entry: score(answer if is_formula(answer) else _UNREADABLE, entry)
    return score


def _create(dataset: str, arguments: dict[str, Any], where: str) -> Any:
    """The data set, or an error that says what is wrong with its name or arguments."""
    try:
        from reasoning_gym import create_dataset
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise JaxmergeError(
            "a package is missing",
            expected="pip install 'jaxmerge[reasoning-gym]'",
            where=where,
            found=str(error),
        ) from error
    if dataset not in DATASETS:
        raise JaxmergeError(
            "reasoning-gym has no such data set",
            where=where,
            expected=_nearest(dataset, DATASETS),
            found=dataset,
        )
    if dataset in REFUSED:
        raise JaxmergeError(
            "the judge of this data set would run the model's answers as Python",
            where=where,
            expected="another data set",
        )
    fields = [field.name for field in dataclasses.fields(DATASETS[dataset][1])]
    unknown = [name for name in arguments if name not in fields]
    if unknown:
        raise JaxmergeError(
            "the data set has no such argument",
            where=where,
            expected=_nearest(unknown[0], fields),
            found=unknown[0],
        )
    try:
        return create_dataset(dataset, **arguments)
    except (AssertionError, TypeError, ValueError) as error:
        given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        raise JaxmergeError(
            f"the data set refuses its arguments: {error}",
            where=where,
            expected="arguments as the data set takes them",
            found=given,
        ) from error


def _nearest(name: str, known: Any) -> str:
    return "one of " + ", ".join(difflib.get_close_matches(name, known, 5, 0.5) or sorted(known))
