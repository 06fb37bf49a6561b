"""Merges that are weighted sums: coefficients from genes, and from norms and cosines of the inputs.

theta = sum_k c_k theta_k, or theta_0 + sum_k c_k delta_k with delta_k = theta_k - theta_0. What a
function here gives are the c_k; `merge.linear` adds up. The spherical methods need norms and
cosines of the vectors, which are taken of a whole tensor, or of each row of it: see `geometry`.

Every function takes the geometry of K vectors, the genes by name, those of a checkpoint `[K]` and
the others scalars or bools, and the variant; it returns `[K]`, float32. Where the variants "paper"
and "mergekit" (0.1.5) differ, its docstring says how.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jaxmerge.merge import sums

Genes = Mapping[str, Any]
Variant = Literal["paper", "mergekit"]

_SMALL_SUM = 1e-8  # of weights, which are then not divided by it


class Geometry(NamedTuple):
    """Norms of K vectors, and the cosines between them.

    Attributes:
        norms: `[K]`, or `[R, K]` of each row.
        cosines: `[K, K]` or `[R, K, K]`; 0 beside a vector that is 0.
    """

    norms: Float[Array, "*R K"]
    cosines: Float[Array, "*R K K"]


def geometry(vectors: Sequence[Float[Array, "*S"]], axes: Sequence[int]) -> Geometry:
    """|v_k| and <v_i, v_j> / (|v_i| |v_j|), the same bits on any mesh: see `merge.sums`.

    Args:
        vectors: K arrays, float32; they are read once for each pair, and never copied.
        axes: along which a vector runs; the others are those of the result, taken as one.
    """
    axes = tuple(axes)
    above = sums.exponents(vectors, axes)
    kept = tuple(size for axis, size in enumerate(vectors[0].shape) if axis not in axes)
    return from_products(above, products(vectors, above, axes), (-1,) if kept else ())


def products(
    vectors: Sequence[Float[Array, "*S"]], above: Sequence[Int32[Array, "*T"]], axes: Sequence[int]
) -> list[Sequence[Int32[Array, "*T"]]]:
    """<v_i, v_j> of vectors that are scaled to values below 1, as digits: see `sums`.

    Args:
        vectors: see `geometry`; `axes` too.
        above: exponents of each, that it is scaled by.

    Returns:
        Those of each i with all j <= i.
    """
    scaled = [sums.scaled(vector, each) for vector, each in zip(vectors, above)]
    return [
        sums.digits_below_one(scaled[i] * scaled[j], axes)
        for i in range(len(vectors))
        for j in range(i + 1)
    ]


def from_products(
    above: Sequence[Int32[Array, "*T"]],
    digits: Sequence[Sequence[Int32[Array, "*T"]]],
    outer: tuple[int, ...],
) -> Geometry:
    """The geometry of vectors with these exponents and `products`.

    Args:
        outer: shape of the axes of the result before those of the checkpoints: `(-1,)` or `()`.
    """
    count, flat = len(above), iter(digits)
    products = {(i, j): sums.rounded(next(flat)) for i in range(count) for j in range(i + 1)}
    roots = [jnp.sqrt(products[k, k]) for k in range(count)]

    def cosine(i: int, j: int) -> Array:
        both = roots[i] * roots[j]
        if i == j:
            return jnp.where(both > 0, 1.0, 0.0)
        value = products[max(i, j), min(i, j)] / jnp.where(both > 0, both, 1)
        return jnp.where(both > 0, jnp.clip(value, -1, 1), 0.0)

    norms = [sums.scaled(root, -each) for root, each in zip(roots, above)]
    finite = [each < sums.NOT_FINITE for each in above]
    norms = [jnp.where(each, norm, jnp.nan) for each, norm in zip(finite, norms)]
    cosines = jnp.stack(
        [cosine(i, j).reshape(outer) for i in range(count) for j in range(count)], -1
    )
    return Geometry(
        jnp.stack([norm.reshape(outer) for norm in norms], -1),
        cosines.reshape(*cosines.shape[:-1], count, count),
    )


def linear(_: Geometry | None, genes: Genes, variant: Variant) -> Float[Array, " K"]:
    """c_k = w_k; with `normalize` w_k / sum_j w_j. Model soups, arXiv 2203.05482.

    Weights that sum to 0 give infinite or undefined values with `normalize`, in both variants.
    """
    del variant
    weight = genes["weight"]
    return weight / _sum(weight) if genes["normalize"] else weight


def task_arithmetic(_: Geometry | None, genes: Genes, variant: Variant) -> Float[Array, " K"]:
    """c_k = lambda w_k of the deltas; with `normalize` lambda w_k / sum_j w_j. arXiv 2212.04089.

    A sum of weights below 1e-8 in magnitude is not divided by, in both variants.
    """
    del variant
    weight = genes["weight"]
    if genes["normalize"]:
        whole = _sum(weight)
        weight = weight / jnp.where(jnp.abs(whole) < _SMALL_SUM, 1, whole)
    return genes["lambda"] * weight


def slerp(geometry: Geometry, genes: Genes, variant: Variant) -> Float[Array, " 2"]:
    """c = (sin((1 - t) w), sin(t w)) / sin w, with the angle w between the two. Shoemake, 1985.

    The coefficients are of the vectors as they are, not of unit vectors, so that t = 0 and t = 1
    return the checkpoints bit for bit.

    paper: (1 - t, t) only where the angle is 0 or pi in float32, or a vector is 0.
    mergekit: (1 - t, t) wherever the cosine is above 0.9995 in magnitude, as it nearly always is
        between fine-tunes of one model; and a vector that is 0 counts as one at a right angle.
    """
    cosine = geometry.cosines[0, 1]
    flat = jnp.abs(cosine) > 0.9995 if variant == "mergekit" else _no_angle(geometry)
    return _arc(cosine, genes["t"], flat)


def nuslerp(geometry: Geometry, genes: Genes, variant: Variant) -> Float[Array, " 2"]:
    """`slerp` with t = w_2 / (w_1 + w_2); of deltas where there is a base.

    t is 1/2 where the weights sum to less than 1e-6 in magnitude. `nuslerp_flatten` takes the
    tensor as one vector; without it each row along the last axis is one, and with
    `nuslerp_row_wise` each column along the first.

    paper: (1 - t, t) where a vector is 0, as are the deltas of a tensor that was not trained.
    mergekit: a vector that is 0 counts as one at a right angle.
    """
    first, second = genes["weight"]
    whole = first + second
    small = jnp.abs(whole) < 1e-6
    t = jnp.where(small, 0.5, second / jnp.where(small, 1, whole))
    flat = _no_angle(geometry)
    if variant == "mergekit":
        flat = jnp.abs(geometry.cosines[0, 1]) == 1
    return _arc(geometry.cosines[0, 1], t, flat)


def _no_angle(geometry: Geometry) -> Array:
    return (jnp.abs(geometry.cosines[0, 1]) == 1) | jnp.any(geometry.norms == 0)


def _arc(cosine: Array, t: Array, flat: Array) -> Array:
    angle = jnp.arccos(jnp.where(flat, 0, cosine))
    sine = jnp.sin(angle)
    first = jnp.where(flat, 1 - t, jnp.sin((1 - t) * angle) / sine)
    second = jnp.where(flat, t, jnp.sin(t * angle) / sine)
    return jnp.stack([first, second])


def multislerp(geometry: Geometry, genes: Genes, variant: Variant) -> Float[Array, " K"]:
    """(sum_k w_k |v_k|) m / |m| with m = sum_k w_k v_k / |v_k|: mean direction, mean norm.

    mergekit's documentation takes the mean of the logarithms at this m, whose tangents cancel for
    the same weights; what is left is this. Of deltas where there is a base. `normalize_weights`
    divides weights by their sum.

    paper: where |m| is below 1e-6 of the sum of the weights' magnitudes, sum_k w_k v_k.
    mergekit: `eps` is added to each norm, and |m| below it gives sum_k w_k v_k for two models;
        there it is an error for more, here the same.
    """
    weight, norms = genes["weight"], geometry.norms
    if genes["normalize_weights"]:
        weight = weight / _sum(weight)
    mean_norm = _sum(weight * norms)
    if variant == "mergekit":
        least, added = genes["eps"], genes["eps"]
    else:
        least, added = 1e-6 * jnp.sum(jnp.abs(weight)), 0.0
    unit = weight * jnp.where(norms > 0, norms / jnp.where(norms > 0, norms + added, 1), 0)
    length = _root(_square(unit, geometry.cosines))
    ratios = jnp.where(norms > 0, mean_norm / jnp.where(norms > 0, norms + added, 1), 0)
    flat = length < least
    return jnp.where(flat, weight, weight * ratios / jnp.where(flat, 1, length))


def karcher(geometry: Geometry, genes: Genes, variant: Variant) -> Float[Array, " K"]:
    """The Karcher mean u of the directions, with equal weights, times the mean norm.

    arXiv 2603.04972. From the normalised mean on, at most `max_iter` times, until |T| < `tol`:
    T = sum_k a_k (phi_k / sin phi_k) (u_k - cos(phi_k) u), u <- cos|T| u + sin|T| T / |T|, where
    phi_k is the angle between u and u_k. All iterates stay in the span of the inputs.

    paper: vectors that are 0 are left out of the mean direction.
    mergekit: vectors of norm `tol` or less are, and so are terms of an angle below `tol`.
    In both, the mean norm is of all vectors, and all zero give zero.
    """
    norms, cosines, tol = geometry.norms, geometry.cosines, genes["tol"]
    least = tol if variant == "mergekit" else 0.0
    kept = norms > least
    share = jnp.where(kept, 1.0, 0.0) / jnp.maximum(jnp.sum(kept), 1)

    def normalised(alpha: Array) -> Array:
        length = jnp.sqrt(jnp.maximum(_square(alpha, cosines), 0))
        return alpha / jnp.where(length > 0, length, 1)

    length = jnp.sqrt(jnp.maximum(_square(share, cosines), 0))
    first = jax.nn.one_hot(jnp.argmax(kept), len(norms))
    start = jnp.where(length < tol, first, normalised(share))

    def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        alpha, count, _ = state
        cosine = jnp.clip(jnp.sum(cosines * alpha[None], axis=-1), -1 + 1e-6, 1)
        angle = jnp.arccos(cosine)
        near = angle < (tol if variant == "mergekit" else 1e-7)
        ratio = jnp.where(near, 1.0, angle / jnp.sin(jnp.where(near, 1.0, angle)))
        if variant == "mergekit":
            ratio = jnp.where(near, 0.0, ratio)
        pull = share * ratio
        tangent = pull - jnp.sum(pull * cosine) * alpha
        size = jnp.sqrt(jnp.maximum(_square(tangent, cosines), 0))
        done = size < tol
        turned = jnp.cos(size) * alpha + jnp.sinc(size / jnp.pi) * tangent
        return jnp.where(done, alpha, normalised(turned)), count + 1, done

    def goes_on(state: tuple[Array, Array, Array]) -> Array:
        return (state[1] < genes["max_iter"]) & ~state[2]

    alpha, _, _ = jax.lax.while_loop(goes_on, step, (start, jnp.float32(0), jnp.array(False)))
    found = jnp.mean(norms) * alpha / jnp.where(kept, norms, 1)
    return jnp.where(kept, found, 0)


def model_stock(geometry: Geometry, genes: Genes, variant: Variant) -> Float[Array, " K"]:
    """theta_0 + t (mean_k theta_k - theta_0), t = K c / (1 + (K - 1) c). arXiv 2403.19522.

    c is the mean cosine between the deltas of two checkpoints: of the tensor, or with `filter_wise`
    of each row along the last axis.

    paper: c below 0 counts as 0: checkpoints that pull apart give the base.
    mergekit: c may be negative, and t then has no bounds; |delta_i| |delta_j| is at least 1e-6 in
        the cosine. Where the denominator is 0, t is 0; there it divides by 0.
    """
    del genes
    K = geometry.norms.shape[-1]
    cosines = geometry.cosines
    if variant == "mergekit":
        both = jnp.outer(geometry.norms, geometry.norms)
        cosines = cosines * both / jnp.maximum(both, 1e-6)
    cosine = jnp.sum(jnp.triu(cosines, 1)) / (K * (K - 1) / 2)
    if variant == "paper":
        cosine = jnp.maximum(cosine, 0)
    below = 1 + (K - 1) * cosine
    t = jnp.where(below == 0, 0, K * cosine / jnp.where(below == 0, 1, below))
    return jnp.full(K, t / K)


def metagpt(geometry: Geometry, genes: Genes, variant: Variant) -> Float[Array, " K"]:
    """c_k = |delta_k|^2 / sum_j |delta_j|^2 of the deltas. arXiv 2406.11385.

    Here of each tensor, in the paper of the whole model. mergekit does not have it.
    """
    del genes, variant
    norms = geometry.norms
    largest = jnp.max(norms)
    squares = (norms / jnp.where(largest == 0, 1, largest)) ** 2
    return jnp.where(largest == 0, 0, squares / jnp.where(largest == 0, 1, jnp.sum(squares)))


def passthrough(_: Geometry | None, genes: Genes, variant: Variant) -> Float[Array, " 1"]:
    """c = `scale`: one checkpoint, scaled; at 1 it is returned bit for bit."""
    del variant
    return genes["scale"]


def _sum(values: Array) -> Array:
    """In their order, whatever the compiler makes of it."""
    return functools.reduce(jnp.add, list(values))


def _root(square: Array) -> Array:
    """Of what rounding may have made negative; its derivative at 0 is 0, not infinite."""
    none = square <= 0
    return jnp.where(none, 0, jnp.sqrt(jnp.where(none, 1, square)))


def _square(alpha: Array, cosines: Array) -> Array:
    """|sum_k alpha_k u_k|^2."""
    terms = jnp.outer(alpha, alpha) * cosines
    return functools.reduce(
        jnp.add, [terms[i, j] for i in range(len(alpha)) for j in range(len(alpha))]
    )
