"""Tasks of EleutherAI's lm-evaluation-harness: prompts, few-shot examples and scores are its own.

The package lm-eval has some ten thousand tasks by name, whose data are on a hub; a task can also be
a YAML file with data beside it. The Python functions that a YAML file names are run as they are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import importlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxmerge.errors import JaxmergeError
from jaxmerge.tasks.common import Example, Task
from jaxmerge.tasks.lm_eval_instances import (
    answer,
    chat_prompt,
    messages,
    requests_of,
    text_prompt,
)
from jaxmerge.tasks.lm_eval_soft import soft
from jaxmerge.tasks.requests import Request, Response
from jaxmerge.tasks.splits import divide, public

# Folders of lm_eval/tasks whose judges run what the model writes, some without saying so in
# `unsafe_code`, or send it to a service, or start other programs.
REFUSED = tuple(
    "cruxeval humaneval humaneval_infilling longproc mbpp noreval/ask_gec pisa realtoxicityprompts"
    " score/math".split()
)
_SHARES = ("acc", "acc_bytes", "acc_mutual_info", "acc_norm", "exact_match")  # from 0 to 1
_SEED = 1234  # lm_eval's default for few-shot examples


class Document(NamedTuple):
    """What `Example.data` is.

    Attributes:
        document: as the task's `process_docs` leaves it.
        instances: of `lm_eval.api.instance`: what the model is asked about it.
    """

    document: Mapping[str, Any]
    instances: tuple[Any, ...]


def lm_eval(
    *,
    task: str,
    metric: str = "",
    filter: str = "",
    num_fewshot: int | None = None,
    form: Literal["text", "chat"] = "text",
    bounds: tuple[float, float] | None = None,
    search: int = 192,
    test: int = 1000,
) -> Task:
    """A task of lm-eval, scored by its own filters and one of its metrics.

    Its documents are those that lm-eval evaluates: of the test split, or of the validation split
    where there is no other. The CRC-32 of a document, as JSON with sorted keys, decides which of
    our splits it belongs to: see `splits.divide`. A training split serves for few-shot examples
    only; they are drawn as `lm_eval` draws them for all documents, with its default seed.

    Args:
        task: its name, such as `hellaswag`, or the path of its YAML file.
        metric: one of its metrics whose value is a mean over documents; "": the first. One where
            lower is better is negated.
        filter: the name of one of its filter pipelines; "": the first.
        num_fewshot: examples before each question; None: as many as the task says.
        form: `text`: prompts as lm_eval makes them without a chat template; `chat`: its messages
            become turns of the chat, few-shot examples each their own, and the task's description
            stands before the first.
        bounds: the least and greatest value that the metric can have; None: 0 and 1 for lm-eval's
            own shares (`acc`, `exact_match`, ...), else no bounds.
        search: documents in that split, at most; `test` alike.

    Raises:
        JaxmergeError: the package is not there; there is no such task, metric or filter; the task
            is a group, runs what models write, or shows images; its data can't be had; few-shot
            examples would come from the documents that are scored.
    """
    where, task = f"task {task}", os.path.expanduser(task)
    found = _load(task, where)
    _check_kind(found, form, where)
    _set_shots(found, num_fewshot, where)
    metric = metric or next(iter(found.aggregation()))
    _check_metric(found, metric, where)
    pipeline = _pipeline(found, filter, where)
    sign = 1.0 if found.higher_is_better().get(metric, True) else -1.0
    prompt = chat_prompt if form == "chat" else text_prompt

    def requests(example: Example) -> list[Request]:
        asked = [requests_of(each, prompt, where) for each in example.data.instances]
        return [request for of_instance in asked for request in of_instance]

    def judge(example: Example, responses: Sequence[Response]) -> float:
        value: Any = _values(found, pipeline, example.data, responses).get(metric)
        if not hasattr(value, "__float__"):
            raise _no_number(metric, value, where)
        return sign * float(value)

    examples = _examples(found, form, where)
    low, high = bounds or ((0.0, 1.0) if metric in _SHARES else (-math.inf, math.inf))
    low, high = (low, high) if sign > 0 else (-high, -low)
    return Task(
        found.task_name,
        divide(examples, _identity, name=task, search=search, test=test),
        requests,
        judge,
        bounds=(low, high),
        soft=lambda each: soft(found, metric, high, each, requests(each), judge),
        warning=public(found.task_name) if _is_public(task, found) else "",
    )


def _load(task: str, where: str) -> Any:
    """The task as lm_eval makes it, its data read."""
    _check_package(where)
    is_path = Path(task).suffix in (".yaml", ".yml")
    if is_path and not Path(task).is_file():
        raise JaxmergeError(
            "there is no such file",
            where=where,
            expected="a YAML file of a task, or the name of one that lm_eval knows",
        )
    if is_path:
        _check_folder(Path(task).resolve().as_posix(), where)
    manager = _manager(with_names=not is_path)
    if not is_path:
        _check_name(manager, task, where)
    with _readable(where, "lm_eval can't make this task"):
        loaded = manager.load([task])
    if loaded.get("groups") or len(loaded["tasks"]) != 1:
        raise _several(sorted(loaded["tasks"]), where)
    (found,) = loaded["tasks"].values()
    return found


def _check_package(where: str) -> None:
    try:
        importlib.import_module("lm_eval.tasks")
    except ImportError as error:
        raise JaxmergeError(
            "a package is missing",
            expected="pip install 'jaxmerge[lm-eval]'",
            where=where,
            found=str(error),
        ) from error


@functools.cache
def _manager(*, with_names: bool) -> Any:
    """What makes tasks; to know the names of all takes it seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=with_names)


