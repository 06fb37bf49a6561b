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
        steps: how often loops run whose end depends on data: at most, so that it is an upper bound.
            Of those that follow each other only the largest is counted: together they make so many
            steps, the later ones with fewer rows.
    """
    yield from _within(jaxpr, steps, 1, False)


def _within(jaxpr: core.Jaxpr, steps: int, times: int, decoding: bool) -> Iterator[Product]:
    loops = []
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            yield _product(equation, times, decoding)
        elif name == "while":
            loops.append(list(_inside(equation, steps, times * steps, True)))
        else:
            length = equation.params["length"] if name == "scan" else 1
            yield from _inside(equation, steps, times * length, decoding)
    yield from max(
        loops, key=lambda loop: sum(each.times * each.flops for each in loop), default=[]
    )


def _inside(equation: Any, steps: int, times: int, decoding: bool) -> Iterator[Product]:
    for value in equation.params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            each = each.jaxpr if isinstance(each, core.ClosedJaxpr) else each
            if isinstance(each, core.Jaxpr):
                yield from _within(each, steps, times, decoding)


def _product(equation: Any, times: int, decoding: bool) -> Product:
    left, right = (variable.aval for variable in equation.invars)
    (result,) = (variable.aval for variable in equation.outvars)
    (contracted, _), _ = equation.params["dimension_numbers"]
    inner = math.prod(left.shape[axis] for axis in contracted)
    moved = sum(aval.size * aval.dtype.itemsize for aval in (left, right, result))
    return Product(times, 2 * result.size * inner, moved, decoding)
