"""Norms and angles of the checkpoints of a tensor, or of their differences from a base."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from jaxmerge.merge import blocks, combinations, selection, sums, task_vectors

# XLA takes half of the register unless told; the sums are the same bits in any order.
_on_host = functools.partial(jax.jit, compiler_options={"xla_cpu_prefer_vector_width": 512})


def geometry(
    tensors: Sequence[Array], base: Array | None, *, axis: int | None
) -> combinations.Geometry:
    """See `combinations.geometry`.

    Args:
        tensors: of each checkpoint.
        base: whose differences are measured; None: the tensors themselves.
        axis: of the vectors; None: a tensor is one vector.
    """
    if axis is None and blocks.fit((tensors, base)):
        return _of_blocks(tensors, base)
    of = _of_rows if selection.on_host((tensors, base)) else _anywhere
    return of(tuple(tensors), base, axis=axis)


def _vectors(tensors: Sequence[Array], base: Array | None) -> list[Float[Array, "*S"]]:
    if base is None:
        return [tensor.astype(jnp.float32) for tensor in tensors]
    return [task_vectors.delta((tensor, base)) for tensor in tensors]


def _geometry(
    tensors: Sequence[Array], base: Array | None, *, axis: int | None
) -> combinations.Geometry:
    axes = range(tensors[0].ndim) if axis is None else (axis,)
    return combinations.geometry(_vectors(tensors, base), axes)


_anywhere = jax.jit(_geometry, static_argnames="axis")
_of_rows = _on_host(_geometry, static_argnames="axis")


def _of_blocks(tensors: Sequence[Array], base: Array | None) -> combinations.Geometry:
    """In two passes over blocks of all, which add up to the same bits as at once."""
    parts = [*blocks.cut(tensors, base)]
    above_K = functools.reduce(np.maximum, (np.asarray(_exponents(*part)) for part in parts))
    digits = sum(np.asarray(_products(above_K, *part)) for part in parts)
    return _from_products(above_K, digits)


@_on_host
def _exponents(tensors: Sequence[Array], base: Array | None) -> Int32[Array, " K"]:
    return jnp.concatenate(sums.exponents(_vectors(tensors, base), (0,)))


@_on_host
def _products(
    above_K: Int32[Array, " K"], tensors: Sequence[Array], base: Array | None
) -> Int32[Array, "N D"]:
    found = combinations.products(_vectors(tensors, base), list(above_K[:, None]), (0,))
    return jnp.stack([jnp.concatenate(digits) for digits in found])


@jax.jit
def _from_products(
    above_K: Int32[Array, " K"], digits_NxD: Int32[Array, "N D"]
) -> combinations.Geometry:
    return combinations.from_products(list(above_K), [list(each) for each in digits_NxD], ())
