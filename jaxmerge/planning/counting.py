"""Operations and bytes of a program, counted in its jaxpr, loops included.

XLA's own figures count the body of a loop once, and a decoder is all loops.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.extend import core


class Product(NamedTuple):
    """A matrix product.

    Attributes:
        times: how often it is done.
        flops: of one, a multiplication and an addition counted as two.
        bytes: of its two operands and its result.
        decoding: whether it stands in a loop without a known end, as decoding does.
    """

    times: int
    flops: int
    bytes: int
    decoding: bool


def products(jaxpr: core.Jaxpr, steps: int) -> Iterator[Product]:
    """All matrix products of a program; of one that is spread by a shard_map, those of one place.

    Args:
        jaxpr: of the program.
        steps: how often a loop runs whose end depends on data: at most, so that it is an upper
            bound.
    """
    yield from _within(jaxpr, steps, 1, False)


def _within(jaxpr: core.Jaxpr, steps: int, times: int, decoding: bool) -> Iterator[Product]:
    for equation in jaxpr.eqns:
        name, inner = equation.primitive.name, times
        if name == "dot_general":
            yield _product(equation, times, decoding)
        if name == "scan":
            inner *= equation.params["length"]
        elif name == "while":
            inner *= steps
        for value in equation.params.values():
            for each in value if isinstance(value, tuple | list) else (value,):
                each = each.jaxpr if isinstance(each, core.ClosedJaxpr) else each
                if isinstance(each, core.Jaxpr):
                    yield from _within(each, steps, inner, decoding or name == "while")


def _product(equation: Any, times: int, decoding: bool) -> Product:
    left, right = (variable.aval for variable in equation.invars)
    (result,) = (variable.aval for variable in equation.outvars)
    (contracted, _), _ = equation.params["dimension_numbers"]
    inner = math.prod(left.shape[axis] for axis in contracted)
    moved = sum(aval.size * aval.dtype.itemsize for aval in (left, right, result))
    return Product(times, 2 * result.size * inner, moved, decoding)
