"""A YAML file as values that know which line they stand on."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection
from typing import Any

import yaml

from jaxmerge import textfiles
from jaxmerge.errors import OF_OTHER_KIND, JaxmergeError

_MOST = 100_000  # values in a document


@dataclasses.dataclass(frozen=True)
class Node:
    """A value of a YAML file.

    Attributes:
        value: a dict or a list of nodes, or a scalar as YAML's safe loader reads it.
        file: that it stands in.
        line: from 1.
        key: the way to it, such as `models[0].parameters.weight`; "" for a whole document.
    """

    value: Any
    file: str
    line: int
    key: str

    @property
    def where(self) -> str:
        return f"{self.file}, line {self.line}" + (f", {self.key}" if self.key else "")

    def error(self, what: str, *, expected: str = "", found: str = "") -> JaxmergeError:
        """The error that says where this stands."""
        return JaxmergeError(what, where=self.where, expected=expected, found=found)

    def mapping(self, known: Collection[str] = ()) -> dict[str, Node]:
        """Its entries; {} where nothing stands after the key.

        Args:
            known: the keys that there may be; (): any.

        Raises:
            JaxmergeError: this is no mapping, or has a key that is not known.
        """
        if self.value is None:
            return {}
        if not isinstance(self.value, dict):
            raise self.error("must be a mapping of keys to values", found=self.shown())
        for key, node in self.value.items():
            if known and key not in known:
                near = difflib.get_close_matches(key, known, 1)
                raise node.error(
                    f"the key {key} is not known here" + (f"; is {near[0]} meant?" if near else ""),
                    expected=", ".join(known),
                    found=key,
                )
        return self.value

    def sequence(self) -> list[Node]:
        """Its elements.

        Raises:
            JaxmergeError: this is no list, or an empty one.
        """
        if not isinstance(self.value, list) or not self.value:
            raise self.error("must be a list", found=self.shown())
        return self.value

    def text(self) -> str:
        """The text that it is.

        Raises:
            JaxmergeError: it is none.
        """
        if not isinstance(self.value, str) or not self.value:
            raise self.error("must be a text", found=self.shown())
        return self.value

    def choice(self, choices: Collection[str]) -> str:
        """The text that it is, one of the choices.

        Raises:
            JaxmergeError: it is none of them.
        """
        if self.value not in choices:
            raise self.error("unknown choice", expected=", ".join(choices), found=self.shown())
        return self.value

    def whole(self, least: int = 0) -> int:
        """The whole number that it is.

        Raises:
            JaxmergeError: it is none, or below `least`.
        """
        if type(self.value) is not int or self.value < least:
            raise self.error(f"must be a whole number from {least} on", found=self.shown())
        return self.value

    def number(self) -> float:
        """The number that it is; 1e-5 is one too, which YAML 1.1 takes for a text.

        Raises:
            JaxmergeError: it is none.
        """
        found = as_number(self.value)
        if not isinstance(found, float):
            raise self.error("must be a number", found=self.shown())
        return found

    def boolean(self) -> bool:
        """Whether it is true.

        Raises:
            JaxmergeError: it is neither true nor false.
        """
        if not isinstance(self.value, bool):
            raise self.error("must be true or false", found=self.shown())
        return self.value

    def shown(self) -> str:
        """The value for a message."""
        return str(self.plain())[:200]

    def plain(self) -> Any:
        """The value without lines."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


def as_number(value: Any) -> Any:
    """A scalar as float where it is a number, or a text that is one; else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return value
    try:
        return float(value)
    except (OverflowError, ValueError):
        return value


def documents(path: str) -> list[Node]:
    """The documents of a YAML file.

    Raises:
        JaxmergeError: the file can't be read, is no YAML or is empty; or a mapping has a key twice.
    """
    text = textfiles.read_text(path)
    found: list[Node] = []
    try:
        loader = yaml.SafeLoader(text)
        while loader.check_node():
            node = loader.get_node()
            if _count(node, {}) > _MOST:
                raise JaxmergeError(
                    "this is too large for a merge, once its aliases are written out",
                    where=path,
                    expected=f"at most {_MOST} values",
                )
            found.append(_node(loader, node, path, ""))
    except (yaml.YAMLError, *OF_OTHER_KIND) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise JaxmergeError(
            "this is no YAML",
            where=f"{path}{line}",
            expected="YAML, as mergekit's examples: spaces, no tabs, and a space after each colon",
            found=str(getattr(error, "problem", None) or error),
        ) from error
    found = [node for node in found if node.value is not None]
    if not found:
        raise JaxmergeError(
            "there is nothing in this file",
            where=path,
            expected="a merge: merge_method, and the models or slices that it is of",
        )
    return found


def _count(node: Any, known: dict[int, int]) -> int:
    """How many values there are in a node, with what aliases stand for."""
    if id(node) not in known:
        known[id(node)] = _MOST + 1  # an alias of what it is a part of
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            inner = [each for pair in node.value for each in pair]
        known[id(node)] = 1 + sum(_count(each, known) for each in inner)
    return known[id(node)]


def _node(loader: yaml.SafeLoader, node: Any, file: str, key: str) -> Node:
    line = node.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode):
        items = [_node(loader, each, file, f"{key}[{i}]") for i, each in enumerate(node.value)]
        return Node(items, file, line, key)
    if not isinstance(node, yaml.MappingNode):
        value = loader.construct_object(node)
        if type(value) is int:
            float(value)  # OverflowError of a number beyond it, which can't be written out either
        return Node(value, file, line, key)
    seen: set[str] = set()
    for name, _ in node.value:
        if name.value in seen and name.tag != "tag:yaml.org,2002:merge":
            raise JaxmergeError(
                f"the key {name.value} is there twice",
                where=f"{file}, line {name.start_mark.line + 1}",
                expected="one of the two",
            )
        seen.add(str(name.value))
    loader.flatten_mapping(node)  # `<<: *anchor`; what stands in the mapping itself comes last
    entries = {}
    for name, value in node.value:
        text = str(name.value)
        inner = _node(loader, value, file, f"{key}.{text}" if key else text)
        if not isinstance(value, yaml.ScalarNode) or value.value == "":
            inner = dataclasses.replace(inner, line=name.start_mark.line + 1)
        entries[text] = inner
    return Node(entries, file, line, key)
