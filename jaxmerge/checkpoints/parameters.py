"""Which part of an Orbax checkpoint is the model's parameters, and which of its leaves are merged.

A training step holds more than parameters: the optimiser's state, a step count, random number
generators. What is not clear is refused: an optimiser's moments have the very shapes of parameters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.errors import JaxmergeError
from jaxmerge.trees import PyTree, named_leaves, pruned

# What trainers call the parameters, and the optimiser's state: items of a step, or keys of a tree.
_PARAMETERS = frozenset(("params", "model_params", "parameters", "model"))
_OPTIMISER = re.compile(r"(opt|optim|optimi[sz]er)(_state)?s?")

# Leaves that say where training stood. They are no weights, so no mean of them means anything.
_GENERATORS = re.compile(r"(^|/)(rngs?|\w+_rngs?|(rng|prng)_key)(/|$)")
_COUNTERS = re.compile(r"(^|/)(count|counter|(\w+_)?steps?|epoch)(/value)?$")


def item(where: str, items: Sequence[str], has_arrays: Callable[[str], bool]) -> str:
    """The item of a step that holds the parameters.

    Args:
        where: the step, for messages.
        items: the pytrees that it holds.
        has_arrays: whether there is an array in an item; asked only where there are several.

    Raises:
        JaxmergeError: it is not clear which.
    """
    if len(items) > 1:
        items = [name for name in items if has_arrays(name)]
    possible = [name for name in items if not _OPTIMISER.fullmatch(name)]
    named = [name for name in possible if name in _PARAMETERS]
    if len(items) == len(possible) == 1 or len(named) == 1:
        return (named or possible)[0]
    raise JaxmergeError(
        "the step holds several items, and it is not clear which are the parameters"
        if possible
        else "the step holds an optimiser's state and no parameters",
        where=where,
        expected="pool.item, the name of one"
        if possible
        else "a step with parameters, or pool.item: that this item is meant",
        found=", ".join(items),
    )


def subtree(where: str, tree: PyTree) -> str:
    """The path from the top of a tree to the parameters, where a trainer's state lies around them.

    `{"params": ..., "opt_state": ..., "step": ...}` gives "params", and MaxText's
    `{"params": {"params": ...}}` gives "params/params"; "" stands for all of the tree.

    Args:
        where: the checkpoint, for messages.
        tree: of all that it holds.

    Raises:
        JaxmergeError: there is an optimiser's state, and it is not clear where the parameters are.
    """
    path, inner = [], tree
    if isinstance(tree, Mapping) and any(_OPTIMISER.fullmatch(str(key)) for key in tree):
        named = [key for key in tree if key in _PARAMETERS]
        if len(named) != 1:
            raise JaxmergeError(
                "the checkpoint holds an optimiser's state, and it is not clear where the "
                "parameters are",
                where=where,
                expected="pool.subtree, the path to them",
                found=f"keys: {', '.join(map(str, tree))}",
            )
        path, inner = named, tree[named[0]]
        if _only_key(inner) == "params":
            path, inner = [*path, "params"], inner["params"]
    elif _only_key(tree) == "params" and _only_key(tree["params"]) == "params":
        path = ["params", "params"]
    return "/".join(path)


def beside(tree: PyTree, path: str) -> tuple[str, ...]:
    """The keys next to the parameters that may be a model's too, such as running means.

    An optimiser's state, counters and generators are none.

    Args:
        tree: of all that a checkpoint holds; its leaves have shapes and dtypes.
        path: from `subtree`.
    """

    def of_model(leaf: Any) -> bool:
        floating = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
        return bool(floating and leaf.shape)

    others = set(tree) - {path.split("/")[0]} if path else set()
    others = [key for key in others if not _OPTIMISER.fullmatch(str(key))]
    return tuple(sorted(key for key in others if any(map(of_model, jax.tree.leaves(tree[key])))))


def at(where: str, tree: PyTree, path: str) -> PyTree:
    """The part of a tree that a path such as `params/decoder` leads to.

    Args:
        where: the checkpoint, for messages.
        tree: of all that it holds.
        path: keys, one after the other; "": all of the tree.

    Raises:
        JaxmergeError: there is none.
    """
    for key in filter(None, path.split("/")):
        if not isinstance(tree, Mapping) or key not in tree:
            keys = sorted(tree) if isinstance(tree, Mapping) else "no further keys"
            raise JaxmergeError(
                f"the checkpoint has no subtree {path!r}",
                where=where,
                expected="pool.subtree: the path to the parameters",
                found=f"keys: {keys}",
            )
        tree = tree[key]
    return tree


def below(where: str, tree: PyTree, path: str) -> PyTree:
    """As `at`, of what must have leaves below it.

    Raises:
        JaxmergeError: there is none, or it is a leaf.
    """
    found = at(where, tree, path)
    if not isinstance(found, Mapping):
        raise JaxmergeError(
            "the subtree is an array",
            where=where,
            expected="pool.subtree: what is above arrays",
            found=path,
        )
    return found


def header(where: str, shape: tuple[int, ...], dtype: np.dtype) -> jax.ShapeDtypeStruct:
    """What an array that NumPy knows is like.

    Raises:
        JaxmergeError: it is of a type that JAX does not have.
    """
    if dtype != jnp.bfloat16 and (dtype.kind not in "biuf" or dtype.itemsize > 4):
        raise _unknown(where, dtype)
    return jax.ShapeDtypeStruct(tuple(shape), dtype.newbyteorder("="))


def check_width(where: str, abstract: PyTree) -> None:
    """Raises `JaxmergeError` where a leaf has more than 32 bits: JAX would cut it without a word.

    Args:
        where: the checkpoint, for messages.
        abstract: tree of arrays or of `ShapeDtypeStruct`.
    """
    for name, leaf in named_leaves(abstract).items():
        if leaf.dtype.itemsize > 4:
            raise _unknown(f"{where}, leaf {name}", leaf.dtype)


def _unknown(where: str, dtype: np.dtype) -> JaxmergeError:
    return JaxmergeError(
        "the array is of a type that can't be merged",
        where=where,
        expected="booleans or numbers of 32 bits at most, which JAX has: "
        "array.astype(numpy.float32) before it is saved",
        found=str(dtype),
    )


def under(tree: PyTree, path: str) -> PyTree:
    """The tree that has this one at a path: the inverse of `at`."""
    for key in reversed([key for key in path.split("/") if key]):
        tree = {key: tree}
    return tree


def split(abstract: PyTree, merged: Mapping[str, Any]) -> tuple[PyTree, PyTree]:
    """The leaves that are merged, and those that are carried over from the first checkpoint.

    Carried are random number generators and counters: leaves that are not floating point and are
    named so.

    Args:
        abstract: tree of `ShapeDtypeStruct`.
        merged: names of leaves that are known to be merged, whatever their names.

    Returns:
        Two trees, in which what is in the other is left out.
    """

    def carried(name: str, leaf: jax.ShapeDtypeStruct) -> bool:
        if jnp.issubdtype(leaf.dtype, jnp.floating) or name in merged:
            return False
        random = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        counts = leaf.shape == () and _COUNTERS.search(name)
        return bool(random or counts or _GENERATORS.search(name))

    names = {name for name, leaf in named_leaves(abstract).items() if carried(name, leaf)}
    if not names:
        return abstract, {}
    return pruned(abstract, lambda name: name not in names), pruned(abstract, names.__contains__)


def joined(one: PyTree, other: PyTree) -> PyTree:
    """The tree that `split` took apart."""
    if one is None or other is None:
        return other if one is None else one
    if isinstance(one, Mapping):
        keys = {**one, **other}
        return {key: joined(one.get(key), other.get(key)) for key in keys}
    return [joined(*pair) for pair in zip(one, other, strict=True)]


def _only_key(tree: PyTree) -> Any:
    return next(iter(tree)) if isinstance(tree, Mapping) and len(tree) == 1 else None