def _check_name(manager: Any, task: str, where: str) -> None:
    entry = manager.task_index.get(task)
    if entry is None:
        near = difflib.get_close_matches(task, manager.all_tasks, 5, 0.5)
        raise JaxmergeError(
            "lm_eval has no such task",
            where=where,
            expected="the path of a YAML file" + "".join(f", {name}" for name in near),
            found=task,
        )
    if task in manager.all_tags:
        raise _several(sorted(entry.tags), where)
    if task in manager.all_groups:
        members = [
            each if isinstance(each, str) else each.get("task") or each.get("group", "")
            for each in entry.cfg["task"]
        ]
        raise _several(members, where)
    _check_folder(entry.yaml_path.as_posix() if entry.yaml_path else "", where)


def _check_folder(path: str, where: str) -> None:
    if any(f"/lm_eval/tasks/{folder}/" in path for folder in REFUSED):
        raise _unsafe(where)


def _several(members: Sequence[str], where: str) -> JaxmergeError:
    return JaxmergeError(
        "this is a group: its members have scores of their own",
        where=where,
        expected=f"one of its {len(members)} members: {', '.join(map(str, members))}",
    )


def _no_number(metric: str, value: Any, where: str) -> JaxmergeError:
    return JaxmergeError(
        f"metric {metric} is no number for one document",
        where=where,
        expected="a metric of single documents",
        found=repr(value),
    )


def _unsafe(where: str) -> JaxmergeError:
    return JaxmergeError(
        "the judge of this task would run what the model writes, or send it elsewhere",
        where=where,
        expected="another task; human_eval runs programs in a sandbox",
    )


@contextlib.contextmanager
def _readable(where: str, what: str) -> Iterator[None]:
    """Within it, what lm_eval, its YAML files, templates and data raise is one readable error."""
    import jinja2
    import yaml
    from datasets.exceptions import DatasetsError

    raised = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError)
    raised += (OSError, RuntimeError, TypeError, ValueError)
    raised += (DatasetsError, jinja2.TemplateError, yaml.YAMLError)
    try:
        yield
    except raised as error:
        found = f"{type(error).__name__}: {error}".split("\n")[0]
        raise JaxmergeError(
            what, where=where, expected="a task that lm_eval itself runs here", found=found
        ) from error


