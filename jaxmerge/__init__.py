"""Search for the linear combination of checkpoints that beats all of them, on JAX.

The command line is `jaxmerge --help`. From Python, the names below are what there is;
each is imported when it is first used, so that `import jaxmerge` is quick and starts nothing.

Letters in names of arrays are dimensions, as in `weights_PxK`::

    P  population          B  batch               D  model width
    K  checkpoints         T  sequence            F  feed-forward width
    L  layers              S  cache length        H  query heads
    G  layer groups        V  vocabulary          J  key/value heads
    N  examples            C  head width (models), candidates of a step (evaluation)
"""

from __future__ import annotations

import importlib

_HOME = {  # public name -> module; none is the name of a module of the package
    "Archive": "search.archive",
    "Bytes": "evaluation.tokenizer",
    "Candidate": "rundir",
    "DecoderConfig": "models.architecture",
    "Evaluator": "evaluation.evaluator",
    "Example": "tasks.common",
    "JaxmergeError": "errors",
    "Model": "models.model",
    "Objective": "scores.objective",
    "Pool": "checkpoints.pool",
    "Pretrained": "evaluation.tokenizer",
    "RunDirectory": "rundir",
    "Task": "tasks.common",
    "build_task": "tasks:build",
    "decoder": "models.decoder",
    "define_objective": "scores.objective:define",
    "evosax": "search.strategies",
    "export_merge": "checkpoints.export:export",
    "from_apply": "models.model",
    "linear": "merge.linear",
    "load_pool": "checkpoints.pool:load",
    "make_mesh": "sharding",
    "merger": "merge.linear",
    "model_of": "models.decoder:described",
    "save": "checkpoints.orbax",
    "schedule_weights": "merge.schedules",
    "search_weights": "search.loop:search",
    "survey": "checkpoints.survey",
}


def __getattr__(name: str):  # Any: `typing` would take half of the time before `entry.begin`
    if name not in _HOME:
        raise AttributeError(f"module 'jaxmerge' has no attribute {name!r}")
    module, _, attribute = _HOME[name].partition(":")
    return getattr(importlib.import_module(f"jaxmerge.{module}"), attribute or name)


def __dir__() -> list[str]:
    return sorted(_HOME)
