"""Tasks: questions with disjoint splits, judged by programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxmerge.errors import JaxmergeError, check_least
from jaxmerge.tasks.arithmetic import arithmetic
from jaxmerge.tasks.common import Task
from jaxmerge.tasks.counting import counting
from jaxmerge.tasks.human_eval import human_eval
from jaxmerge.tasks.ifbench import ifbench
from jaxmerge.tasks.instructions import instructions
from jaxmerge.tasks.jsonl import jsonl
from jaxmerge.tasks.lm_eval import lm_eval
from jaxmerge.tasks.programs import programs
from jaxmerge.tasks.reasoning_gym import reasoning_gym
from jaxmerge.tasks.sorting import sorting
from jaxmerge.tasks.text import text

TASKS: dict[str, Callable[..., Task]] = {
    "arithmetic": arithmetic,
    "instructions": instructions,
    "programs": programs,
    "sorting": sorting,
    "counting": counting,
}
# What `builder` of a task in a config may name besides import paths.
BUILDERS: dict[str, Callable[..., Task]] = {
    **TASKS,
    "human_eval": human_eval,
    "ifbench": ifbench,
    "jsonl": jsonl,
    "lm_eval": lm_eval,
    "perplexity": text,
    "reasoning_gym": reasoning_gym,
}
# The argument that says what a builder is about, of those that need to be told.
SUBJECTS = {"jsonl": "path", "lm_eval": "task", "perplexity": "path", "reasoning_gym": "dataset"}


def check(
    searched: Sequence[str],
    heldout: Sequence[str],
    builders: Mapping[str, str],
    search_examples: int,
    test_examples: int,
) -> None:
    """Raises `JaxmergeError`, which names the field of a config, for tasks that can't be had.

    Args:
        searched: names of the tasks of the objective.
        heldout: names of those that the search must not see.
        builders: by the name of a task, where it is not in `TASKS`.
        search_examples: of each task; `test_examples` alike.
    """
    both = {*searched} & {*heldout}
    if both:
        raise JaxmergeError(
            "a held-out task must not steer the search",
            where="heldout",
            expected="each task in objective.tasks or in heldout, not in both",
            found=", ".join(both),
        )
    for name in (*searched, *heldout):
        if name == "objective":  # the key of their aggregate in results.json
            raise JaxmergeError(
                "a task can't have this name", where="tasks", expected="another name", found=name
            )
        if name not in TASKS and not builders.get(name):
            raise JaxmergeError(
                "unknown task",
                where="objective.tasks and heldout",
                expected=f"one of {', '.join(TASKS)}, or a field of `tasks` with a builder",
                found=name,
            )
    check_least("objective.search_examples", search_examples, 1)
    check_least("objective.test_examples", test_examples, 1)


def build(builder: str, **arguments: Any) -> Task:
    """A task that comes with the package.

    Args:
        builder: a name in `BUILDERS`: `arithmetic`, `instructions`, `programs`, `sorting` and
            `counting`, which are generated; or `human_eval`, `ifbench`, `jsonl`, `lm_eval`,
            `perplexity` and `reasoning_gym`.
        arguments: of the builder: always `search` and `test`, the numbers of examples.

    Raises:
        JaxmergeError: there is no such builder; or the builder's own.
    """
    if builder not in BUILDERS:
        raise JaxmergeError(
            "there is no such task", where="builder", expected=", ".join(BUILDERS), found=builder
        )
    return BUILDERS[builder](**arguments)