def _check_kind(found: Any, form: str, where: str) -> None:
    if found.get_config("unsafe_code"):
        raise _unsafe(where)
    if getattr(found, "MULTIMODAL", False):
        raise JaxmergeError(
            "the task shows pictures or plays sounds", where=where, expected="a task of text alone"
        )
    if form == "chat" and found.get_config("gen_prefix"):
        raise JaxmergeError(
            "the task begins the answer itself, which a chat here does not",
            where=f"{where}, gen_prefix",
            expected='form="text"',
        )


def _set_shots(found: Any, count: int | None, where: str) -> None:
    """Sets the number of few-shot examples, and the generator that draws them."""
    count = (found.get_config("num_fewshot") or 0) if count is None else count
    found.set_config("num_fewshot", count)
    found.set_fewshot_seed(_SEED)
    if not count or not _shots_are_scored(found):
        return
    raise JaxmergeError(
        "few-shot examples would come from the documents that are scored",
        where=f"{where}, num_fewshot",
        expected="0, or a task with a training split, a fewshot_split or samples",
        found=str(count),
    )


def _shots_are_scored(found: Any) -> bool:
    """Whether lm_eval would draw few-shot examples from the split that it evaluates."""
    scored = found.get_config("test_split") or found.get_config("validation_split")
    settings = getattr(found, "fewshot_cfg", None)
    if settings is not None and settings.split is not None:
        return settings.split == scored
    if settings is not None and settings.samples is not None:
        return False
    first = (found.get_config(f"{name}_split") for name in ("training", "validation", "test"))
    return next(filter(None, first), scored) == scored


def _check_metric(found: Any, metric: str, where: str) -> None:
    from lm_eval.api.metrics import mean

    known = found.aggregation()
    means = [name for name, aggregation in known.items() if aggregation is mean]
    if metric not in means:
        what = "its value is no mean over documents" if metric in known else "there is none"
        raise JaxmergeError(
            f"the task can't be scored by metric {metric}: {what}",
            where=where,
            expected=f"one of {', '.join(means)}" if means else "another task: it has no other",
            found=metric,
        )


def _pipeline(found: Any, name: str, where: str) -> Any:
    pipelines = {each.name: each for each in found._filters}
    if name and name not in pipelines:
        raise JaxmergeError(
            "the task has no such filter",
            where=where,
            expected=f"one of {', '.join(pipelines)}",
            found=name,
        )
    return pipelines[name or next(iter(pipelines))]


def _examples(found: Any, form: str, where: str) -> list[Example]:
    """All documents, with what the model is asked about each."""
    chat: dict[str, Any] = {}
    if form == "chat":
        chat = {
            "apply_chat_template": True,
            "fewshot_as_multiturn": True,
            "chat_template": messages,
        }
    with _readable(where, "lm_eval can't make the task's prompts"):
        found.build_all_requests(**chat)
    by_document: dict[int, list[Any]] = {}
    for instance in found.instances:
        by_document.setdefault(instance.doc_id, []).append(instance)
    return [
        Example(
            str(instances[0].args[0]),
            data=Document(instances[0].doc, tuple(sorted(instances, key=lambda each: each.idx))),
        )
        for instances in by_document.values()
    ]


def _identity(example: Example) -> str:
    return json.dumps(example.data.document, sort_keys=True, ensure_ascii=False, default=str)


def _values(
    found: Any, pipeline: Any, document: Document, responses: Sequence[Response]
) -> Mapping[str, Any]:
    """The metrics of one document, as the task computes them from filtered responses."""
    waiting = iter(responses)
    answered = []
    for instance in document.instances:
        said = [next(waiting) for _ in range(instance.repeats or 1)]
        answers = [answer(instance.request_type, response) for response in said]
        answered.append(dataclasses.replace(instance, resps=answers, filtered_resps={}))
    pipeline.apply(answered)
    results = [instance.filtered_resps[pipeline.name] for instance in answered]
    return found.process_results(document.document, results)


def _is_public(task: str, found: Any) -> bool:
    """Whether the data are known to all: of a task by name, or from a hub."""
    data = str(found.get_config("dataset_path") or "")
    return not Path(task).is_file() or ("/" in data and not Path(data).exists())
