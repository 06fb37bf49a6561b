"""The settings of mergekit's YAML: which value a parameter has for a tensor.

A setting is a number, a list of numbers (a gradient along the layers), or a list of conditions,
each for the tensors whose name has a certain text in it. Levels come one after the other: the model
in its slice, the slice, the module, the document; one at which no condition holds is passed over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxmerge.mergekit.nodes import Node, as_number


class Condition(NamedTuple):
    """A value for the tensors in whose name `filter` is; "": for all."""

    filter: str
    value: Any  # a scalar; or a tuple of them, a gradient


class Setting(NamedTuple):
    """What a parameter is, in one place of the YAML."""

    conditions: tuple[Condition, ...]
    node: Node


Parameters = Mapping[str, Setting]


def parameters(node: Node | None) -> Parameters:
    """The settings that stand under `parameters`.

    Raises:
        JaxmergeError: one of them can't be read.
    """
    entries = node.mapping() if node else {}
    return {name: _setting(each) for name, each in entries.items() if each.value is not None}


def _setting(node: Node) -> Setting:
    if isinstance(node.value, dict):
        return Setting((_condition(node),), node)
    if not isinstance(node.value, list):
        return Setting((Condition("", as_number(node.value)),), node)
    items = node.sequence()
    conditions = [isinstance(each.value, dict) for each in items]
    if all(conditions):
        return Setting(tuple(_condition(each) for each in items), node)
    if any(conditions):
        raise node.error("has conditions and plain values side by side", found=node.shown())
    return Setting((Condition("", _gradient(node)),), node)


def _condition(node: Node) -> Condition:
    entries = node.mapping(("filter", "value"))
    if "value" not in entries or entries["value"].value is None:
        raise node.error("has no value", expected="value: NUMBER", found=node.shown())
    value = entries["value"]
    filtered = entries.get("filter")
    text = "" if filtered is None or filtered.value in (None, "*") else filtered.text()
    if isinstance(value.value, list):
        return Condition(text, _gradient(value))
    if isinstance(value.value, dict):
        raise value.error("must be a number or a list of numbers", found=value.shown())
    return Condition(text, as_number(value.value))


def _gradient(node: Node) -> tuple[Any, ...]:
    values = tuple(as_number(each.value) for each in node.sequence())
    if any(isinstance(each, dict | list) or each is None for each in values):
        raise node.error("a gradient is a list of numbers", found=node.shown())
    if len({isinstance(each, float) for each in values}) > 1:
        raise node.error("is partly numbers and partly not", found=node.shown())
    return values


def evaluate(setting: Setting, name: str, at: float) -> Any:
    """The value of a setting for a tensor; None where no condition holds.

    A gradient v_0 .. v_{n-1} has its values at i / (n - 1) and is linear between them: with
    x = at (n - 1) and i = floor(x), it is (1 - (x - i)) v_i + (x - i) v_{i+1}. One of booleans or
    texts is v_i.

    Args:
        setting: of one place.
        name: of the tensor; the first condition whose filter is a part of it holds.
        at: where the tensor's layer is in its slice, from 0 to 1.
    """
    for filtered, value in setting.conditions:
        if filtered and filtered not in name:
            continue
        if not isinstance(value, tuple):
            return value
        x = at * (len(value) - 1)
        i = min(math.floor(x), len(value) - 1)
        if not isinstance(value[0], float):
            return value[i]
        following = value[min(i + 1, len(value) - 1)]
        return (1 - (x - i)) * value[i] + (x - i) * following
    return None


class Value(NamedTuple):
    """What a parameter is for a tensor, and where that stands."""

    value: Any
    node: Node


def lookup(parameter: str, levels: Sequence[Parameters], name: str, at: float) -> Value | None:
    """What a parameter is for a tensor: at the first of the levels where it is anything.

    Args:
        parameter: its name.
        levels: the nearest first.
        name: of the tensor, for filters.
        at: see `evaluate`.
    """
    for level in levels:
        if parameter not in level:
            continue
        value = evaluate(level[parameter], name, at)
        if value is not None:
            return Value(value, level[parameter].node)
    return None
