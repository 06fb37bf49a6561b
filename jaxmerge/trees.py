"""Pytrees by leaf name: naming, and comparison that lists every difference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxmerge.errors import JaxmergeError

PyTree = Any


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves by name, in tree order: `{"layers": {"up": x}}` has the one leaf `layers/up`.

    Raises:
        JaxmergeError: two leaves have the same name, keys having slashes in them.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {_name(path): leaf for path, leaf in leaves}
    if len(named) < len(leaves):
        names = [_name(path) for path, _ in leaves]
        raise JaxmergeError(
            "two leaves of a tree have the same name",
            where=next(name for name in named if names.count(name) > 1),
            expected='names that differ when keys are joined by "/": {"a": {"b": x}} is a/b',
        )
    return named


def map_named(function: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """`jax.tree.map`, with the leaf's name as the first argument of `function`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(_name(path), *leaves), tree, *rest
    )


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of dicts in which leaves have these names.

    Raises:
        JaxmergeError: a name is that of a leaf and of what is above another.
    """
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        inner = tree
        for parent in parents:
            inner = inner.setdefault(parent, {})
            if not isinstance(inner, dict):
                break
        if not isinstance(inner, dict) or last in inner:
            raise JaxmergeError(
                "a leaf lies below another",
                where=name,
                expected='names of which none is another with "/" and more behind it',
            )
        inner[last] = leaf
    return tree


def pruned(tree: PyTree, keep: Callable[[str], bool]) -> PyTree:
    """The tree with some of its leaves alone.

    Keys under which nothing is left are gone; a list keeps its places, with None in those.

    Args:
        tree: of dicts and lists.
        keep: whether the leaf of a name stays.
    """
    chosen = map_named(lambda name, leaf: leaf if keep(name) else None, tree)
    return _without_gaps(chosen) or {}


def parameter_count(tree: PyTree) -> int:
    """Number of values in all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def byte_count(tree: PyTree) -> int:
    """Bytes of all leaves."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def differences(trees: Mapping[str, PyTree]) -> list[str]:
    """Every difference of leaf names, shapes and dtypes between the first tree and each other.

    Args:
        trees: trees of arrays or `ShapeDtypeStruct`, by the name that messages use for them.

    Returns:
        One line a difference; empty when all trees are alike.
    """
    (first, *others) = trees
    expected = named_leaves(trees[first])
    lines = []
    for other in others:
        found = named_leaves(trees[other])
        lines += [f"{other}: no leaf {name}" for name in expected if name not in found]
        lines += [
            f"{other}: leaf {name} is not in {first}" for name in found if name not in expected
        ]
        lines += [
            f"{other}: leaf {name} is {_said(found[name])}, in {first} {_said(expected[name])}"
            for name in expected
            if name in found and _type(found[name]) != _type(expected[name])
        ]
    return lines


def _without_gaps(tree: PyTree) -> PyTree:
    if isinstance(tree, Mapping):
        found = {key: _without_gaps(inner) for key, inner in tree.items()}
        return {key: inner for key, inner in found.items() if inner is not None} or None
    if isinstance(tree, list | tuple):
        found = [_without_gaps(inner) for inner in tree]
        return found if any(inner is not None for inner in found) else None
    return tree


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _type(leaf: Any) -> tuple[Any, tuple[int, ...]]:
    return leaf.dtype, leaf.shape


def _said(leaf: Any) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
