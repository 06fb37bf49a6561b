"""Tasks: questions with disjoint splits, judged by programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxmerge.errors import JaxmergeError
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
