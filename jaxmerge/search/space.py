"""Genotype to merge weights: what a search moves in, and what the merge takes.

A genotype z has one value per checkpoint, of each group of leaves that has weights of its own, and
z = 0 is the uniform soup under every constraint. The unit of z is the uniform weight 1/K (for
softmax, a factor e), so that one step size suits all. Of a method's own numbers z = 0 is the
default, and the unit half their range. The functions take arrays of NumPy or of JAX.

Of the steps of one run two values are enough, the length of a window and the exponent of its decay
curve, see `window`; z = 0 is the uniform merge there too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxmerge.errors import JaxmergeError
from jaxmerge.merge import schedules
from jaxmerge.rundir import as_gene

Weights = Float[np.ndarray, "P *G K"]


def softmax(z: Any) -> Any:
    """w_k = exp(z_k) / sum_j exp(z_j): positive, sums to one."""
    xp = z.__array_namespace__()
    grown = xp.exp(z - xp.max(z, axis=-1, keepdims=True))
    return grown / xp.sum(grown, axis=-1, keepdims=True)


def absolute(z: Any) -> Any:
    """w_k = |1 + z_k| / sum_j |1 + z_j|: not negative, sums to one."""
    xp = z.__array_namespace__()
    size = xp.abs(1 + z)
    total = xp.sum(size, axis=-1, keepdims=True)
    return xp.where(total > 0, size / xp.where(total > 0, total, 1), 1 / z.shape[-1])


def signed(z: Any) -> Any:
    """w_k = (1 + z_k - mean_j z_j) / K: sums to one, negative weights allowed."""
    xp = z.__array_namespace__()
    return (1 + z - xp.mean(z, axis=-1, keepdims=True)) / z.shape[-1]


def free(z: Any) -> Any:
    """w_k = (1 + z_k) / K: any weights."""
    return (1 + z) / z.shape[-1]


def window(z: Any, checkpoints: int) -> Any:
    """Weights of the window that z describes, of the oldest of K checkpoints first; sum to one.

    Its length is n = K exp(z_0), in checkpoints, and its decay curve 1 - x^p with p = exp(z_1); see
    `schedules.window`. The two are what `numbers_of_window` gives.

    Args:
        z: `[..., 2]`.
        checkpoints: K.
    """
    length, exponent = _of_window(z, checkpoints)
    return schedules.window(length, exponent, checkpoints)


def numbers_of_window(
    z_PxD: Float[np.ndarray, "P D"],
    checkpoints: int,
    bounds: tuple[float, float] = (-8.0, 8.0),
    *,
    groups: int = 1,
    shrink: float = 0.0,
) -> list[dict[str, float | tuple[float, ...]]]:
    """`length`, in checkpoints, and `exponent` of each genotype's window, as a candidate has them.

    Args:
        z_PxD: genotypes of `window`.
        checkpoints: K.
        bounds: see `weights`; `groups` and `shrink` too.
    """
    z = _by_group(z_PxD, groups)
    pulled = _pulled(z, bounds, shrink if groups > 1 else 0.0)
    names = ("length", "exponent")
    return [
        {name: as_gene(number) for name, number in zip(names, _of_window(row, checkpoints))}
        for row in pulled
    ]


def _of_window(z: Any, checkpoints: int) -> tuple[Any, Any]:
    grown = z.__array_namespace__().exp(z)
    return checkpoints * grown[..., 0], grown[..., 1]


CONSTRAINTS = {"softmax": softmax, "abs": absolute, "signed": signed, "free": free}
WINDOW = "window"  # a constraint too, of the steps of one run


def dimension(constraint: str, checkpoints: int) -> int:
    """Values of a genotype, of each group, for K checkpoints."""
    return 2 if constraint == WINDOW else checkpoints


def mapped(
    z: Any,
    constraint: str = "softmax",
    bounds: tuple[float, float] = (-8.0, 8.0),
    shrink: float = 0.0,
    checkpoints: int = 0,
) -> Any:
    """Merge weights of genotypes `[..., K]`, or `[..., G, K]` of G groups; differentiable.

    z'_g = m + (1 - shrink) (clip(z_g) - m), m being the mean over groups: with a shrink of 1 all
    groups have the same weights. Genotypes of a window are `[..., 2]`, of K `checkpoints`.
    """
    pulled = _pulled(z, bounds, shrink)
    if constraint == WINDOW:
        return window(pulled, checkpoints)
    return CONSTRAINTS[constraint](pulled)


def _pulled(z: Any, bounds: tuple[float, float], shrink: float) -> Any:
    xp = z.__array_namespace__()
    clipped = xp.clip(z, *bounds)
    if shrink:
        middle = xp.mean(clipped, axis=-2, keepdims=True)
        clipped = middle + (1 - shrink) * (clipped - middle)
    return clipped


class Range(NamedTuple):
    """Where a search looks for a number of a method.

    Attributes:
        start: its value at z = 0.
        low, high: the ends.
    """

    start: float
    low: float
    high: float


def numbers(z: Any, ranges: Sequence[Range]) -> Any:
    """Numbers of genotypes `[..., M]`: start + z (high - low) / 2, reflected at the ends.

    So a step from an end goes inwards, whichever sign it has; no value is at an end for long.
    """
    xp = z.__array_namespace__()
    start, low, high = (xp.asarray(ends, dtype=z.dtype) for ends in zip(*ranges))
    walked = ((start - low) / (high - low) + z / 2) % 2
    return low + (high - low) * (1 - xp.abs(1 - walked))


def row(
    z: Any,
    checkpoints: int,
    ranges: Sequence[Range],
    constraint: str = "softmax",
    bounds: tuple[float, float] = (-8.0, 8.0),
    shrink: float = 0.0,
    *,
    weighted: bool = True,
) -> Any:
    """What genotypes `[..., D]`, or `[..., G, D]`, are merged from by a method; differentiable.

    Args:
        z: of each group weights before numbers.
        checkpoints: see `rows`; the rest too.

    Returns:
        `[..., R]`: K weights, M numbers, and 1.
    """
    xp = z.__array_namespace__()
    own = z[..., :checkpoints] if weighted else xp.zeros((*z.shape[:-1], checkpoints), z.dtype)
    parts = [mapped(own, constraint, bounds, shrink)]
    if ranges:
        of_numbers = z[..., checkpoints if weighted else 0 :]
        parts.append(numbers(_pulled(of_numbers, bounds, shrink), ranges))
    return xp.concatenate([*parts, xp.ones((*z.shape[:-1], 1), z.dtype)], axis=-1)


def rows(
    z_PxD: Float[np.ndarray, "P D"],
    checkpoints: int,
    ranges: Sequence[Range],
    constraint: str = "softmax",
    bounds: tuple[float, float] = (-8.0, 8.0),
    *,
    weighted: bool = True,
    groups: int = 1,
    shrink: float = 0.0,
) -> Float[np.ndarray, "P *G R"]:
    """What a population of genotypes is merged from by a method: K weights, M numbers, and 1.

    Args:
        z_PxD: genotypes; of G groups one after the other, of each weights before numbers.
        checkpoints: K.
        ranges: of the M numbers.
        constraint: see `weights`; the rest too.
        weighted: whether checkpoints have weights; else genotypes have none, and rows 1/K.
    """
    check(constraint, bounds, shrink)
    z, shrink = _by_group(z_PxD, groups), shrink if groups > 1 else 0.0
    found = row(z, checkpoints, ranges, constraint, bounds, shrink, weighted=weighted)
    return found.astype(np.float32)


def weights(
    z_PxD: Float[np.ndarray, "P D"],
    constraint: str = "softmax",
    bounds: tuple[float, float] = (-8.0, 8.0),
    *,
    groups: int = 1,
    shrink: float = 0.0,
    checkpoints: int = 0,
) -> Weights:
    """Merge weights of a population of genotypes, in float32; `[P, G, K]` of several groups.

    Args:
        z_PxD: genotypes; of G groups one after the other.
        constraint: a name in `CONSTRAINTS`, or `WINDOW`.
        bounds: each z_k is first clipped to [low, high].
        groups: G.
        shrink: see `mapped`; of several groups.
        checkpoints: K, which the genotypes of a window do not say.
    """
    check(constraint, bounds, shrink)
    z = _by_group(z_PxD, groups)
    pulled = shrink if groups > 1 else 0.0
    return mapped(z, constraint, bounds, pulled, checkpoints).astype(np.float32)


def _by_group(z_PxD: Float[np.ndarray, "P D"], groups: int) -> Float[np.ndarray, "P *G d"]:
    z = np.asarray(z_PxD, np.float64)
    return z.reshape(len(z), groups, -1) if groups > 1 else z


def genotypes(
    weights: Float[np.ndarray, "*G K"],
    constraint: str = "softmax",
    bounds: tuple[float, float] = (-8.0, 8.0),
    shrink: float = 0.0,
) -> Float[np.ndarray, "*G K"]:
    """One of the genotypes that have these weights: `mapped` gives them back, within the bounds.

    softmax: z_k = ln w_k - mean_j ln w_j; else z_k = K w_k - 1.
    """
    w = np.asarray(weights, np.float64)
    z = w * w.shape[-1] - 1
    if constraint == "softmax":
        z = np.log(np.maximum(w, np.finfo(np.float32).tiny))
        z -= z.mean(axis=-1, keepdims=True)
    return _pushed(z, bounds, shrink)


def _pushed(z: np.ndarray, bounds: tuple[float, float], shrink: float) -> np.ndarray:
    """What `_pulled` makes this of, within the bounds."""
    if shrink and z.ndim == 2:
        middle = z.mean(axis=-2, keepdims=True)
        z = middle if shrink == 1 else middle + (z - middle) / (1 - shrink)
    return np.clip(z, *bounds)


def row_genotypes(
    rows: Float[np.ndarray, "*G R"],
    checkpoints: int,
    ranges: Sequence[Range],
    constraint: str = "softmax",
    bounds: tuple[float, float] = (-8.0, 8.0),
    shrink: float = 0.0,
    *,
    weighted: bool = True,
) -> Float[np.ndarray, "*G D"]:
    """One of the genotypes that have these rows; see `row` and `genotypes`."""
    found = np.asarray(rows, np.float64)
    own = genotypes(found[..., :checkpoints], constraint, bounds, shrink)
    parts = [own] if weighted else []
    if ranges:
        start, low, high = (np.array(ends) for ends in zip(*ranges))
        z = 2 * (found[..., checkpoints:-1] - start) / (high - low)
        parts.append(_pushed(z, bounds, shrink))
    return np.concatenate(parts, axis=-1)


def spread(
    weights_PxM: Float[np.ndarray, "P *G M"], chosen: Sequence[int], checkpoints: int
) -> Weights:
    """Weights of the M chosen checkpoints among all K; those of the others are 0."""
    weights_PxK = np.zeros((*weights_PxM.shape[:-1], checkpoints), np.float32)
    weights_PxK[..., list(chosen)] = weights_PxM
    return weights_PxK


def check(constraint: str, bounds: tuple[float, float], shrink: float = 0.0) -> None:
    """Raises `JaxmergeError` unless all can be used."""
    if not 0 <= shrink <= 1:
        raise JaxmergeError(
            "out of range", where="space.shrink", expected="from 0 to 1", found=str(shrink)
        )
    if constraint not in (*CONSTRAINTS, WINDOW):
        raise JaxmergeError(
            "unknown constraint",
            where="space.constraint",
            expected=", ".join(("auto", *CONSTRAINTS, WINDOW)),
            found=constraint,
        )
    if not bounds[0] < 0 < bounds[1]:
        raise JaxmergeError(
            "the bounds must have 0, the uniform merge, between them",
            where="space.bounds",
            expected="a negative and a positive number, such as (-8, 8)",
            found=str(bounds),
        )


def check_window(fields: Mapping[str, Any]) -> None:
    """Raises `JaxmergeError` for what a search over a window's two numbers does not go with.

    Args:
        fields: of a config, by their full names.
    """
    for where, right, expected in (
        ("merge.method", "linear", "linear; or another space.constraint, such as softmax"),
        ("search.warm_start", "", '"": there are but two numbers'),
    ):
        if fields[where] != right:
            raise JaxmergeError(
                "a search over the window of a run does not go with this",
                where=where,
                expected=expected,
                found=str(fields[where]),
            )
