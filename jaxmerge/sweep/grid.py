"""The grid of a sweep: fields of a config with several values each, and a config for each cell."""

from __future__ import annotations

import ast
import copy
import functools
import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
from absl import flags
from ml_collections import config_flags

from jaxmerge.config import Config
from jaxmerge.errors import JaxmergeError

_LONGEST_NAME = 120  # characters; file systems take 255 bytes


class Cell(NamedTuple):
    """One combination of values.

    Attributes:
        name: such as `search.strategy=SNES,seed=1`; a file name, unique in the grid.
        values: of the fields, as the command line takes them.
        config: with these values.
    """

    name: str
    values: dict[str, str]
    config: Config


def cells(config: Config, axes: Sequence[str]) -> list[Cell]:
    """All combinations of the axes' values; the last axis moves fastest.

    Args:
        config: what the cells have in common.
        axes: each `FIELD=VALUE,VALUE,...`. Values are read as the command line reads those of
            --config.FIELD; several tuples are written `('a','b'),('c',)`.

    Raises:
        JaxmergeError: names the axis: no such field, a value of another type, or something twice.
    """
    grid: dict[str, list[str]] = {}
    for axis in axes:
        field, equals, text = axis.partition("=")
        if not equals:
            raise JaxmergeError(
                "has no values", where=f"--sweep={axis}", expected="FIELD=VALUE,..."
            )
        if field in grid:
            raise JaxmergeError(
                "the field is swept twice",
                where=f"--sweep={axis}",
                expected="one --sweep of each field, with all its values",
            )
        grid[field] = _values(config, field, text)
    if not grid:
        raise JaxmergeError("there is nothing to sweep", expected="--sweep=FIELD=VALUE,VALUE,...")
    combinations = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    found = [Cell(_name(values), values, _changed(config, values)) for values in combinations]
    _check_one_process(found)
    return found


def shard(cells: Sequence[Cell], which: str) -> Sequence[Cell]:
    """The i-th of n parts of nearly the same size, of cells that follow each other.

    Args:
        cells: of the whole grid.
        which: `i/n`, with i from 1 to n.

    Raises:
        JaxmergeError: it is not of that form, or there are no cells for it.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", which)
    i, n = (int(number) for number in match.groups()) if match else (0, 0)
    if not 1 <= i <= n <= len(cells):
        raise JaxmergeError(
            "there is no such shard",
            where="--shard",
            expected=f"i/n with i from 1 to n, and n at most {len(cells)}, the number of cells",
            found=which,
        )
    return cells[len(cells) * (i - 1) // n : len(cells) * i // n]


def as_text(value: Any) -> str:
    """A value of a field as the command line takes it."""
    if isinstance(value, ml_collections.ConfigDict):
        return repr(value.to_dict())
    return value if isinstance(value, str) else repr(value)


def _values(config: Config, field: str, text: str) -> list[str]:
    """The values of an axis, each once, as the command line takes them."""
    where = f"--sweep={field}={text}"
    try:
        now = functools.reduce(getattr, field.split("."), config)
    except AttributeError as error:
        raise JaxmergeError(
            "the config has no such field",
            where=where,
            expected="a field of the config, without the word config: search.sigma=0.1,0.3",
            found=str(error.args[0]),
        ) from error
    texts = text.split(",")
    if isinstance(now, tuple | ml_collections.ConfigDict):
        try:
            texts = [repr(value) for value in ast.literal_eval(f"[{text}]")]
        except (ValueError, SyntaxError) as error:
            raise JaxmergeError(
                "these values can't be read", where=where, expected="('a','b'),('c',)"
            ) from error
    values = []
    for each in texts:
        changed = _changed(config, {field: each})
        value = as_text(functools.reduce(getattr, field.split("."), changed))
        if value in values:
            raise JaxmergeError(
                "a value is there twice", where=where, expected="values that differ", found=value
            )
        values.append(value)
    return values


def _changed(config: Config, values: Mapping[str, str]) -> Config:
    """A copy of the config with these values, read as the command line reads them."""
    arguments = ["", *(f"--config.{field}={value}" for field, value in values.items())]
    parsed = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict(
            "config", copy.deepcopy(config), flag_values=parsed, sys_argv=arguments
        )
        parsed(arguments)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        said = str(error.args[0] if error.args else error)
        raise JaxmergeError(
            said, where=f"--sweep={next(iter(values))}", expected="values that the field can have"
        ) from error
    return parsed["config"].value


def _name(values: Mapping[str, str]) -> str:
    """The values as a file name; those that can't be one are told apart by a digest."""
    plain = ",".join(f"{field}={value}" for field, value in values.items())
    safe = ",".join(f"{field}={_safe(value)}" for field, value in values.items())[:_LONGEST_NAME]
    return safe if safe == plain else f"{safe}-{hashlib.sha256(plain.encode()).hexdigest()[:8]}"


def _safe(value: str) -> str:
    unsafe = r"[^A-Za-z0-9._+-]+"
    return re.sub(unsafe, "_", value).strip("_") if re.search(unsafe, value) else value


def _check_one_process(cells: Sequence[Cell]) -> None:
    fields = {
        "mesh.cpu_devices": {cell.config.mesh.cpu_devices for cell in cells},
        "compilation_cache": {cell.config.compilation_cache for cell in cells},
    }
    for field, values in fields.items():
        if len(values) > 1:
            raise JaxmergeError(
                "a process has only one of these, and the cells of a sweep share a process",
                where=field,
                expected="one value; sweep it with several commands",
                found=", ".join(map(str, values)),
            )
