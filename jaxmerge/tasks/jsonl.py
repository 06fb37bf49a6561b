"""A user's own questions, one JSON object a line."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from collections.abc import Mapping
from typing import Any

from jaxmerge.errors import JaxmergeError, check_text
from jaxmerge.tasks.common import Example, Task
from jaxmerge.tasks.judges import JUDGES
from jaxmerge.tasks.kinds import TextJudge, generation, multiple_choice
from jaxmerge.tasks.splits import divide
from jaxmerge.textfiles import read_text

# A placeholder, a brace that is written twice, or one that is neither.
_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_SINGLE = re.compile(r"\{([^{}]+)\}")  # a template that is one field
_MISSING = object()


def jsonl(
    *,
    path: str,
    train_path: str = "",
    search: int = 192,
    test: int = 1000,
    prompt: str = "{prompt}",
    target: str = "{target}",
    choices: str = "",
    judge: str = "exact",
    **options: Any,
) -> Task:
    r"""Questions from a file, as `{"prompt": "1+1=", "target": "2"}` in each line.

    A question is its prompt and choices, and decides whether it is a search or a test example, see
    `splits.divide`: lines can be added, and every other stays where it is.

    Args:
        path: the file.
        train_path: another such file, for `shots` and fine-tuning; no question may be there twice.
        search: examples in that split, at most; `test` alike.
        prompt: what the model reads; `{name}` stands for that field of the line, `{name.inner.0}`
            for a part of it, values that are no texts being written as JSON; `{{` and `}}` are
            braces.
        target: the answer, alike. A field that is a list has several, any of which will do; with
            `choices`, a number is the place of the right one, counted from 0.
        choices: the field that has the list of choices: makes it multiple choice.
        judge: of generated texts: `exact`, `regex`, `contains`, `numeric` or `json`, see `judges`;
            or `module:function`, which is called with the `Example`, whose `data` is the line, and
            the text, and gives a score from 0 to 1.
        options: of `kinds.multiple_choice` where there are choices, else of `kinds.generation`.

    Raises:
        JaxmergeError: a file can't be read; a line is no JSON object or lacks a field; a brace in
            a template is no placeholder; the judge is unknown or can't read a target; a question is
            there twice; a split is empty.
    """
    name, fields = f"jsonl {path}", (prompt, target, choices)
    found = {
        split: {where: _example(line, where, *fields) for where, line in _read(file)}
        for split, file in (("", path), ("train", train_path))
        if file
    }
    _check_apart(found)
    splits = divide(found[""].values(), _identity, name=name, search=search, test=test)
    splits["train"] = tuple(found.get("train", {}).values())
    if choices:
        return multiple_choice(name, splits, **options)
    every = {where: example for of_file in found.values() for where, example in of_file.items()}
    made = generation(name, splits, _judge(judge, name, every), **options)
    # An expression is no answer, though many match themselves.
    return dataclasses.replace(made, soft=lambda _: None) if judge == "regex" else made


def _read(path: str) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a file, each with where it stands."""
    text = read_text(path)
    lines = []
    for number, line in enumerate(re.split(r"\r\n?|\n", text), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise JaxmergeError(
                "this is no JSON",
                where=where,
                expected='an object a line, such as {"prompt": "1+1=", "target": "2"}',
                found=str(error),
            ) from error
        if not isinstance(content, dict):
            raise JaxmergeError(
                "this is no JSON object",
                where=where,
                expected='an object a line, such as {"prompt": "1+1=", "target": "2"}',
                found=line[:80],
            )
        lines.append((where, content))
    return lines


def _example(line: dict[str, Any], where: str, prompt: str, target: str, choices: str) -> Example:
    question, answers = _filled(prompt, line, where)[0], _filled(target, line, where)
    check_text(where, question, *answers)
    if not choices:
        return Example(question, answers[0], data={**line, "targets": answers})
    options = tuple(map(_text, _field(line, choices, where, list)))
    check_text(where, *options)
    right = answers[0]
    single = _SINGLE.fullmatch(target)
    place = _field(line, single[1], where, object) if single else None
    if type(place) is int:
        right = options[place] if 0 <= place < len(options) else f"place {place}"
    if right not in options or len(set(options)) < len(options):
        raise JaxmergeError(
            "the target must be one of the choices, which must differ from each other",
            where=where,
            expected=f"one of {options}, or its place, a number from 0",
            found=right,
        )
    return Example(question, right, options, line)


def _filled(template: str, line: dict[str, Any], where: str) -> list[str]:
    """The template with the line's fields in their places; of a list of answers, once for each."""
    single = _SINGLE.fullmatch(template)
    value = _field(line, single[1], where, object) if single else None
    if isinstance(value, list):
        if not value:
            raise JaxmergeError(
                "the list of answers is empty",
                where=f"{where}, {template}",
                expected="at least one answer; lines without any must be left out",
            )
        return [_text(each) for each in value]

    def placed(match: re.Match[str]) -> str:
        if match[0] in ("{{", "}}"):
            return match[0][0]
        if match[1] is None:
            raise JaxmergeError(
                "a brace in the template belongs to no placeholder",
                where=f"{where}, {template[:200]!r}",
                expected="{name} for a field of the line; {{ and }} for braces",
                found=f"{match[0]} at character {match.start() + 1}",
            )
        return _text(_field(line, match[1], where, object))

    return [_BRACES.sub(placed, template)]


def _text(value: Any) -> str:
    """A text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _field(line: dict[str, Any], name: str, where: str, kind: type) -> Any:
    """A field of the line by its name, or a part of one by its path, such as `answers.text.0`.

    Raises:
        JaxmergeError: there is no such field, or it is null, or of another kind.
    """
    value = _part(line, name)
    if not isinstance(value, kind) or value is None or value is _MISSING:
        raise JaxmergeError(
            f"the line has no {'list ' if kind is list else ''}{name}",
            where=where,
            expected="that field, or other names in the task's prompt, target and choices: "
            "{name}, or {name.inner} for a part of a field; {{ and }} are braces",
            found=", ".join(_paths(line)),
        )
    return value


def _part(value: Any, path: str) -> Any:
    """The part of a value at a path; a key that is the whole path goes first."""
    if isinstance(value, dict) and path in value:
        return value[path]
    if isinstance(value, list) and path.isdecimal():
        return value[int(path)] if int(path) < len(value) else _MISSING
    ends = [i for i, character in enumerate(path) if character == "."]
    for end in ends:
        inner = _part(value, path[:end])
        if inner is not _MISSING and isinstance(inner, dict | list):
            return _part(inner, path[end + 1 :])
    return _MISSING


def _paths(line: Mapping[str, Any]) -> list[str]:
    """The fields, each with those of an object in it."""
    return [
        *line,
        *(
            f"{name}.{key}"
            for name, value in line.items()
            if isinstance(value, dict)
            for key in value
        ),
    ]


def _judge(named: str, task: str, examples: Mapping[str, Example]) -> TextJudge:
    """The judge of this name; of several targets, the one that suits best.

    Args:
        named: in `JUDGES`, or `module:function`.
        task: for error messages.
        examples: by where they stand; the judge must be able to read their targets.
    """
    if named not in JUDGES:
        return _imported(named, task)
    compare, check = JUDGES[named]
    for where, example in examples.items():
        for target in example.data["targets"]:
            try:
                check(target)
            except (ArithmeticError, LookupError, RecursionError, ValueError, re.error) as error:
                raise JaxmergeError(
                    f"the judge {named} can't read the target",
                    where=where,
                    expected="targets of the form that it compares, or another judge",
                    found=f"{target!r}: {error}",
                ) from error
    return lambda example, output: float(
        any(compare(output, target) for target in example.data["targets"])
    )


def _imported(named: str, task: str) -> TextJudge:
    module, _, function = named.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise JaxmergeError(
            "unknown judge",
            where=f"task {task}",
            expected=f"{', '.join(JUDGES)}, or module:function",
            found=f"{named}: {error}",
        ) from error


def _identity(example: Example) -> str:
    """What makes a question this one: its prompt and its choices."""
    return "\n".join((example.prompt, *example.choices))


def _check_apart(found: Mapping[str, Mapping[str, Example]]) -> None:
    """Raises unless all questions of both files differ from each other."""
    known: dict[str, str] = {}
    for examples in found.values():
        for where, example in examples.items():
            before = known.setdefault(_identity(example), where)
            if before != where:
                raise JaxmergeError(
                    "the question is there twice",
                    where=where,
                    expected=f"another question than that of {before}",
                    found=example.prompt[:80],
                )
