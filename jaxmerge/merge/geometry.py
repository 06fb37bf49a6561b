"""Norms and angles of the checkpoints of a tensor, or of their differences from a base."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxmerge.merge import combinations, selection, task_vectors


def geometry(
    tensors: Sequence[Array], base: Array | None, *, axis: int | None
) -> combinations.Geometry:
    """See `combinations.geometry`.

    Args:
        tensors: of each checkpoint.
        base: whose differences are measured; None: the tensors themselves.
        axis: of the vectors; None: a tensor is one vector.
    """
    of = _on_host if selection.on_host((tensors, base)) else _anywhere
    return of(tuple(tensors), base, axis=axis)


def _geometry(
    tensors: Sequence[Array], base: Array | None, *, axis: int | None
) -> combinations.Geometry:
    vectors = [
        tensor.astype(jnp.float32) if base is None else task_vectors.delta((tensor, base))
        for tensor in tensors
    ]
    return combinations.geometry(vectors, range(vectors[0].ndim) if axis is None else (axis,))


_anywhere = jax.jit(_geometry, static_argnames="axis")
# XLA takes half of the register unless told; the sums are the same bits in any order.
_on_host = jax.jit(
    _geometry, static_argnames="axis", compiler_options={"xla_cpu_prefer_vector_width": 512}
)
