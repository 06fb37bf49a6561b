"""Leaves of stacked layers that are made a layer at a time, when the model comes to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

Params = Any  # a pytree of arrays and `Deferred`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Deferred:
    """A leaf `[L, ...]` of which only one layer exists at a time.

    A scan over layers takes the layer's part of both arrays, and `made` makes the layer's leaf.

    Attributes:
        make: `(sources, weights) -> leaf` of one layer.
        sources: arrays `[L, ...]`, the same for all candidates.
        weights: what tells a candidate from others, `[L, K]`; of C candidates `[C, L, K]`.
    """

    make: Callable[..., Array] = dataclasses.field(metadata={"static": True})
    sources: tuple[Any, ...]
    weights: Any


def _is_deferred(leaf: Any) -> bool:
    return isinstance(leaf, Deferred)


def any_deferred(params: Params) -> bool:
    """Whether a leaf is made a layer at a time."""
    return any(map(_is_deferred, jax.tree.leaves(params, is_leaf=_is_deferred)))


def made(layer: Params) -> Params:
    """The parameters of one layer, every leaf of them an array."""
    return jax.tree.map(
        lambda leaf: leaf.make(leaf.sources, leaf.weights) if _is_deferred(leaf) else leaf,
        layer,
        is_leaf=_is_deferred,
    )


def apart(candidates: Params) -> tuple[Params, tuple[tuple[Array, ...], ...]]:
    """What is each candidate's own, `[C, ...]`, and the sources that they share; see `joined`."""
    leaves, structure = jax.tree.flatten(candidates, is_leaf=_is_deferred)
    own = [dataclasses.replace(leaf, sources=()) if _is_deferred(leaf) else leaf for leaf in leaves]
    return structure.unflatten(own), tuple(leaf.sources for leaf in leaves if _is_deferred(leaf))


def joined(own: Params, shared: tuple[tuple[Array, ...], ...]) -> Params:
    """Parameters out of the two parts that `apart` gives, of one candidate or of several."""
    left = iter(shared)
    return jax.tree.map(
        lambda leaf: dataclasses.replace(leaf, sources=next(left)) if _is_deferred(leaf) else leaf,
        own,
        is_leaf=_is_deferred,
    )
