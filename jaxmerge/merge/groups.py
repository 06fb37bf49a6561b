"""Groups of leaves that share their merge weights: how fine a merge is.

theta_l = sum_k w_{g(l) k} theta_{l k}: every leaf l, or every layer of a leaf that is stacked over
layers, belongs to one of G groups, and a candidate is a matrix of weights `[G, K]`. With one group
it is the paper's one weight a checkpoint.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxmerge.errors import JaxmergeError
from jaxmerge.trees import PyTree, named_leaves

GRANULARITIES = ("model", "layer", "kind", "leaf", "patterns")

REST = "rest"  # the group of what has no layer, or what no pattern names
_NUMBER = re.compile(r"(?:(?<=[/._])|^)(\d+)(?=[/._]|$)")  # of a layer, in the name of a leaf


class Groups(NamedTuple):
    """Which group each leaf is in.

    Attributes:
        names: of the G groups.
        of_leaf: by the name of a leaf the number of its group; of a leaf that is stacked over
            layers, whose groups differ, that of each.
    """

    names: tuple[str, ...]
    of_leaf: Mapping[str, tuple[int, ...]]

    def weights(self, name: str, weights_GxK: Any) -> Any:
        """Those of a leaf, `[..., K]`, or `[..., L, K]` of a leaf whose layers' groups differ.

        Args:
            name: of the leaf.
            weights_GxK: `[..., G, K]`.
        """
        numbers = self.of_leaf[name]
        return weights_GxK[..., numbers[0] if len(numbers) == 1 else np.array(numbers), :]

    def lifted(self, weights: np.ndarray) -> np.ndarray:
        """Weights `[C, K]`, which all groups share, as `[C, G, K]`; others as they are."""
        if weights.ndim == 3:
            return weights
        return np.repeat(weights[:, None], len(self.names), axis=1)


class _Place(NamedTuple):
    """Where in a model a leaf, or a layer of one that is stacked, is."""

    leaf: str
    kind: str  # the name without the layer's number
    layer: int | None


def check(granularity: str, patterns: Sequence[str]) -> None:
    """Raises `JaxmergeError`, which names the field of a config, unless both can be used."""
    if granularity not in GRANULARITIES and not granularity.isdecimal():
        raise JaxmergeError(
            "there is no such granularity",
            where="space.granularity",
            expected=f"{', '.join(GRANULARITIES)}, or a number of groups of layers",
            found=granularity,
        )
    if (granularity == "patterns") != bool(patterns):
        raise JaxmergeError(
            "patterns make groups of leaves by their names",
            where="space.patterns",
            expected='with space.granularity = "patterns", and only then, at least one',
            found=f"{tuple(patterns)} with {granularity}",
        )
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise JaxmergeError(
                "this is no regular expression",
                where="space.patterns",
                expected="what Python compiles; a dot that is meant has a backslash before it",
                found=f"{pattern}: {error}",
            ) from error


def groups(
    like: PyTree, granularity: str, *, patterns: Sequence[str] = (), layers: str = ""
) -> Groups | None:
    """The groups of a tree's leaves; None: there is one.

    Args:
        like: tree of arrays or `ShapeDtypeStruct`.
        granularity: `model`; `layer`, each layer, and what is in none; a number of groups of layers
            that follow each other, and what is in none; `kind`, each name without the number of its
            layer; `leaf`, each kind in each layer; or `patterns`.
        patterns: regular expressions: a leaf is in the group of the first that is found in its
            name, which for a layer of a stacked leaf ends in `/` and its number.
        layers: the top-level entry whose leaves are stacked over layers `[L, ...]`; else a layer
            is the first number among the parts of a leaf's name.

    Raises:
        JaxmergeError: the model has fewer layers than groups were asked for, or a pattern is in no
            leaf's name.
    """
    check(granularity, patterns)
    if granularity == "model":
        return None
    places = [
        place for name, leaf in named_leaves(like).items() for place in _places(name, leaf, layers)
    ]
    label = _label(granularity, patterns, places)
    names = tuple(dict.fromkeys(label(place) for place in sorted(places, key=_order)))
    if granularity == "patterns":
        unused = [pattern for pattern in patterns if pattern not in names]
        if unused:
            raise JaxmergeError(
                "no leaf has a name like this",
                where="space.patterns",
                expected=f"a part of one of {', '.join(sorted({place.kind for place in places}))}",
                found=unused[0],
            )
    of_leaf: dict[str, tuple[int, ...]] = {}
    for place in places:
        of_leaf[place.leaf] = (*of_leaf.get(place.leaf, ()), names.index(label(place)))
    alike = {name: tuple(dict.fromkeys(numbers)) for name, numbers in of_leaf.items()}
    return Groups(
        names,
        {name: alike[name] if len(alike[name]) == 1 else of_leaf[name] for name in of_leaf},
    )


def _places(name: str, leaf: Any, layers: str) -> list[_Place]:
    if layers and name.startswith(f"{layers}/"):
        return [_Place(name, name, layer) for layer in range(leaf.shape[0])]
    number = _NUMBER.search(name)
    if not number:
        return [_Place(name, name, None)]
    kind = name[: number.start()] + name[number.end() + 1 :]
    return [_Place(name, kind.strip("/._"), int(number[1]))]


def _order(place: _Place) -> tuple[bool, int, str]:
    """What is in no layer first, then layer after layer."""
    return place.layer is not None, place.layer or 0, place.kind


def _label(
    granularity: str, patterns: Sequence[str], places: Sequence[_Place]
) -> Callable[[_Place], str]:
    """What gives a place the name of its group."""
    if granularity == "kind":
        return lambda place: place.kind
    if granularity == "leaf":
        return lambda place: place.kind if place.layer is None else f"{place.kind} {place.layer}"
    if granularity == "patterns":
        return lambda place: next(
            (each for each in patterns if re.search(each, _full(place))), REST
        )
    count = 1 + max((place.layer for place in places if place.layer is not None), default=-1)
    wanted = count if granularity == "layer" else int(granularity)
    if not 1 <= wanted <= count:
        raise JaxmergeError(
            "the model does not have so many layers",
            where="space.granularity",
            expected=f"at most {count}",
            found=granularity,
        )
    return lambda place: REST if place.layer is None else _span(place.layer, count, wanted)


def _full(place: _Place) -> str:
    """The name that patterns are looked for in."""
    stacked = place.kind == place.leaf and place.layer is not None
    return f"{place.leaf}/{place.layer}" if stacked else place.leaf


def _span(layer: int, count: int, wanted: int) -> str:
    """The layers of the group that a layer is in, of `wanted` groups of nearly the same size."""
    group = layer * wanted // count
    first, last = math.ceil(group * count / wanted), math.ceil((group + 1) * count / wanted) - 1
    return f"layer {first}" if first == last else f"layers {first}-{last}"
