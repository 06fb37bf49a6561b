"""How the tensors of a Hugging Face checkpoint make up the leaves of a decoder."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

# Buffers that old versions of transformers wrote out, and newer ones compute.
BUFFERS = (r"rotary_emb\.inv_freq$",)
# Of models without a decoder here, where all members have them they are copied.
COMPUTED = (r"(^|\.)position_ids$", r"(^|\.)attn\.(masked_)?bias$")


class Part(NamedTuple):
    """Rows [start, stop) of a tensor, that is of its first axis."""

    tensor: str
    start: int
    stop: int


class Layout(NamedTuple):
    """The leaves of a decoder as parts of tensors.

    Leaves keep the orientation of the tensors, so that a leaf is nothing but rows of tensors one
    after the other: `layers/query` `[L, H, C, D]` is the rows of L tensors `[H C, D]`. Every row of
    every tensor is in exactly one leaf; the other way round, a tensor is the rows of its leaves.

    Attributes:
        leaves: the parts whose values, one after the other, are the leaf's in C order.
        shapes: of the leaves.
        tensors: shape of each tensor that the checkpoint must have.
        ignored: regular expressions of tensors that it may have besides and that mean nothing.
        wide: tensors of 64-bit integers, with their dtype. JAX has none: their shape here has an
            axis more, of two 32-bit words.
    """

    leaves: Mapping[str, tuple[Part, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    tensors: Mapping[str, tuple[int, ...]]
    ignored: tuple[str, ...] = ()
    wide: Mapping[str, np.dtype] = MappingProxyType({})
