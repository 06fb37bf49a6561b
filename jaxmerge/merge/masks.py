"""Other merges that are no weighted sums: value by value, after thresholds of the tensor.

The functions are called as those of `merge.task_vectors`, and the same holds for their arithmetic.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmerge.merge import selection, sums
from jaxmerge.merge.linear import product
from jaxmerge.merge.task_vectors import Genes, Variant, added, delta, magnitude, moved

_compiled = functools.partial(jax.jit, static_argnames="variant")


@_compiled
def sce(tensors: Sequence[Array], base: Array, genes: Genes, key: Array, variant: Variant) -> Array:
    """Select, calculate, erase: SCE of FuseChat, arXiv 2408.07990.

    V_k = delta_k at the floor(`select_topk` m) places where the variance over checkpoints is
    largest, m being those where it is not 0, and 0 elsewhere; at 1 all places. c_k is the mean
    square of V_k over the sum of these. e is the sign of sum_k V_k.
    theta = theta_0 + sum_k c_k V_k / sum_k c_k, both sums over the k for which V_k has the sign e.
    The variances are kept, as one float32 tensor.

    paper: where sum_k V_k is 0 the base stays; V that are all 0 leave it too.
    mergekit: a sum of 0 elects +, mean squares that sum to less than 1e-6 give equal c_k, which the
        deltas of most fine-tunes do, and sum_k c_k counts as 1e-6 at least.
    """
    del key
    deltas = [delta((tensor, base)) for tensor in tensors]
    mean = added(deltas) / len(deltas)
    variance = added([_squared(each - mean) for each in deltas]) / len(deltas)
    varying, _ = selection.counts([variance > 0, variance == 0])
    wanted = selection.share(genes["select_topk"], varying)
    chosen = selection.largest(lambda stored: stored, variance, wanted)(variance)
    chosen = chosen | jnp.broadcast_to(genes["select_topk"] >= 1, base.shape)
    kept = [jnp.where(chosen, delta((tensor, base)), 0) for tensor in tensors]
    squares = jnp.stack(
        [sums.total(_squared(each)).reshape(()) / max(base.size, 1) for each in kept]
    )
    whole = jnp.sum(squares)
    if variant == "mergekit":
        equal = jnp.full(len(kept), 1 / len(kept))
        shares = jnp.where(whole < 1e-6, equal, squares / jnp.where(whole == 0, 1, whole))
        sign = jnp.where(added(kept) >= 0, 1.0, -1.0)
    else:
        shares = squares / jnp.where(whole == 0, 1, whole)
        sign = jnp.sign(added(kept))
    agreeing = [(jnp.sign(each) == sign) & (sign != 0) for each in kept]
    mixed = added(
        [jnp.where(here, product(c, each), 0) for here, c, each in zip(agreeing, shares, kept)]
    )
    below = added([jnp.where(here, c, 0) for here, c in zip(agreeing, shares)])
    least = jnp.maximum(below, 1e-6) if variant == "mergekit" else jnp.where(below == 0, 1, below)
    return moved(base, mixed / least)


@_compiled
def ram(tensors: Sequence[Array], base: Array, genes: Genes, key: Array, variant: Variant) -> Array:
    """What one checkpoint alone changed is taken whole, what several did as their mean: RAM.

    arXiv 2601.13572. A delta is a change where it is above `epsilon` in magnitude.
    theta = theta_0 + the mean of the changes at each place. The variants are the same.
    """
    del key, variant
    return _unique_and_shared(tensors, base, genes, [jnp.float32(1)] * len(tensors))


@_compiled
def ramplus_tl(
    tensors: Sequence[Array], base: Array, genes: Genes, key: Array, variant: Variant
) -> Array:
    """`ram`, where what checkpoint k alone changed is multiplied by 1 + r clip(rho_k, 0, alpha).

    arXiv 2601.13572. rho_k is how many of its changes are shared, over how many are its own; the
    paper counts them in the whole model, here it is the tensor. The variants are the same.
    """
    del key, variant
    changes, count = _changes(tensors, base, genes)
    factors = []
    for change in changes:
        both = selection.counts([change & (count > 1), change & (count == 1)])
        shared, own = (each.astype(jnp.float32) for each in both)
        ratio = shared / jnp.maximum(own, genes["epsilon"])
        factors.append(1 + product(genes["r"], jnp.clip(ratio, 0, genes["alpha"])))
    return _unique_and_shared(tensors, base, genes, factors)


def _changes(tensors: Sequence[Array], base: Array, genes: Genes) -> tuple[list[Array], Array]:
    changes = [magnitude((tensor, base)) > genes["epsilon"] for tensor in tensors]
    return changes, added([change.astype(jnp.int32) for change in changes])


def _unique_and_shared(
    tensors: Sequence[Array], base: Array, genes: Genes, factors: Sequence[Array]
) -> Array:
    changes, count = _changes(tensors, base, genes)
    terms = [
        jnp.where(change, product(jnp.where(count == 1, factor, 1), delta((tensor, base))), 0)
        for change, factor, tensor in zip(changes, factors, tensors)
    ]
    return moved(base, added(terms) / jnp.maximum(count, 1).astype(jnp.float32))


@_compiled
def nearswap(
    tensors: Sequence[Array], base: Array, genes: Genes, key: Array, variant: Variant
) -> Array:
    """theta_0 + clip(delta, -t, t): towards the checkpoint, but by t at most.

    Known from the model card of QuartetAnemoi-70B. What is nearer than t is taken bit for bit.

    paper: the formula above, for every t of at least 0.
    mergekit: a theta_1 + (1 - a) theta_0 with a = t / max(|delta|, 1e-6), at most 1: the same but
        for deltas and t that are both below 1e-6.
    """
    del key
    (tensor,), t = tensors, jnp.maximum(genes["t"], 0)
    change = delta((tensor, base))
    step = product(jnp.sign(change), t)
    near = jnp.abs(change) <= t
    if variant == "mergekit":
        tiny = jnp.abs(change) < 1e-6
        step = jnp.where(tiny, product(change, t * 1e6), step)
        near = jnp.where(tiny, t >= 1e-6, near)
    return jnp.where(near, tensor.astype(base.dtype), moved(base, step))


@_compiled
def arcee_fusion(
    tensors: Sequence[Array], base: Array, genes: Genes, key: Array, variant: Variant
) -> Array:
    """theta_1 where its importance I stands out, else theta_0: Arcee Fusion.

    I = |delta| KL(P | Q) of the row along the last axis, P = softmax(theta_1) + 1e-8 and Q of
    theta_0 alike. It stands out from the median and 1.5 times the distance of the quartiles on:
    the values of ranks floor(q (n - 1)), q = 1/4, 1/2, 3/4, of I, sorted.

    The variants are the same. mergekit takes the quantiles of 10^6 values that it draws, without a
    seed, where there are more; here they are always those of all.
    """
    del genes, key, variant
    (tensor,) = tensors
    divergence = _divergence(tensor, base)

    def importance(stored: tuple[Array, Array, Array]) -> Array:
        return magnitude(stored[:2]) * stored[2]

    stored = (tensor, base, divergence)
    last = max(base.size - 1, 0)
    quarter, half, three = (
        selection.smallest(importance, stored, jnp.uint32(last * i // 4)) for i in (1, 2, 3)
    )
    least = half + product(jnp.float32(1.5), three - quarter)
    return jnp.where(importance(stored) >= least, tensor.astype(base.dtype), base)


def _divergence(tensor: Array, base: Array) -> Float[Array, "... 1"]:
    """sum_p P log(P / Q) of each row; see `arcee_fusion`.

    With r = P / Q - 1 it is sum_p Q ((1 + r) log(1 + r) - r), whose terms are all positive: of
    checkpoints that are alike the terms P log(P / Q) nearly cancel.
    """
    if not base.ndim:
        return jnp.float32(0)
    last, floor = (base.ndim - 1,), jnp.float32(1e-8)
    values, change = base.astype(jnp.float32), delta((tensor, base))
    heights = jnp.exp(values - jnp.max(values, axis=-1, keepdims=True))
    q = heights / sums.total(heights, last)
    # P = Q exp(delta) / sum Q exp(delta), of which the logarithm is near 0.
    relative = change - jnp.log1p(sums.total(q * jnp.expm1(change), last))
    r = q * jnp.expm1(relative) / (q + floor)
    series = r * r * (1 / 2 - r * (1 / 6 - r * (1 / 12 - r / 20)))
    exact = (1 + r) * jnp.log1p(r) - r
    return sums.total((q + floor) * jnp.where(jnp.abs(r) < 0.03, series, exact), last)


def _squared(values: Array) -> Array:
    return product(values, values)
