"""Tasks: questions with disjoint splits, judged by exact programs."""

from __future__ import annotations

from collections.abc import Callable

from jaxmerge.tasks.arithmetic import arithmetic
from jaxmerge.tasks.common import Task
from jaxmerge.tasks.counting import counting
from jaxmerge.tasks.ifbench import ifbench
from jaxmerge.tasks.instructions import instructions
from jaxmerge.tasks.lm_eval import lm_eval
from jaxmerge.tasks.programs import programs
from jaxmerge.tasks.reasoning_gym import reasoning_gym
from jaxmerge.tasks.sorting import sorting

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
    "ifbench": ifbench,
    "lm_eval": lm_eval,
    "reasoning_gym": reasoning_gym,
}
