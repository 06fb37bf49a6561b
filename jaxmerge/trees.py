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


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _type(leaf: Any) -> tuple[Any, tuple[int, ...]]:
    return leaf.dtype, leaf.shape


def _said(leaf: Any) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
