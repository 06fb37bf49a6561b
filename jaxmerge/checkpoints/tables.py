"""The terms in which a trainer's layout is written down: its leaves, out of those of the decoder.

A layout is a table: the name of each leaf in the trainer's tree, the order of its axes in the
letters of the package glossary, and the leaves of `models.decoder` that it is made of. From that
and the sizes of a model follow names and shapes of a checkpoint, and both ways of conversion.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxmerge.models.architecture import DecoderConfig

# The axes of the decoder's leaves, after that of the layers.
AXES = {
    "embedding": "VD",
    "unembedding": "VD",
    "final_norm/scale": "D",
    "layers/attention_norm/scale": "D",
    "layers/query": "HCD",
    "layers/query_bias": "HC",
    "layers/key": "JCD",
    "layers/key_bias": "JC",
    "layers/value": "JCD",
    "layers/value_bias": "JC",
    "layers/query_norm/scale": "C",
    "layers/key_norm/scale": "C",
    "layers/out": "DHC",
    "layers/post_attention_norm/scale": "D",
    "layers/feed_forward_norm/scale": "D",
    "layers/post_feed_forward_norm/scale": "D",
    "layers/gate": "FD",
    "layers/up": "FD",
    "layers/down": "DF",
    "layers/router": "ED",
    "layers/expert_gate": "EFD",
    "layers/expert_up": "EFD",
    "layers/expert_down": "EDF",
}


class Change(NamedTuple):
    """What is done to the values besides: the decoder's are scale * x + offset.

    Attributes:
        scale: see above.
        offset: see above.
        interleaved: the two halves of the last axis that rotary positions turn into each other are
            stored in turns.
    """

    scale: float = 1.0
    offset: float = 0.0
    interleaved: bool = False


class Leaf(NamedTuple):
    """A leaf of a trainer's tree.

    Attributes:
        axes: its axes, a letter each: those of `AXES`, L for layers, S for the leaves of `of`; JG
            for H where query heads are two axes, those of one key head together.
        of: the decoder's leaves that it is made of; one, or as many as S has.
        layers: of those, in this order; one where there is no L; () where they have no layers.
        change: of the values.
        flat: all axes are one.
    """

    axes: str
    of: tuple[str, ...]
    layers: tuple[int, ...] = ()
    change: Change = Change()
    flat: bool = False

    def shape(self, config: DecoderConfig) -> tuple[int, ...]:
        """The shape that it has in a model."""
        sizes = self.sizes(config)
        return (math.prod(sizes),) if self.flat else sizes

    def sizes(self, config: DecoderConfig) -> tuple[int, ...]:
        """The size of each axis."""
        of_letter = {
            **{"V": config.vocab, "D": config.width, "H": config.heads, "J": config.kv_heads},
            **{"C": config.head_width, "F": config.feed_forward, "E": config.experts},
            **{"L": len(self.layers), "S": len(self.of)},
            "G": config.heads // config.kv_heads,
        }
        return tuple(of_letter[letter] for letter in self.axes)


class Known(NamedTuple):
    """A model of which the sizes and the family are known."""

    model_type: str  # of its Hugging Face config
    config: DecoderConfig


# The leaves of a checkpoint by name; None: the trainer has no such models, or not in this form.
Table = Callable[[Known], dict[str, Leaf] | None]


def rows(
    prefix: str, layers: Iterable[int], table: Mapping[str, Leaf], stack_at: int | None = None
) -> dict[str, Leaf]:
    """The leaves of some layers.

    Args:
        prefix: of their names.
        layers: which.
        table: the leaves of one layer.
        stack_at: where in the axes that of the layers is put; None: there is one layer.
    """
    layers = tuple(layers)
    assert stack_at is not None or len(layers) == 1

    def stacked(axes: str) -> str:
        return axes if stack_at is None else axes[:stack_at] + "L" + axes[stack_at:]

    return {
        prefix + name: leaf._replace(axes=stacked(leaf.axes), layers=layers)
        for name, leaf in table.items()
    }


def to_decoder(stored: Array, leaf: Leaf, of: str, config: DecoderConfig) -> Array:
    """A leaf of the decoder out of the trainer's: of its layers `[L, ...]`, else `[...]`.

    Args:
        stored: the trainer's.
        leaf: what it is.
        of: which of `leaf.of` is wanted.
        config: of the model; further rows of an embedding are padding.
    """
    axes = leaf.axes
    if leaf.flat:
        stored = stored.reshape(leaf.sizes(config))
    if "JG" in axes:
        axes, at = axes.replace("JG", "H"), axes.index("J")
        stored = stored.reshape(*stored.shape[:at], -1, *stored.shape[at + 2 :])
    if "S" in axes:
        stored = jnp.take(stored, leaf.of.index(of), axis=axes.index("S"))
        axes = axes.replace("S", "")
    wanted = ("L" if "L" in axes else "") + AXES[of]
    values = jnp.transpose(stored, [axes.index(letter) for letter in wanted])
    if "V" in axes:
        values = values[: config.vocab]
    if leaf.layers and "L" not in axes:
        values = values[None]
    return _changed(values, of, leaf.change, back=False)


def from_decoder(leaves: Mapping[str, Array], leaf: Leaf, config: DecoderConfig) -> Array:
    """The trainer's leaf out of the decoder's: the inverse of `to_decoder`.

    Args:
        leaves: at least those of `leaf.of`.
        leaf: what is wanted.
        config: of the model.
    """
    axes = leaf.axes.replace("S", "").replace("JG", "H")

    def one(of: str) -> Array:
        values = leaves[of]
        if leaf.layers:
            values = values[leaf.layers[0]] if "L" not in axes else values[jnp.array(leaf.layers)]
        values = _changed(values, of, leaf.change, back=True)
        given = ("L" if "L" in axes else "") + AXES[of]
        return jnp.transpose(values, [given.index(letter) for letter in axes])

    if "S" in leaf.axes:
        return jnp.stack([one(of) for of in leaf.of], axis=leaf.axes.index("S"))
    return one(leaf.of[0]).reshape(leaf.shape(config))


def _changed(values: Array, of: str, change: Change, *, back: bool) -> Array:
    """The values with the change made, or with it undone; rounded once."""
    if change.interleaved:
        at = AXES[of].index("C") - len(AXES[of])
        halves = jnp.moveaxis(values, at, -1)
        if back:
            halves = halves.reshape(*halves.shape[:-1], 2, -1).swapaxes(-1, -2)
        else:
            halves = halves.reshape(*halves.shape[:-1], -1, 2).swapaxes(-1, -2)
        values = jnp.moveaxis(halves.reshape(*halves.shape[:-2], -1), -1, at)
    if (change.scale, change.offset) == (1.0, 0.0):
        return values
    exact = values.astype(jnp.float32)
    if back:
        exact = (exact - change.offset) / jnp.float32(change.scale)
    else:
        exact = exact * jnp.float32(change.scale) + change.offset
    return exact.astype(values.dtype)


def shapes(table: Mapping[str, Leaf], config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each leaf of a table."""
    return {name: leaf.shape(config) for name, leaf in table.items()}


def covers(table: Mapping[str, Leaf], leaves: Mapping[str, jax.ShapeDtypeStruct]) -> bool:
    """Whether a table has every layer of every leaf of a decoder, once, and no other."""
    held = [(of, i) for leaf in table.values() for of in leaf.of for i in leaf.layers or (None,)]
    wanted = [
        (name, i)
        for name, leaf in leaves.items()
        for i in (range(leaf.shape[0]) if name.startswith("layers/") else (None,))
    ]
    return sorted(held, key=str) == sorted(wanted, key=str)
