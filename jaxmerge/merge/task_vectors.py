"""Merges by task vectors: what is kept of each checkpoint's deltas, added up or by elected sign.

delta_k = theta_k - theta_0 and all sums are float32, and the result is rounded once. Each threshold
and norm is of the tensor, where papers often mean the whole model.

Every function takes K tensors and their base, the genes by name, those of a checkpoint `[K]` and
the others scalars or bools, a key for draws and the variant. It returns the merged tensor in the
base's type. Where the variants "paper" and "mergekit" (0.1.5) differ, its docstring says how.
mergekit works in the type that tensors are stored in, deltas too; here neither variant does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmerge.merge import draws, selection, sums
from jaxmerge.merge.linear import product

Genes = Mapping[str, Any]
Variant = Literal["paper", "mergekit"]

Stored = tuple[Array, Array]  # theta_k and theta_0


class Sparsifier(NamedTuple):
    """Which deltas of a checkpoint are kept, in two steps.

    Attributes:
        find: (stored, genes, checkpoint, key, variant) to what is known of the tensor as a whole.
        kept: (stored, found, genes, checkpoint, key, variant) to what is kept, 0 elsewhere.
        unbiased: whether `rescale` of the variant "paper" has the paper's meaning, which is in
            `kept`; else it keeps the sum of magnitudes.
        ranks: (genes, number of values) to how many of the largest magnitudes are taken: what is
            known of the tensor is then the `selection.Largest` of each; None: `find` says it.
    """

    find: Callable[[Stored, Genes, Array, Array, Variant], Any]
    kept: Callable[[Stored, Any, Genes, Array, Array, Variant], Array]
    unbiased: bool = False
    ranks: Callable[[Genes, int], tuple[Array, ...]] | None = None


def ties(
    tensors: Sequence[Array], base: Array, genes: Genes, key: Array, variant: Variant
) -> Array:
    """Trim, elect a sign, and average what has it: TIES, arXiv 2306.01708.

    D_k: the floor(d_k n) largest of delta_k, see `merge.selection` for equal ones. e: the sign of
    the sum of the D_k. theta = theta_0 + lambda sum_k w_k D_k / sum_k |w_k|, both sums over the k
    for which D_k has the sign e; without `normalize` it is not divided. `rescale` multiplies D_k by
    |delta_k|_1 / |D_k|_1.

    paper: e is the sign of sum_k D_k, of the checkpoints whose weight is not 0; where it is 0, no
        sign is elected and the base stays.
    mergekit: e is the sign of sum_k w_k D_k, where a sum of 0 elects +; what is averaged are the
        w_k D_k that have it, divided by the sum of their w_k, or by 1 where that is 0. A tensor of
        which floor(d_k n) is 0 is an error there; here, in both, it is left as in the base.
    """
    return _task_vectors(tensors, base, genes, key, variant, _LARGEST, elect=True)


def dare_linear(
    tensors: Sequence[Array], base: Array, genes: Genes, key: Array, variant: Variant
) -> Array:
    """Drop deltas at random: D_k keeps each with probability d_k. DARE, arXiv 2311.03099.

    theta = theta_0 + lambda sum_k w_k D_k; `normalize` divides by sum_k w_k, unless that is below
    1e-8 in magnitude.

    paper: `rescale` divides D_k by d_k, so that its mean is delta_k.
    mergekit: `rescale` multiplies D_k by |delta_k|_1 / |D_k|_1, unless one is below 1e-7.
    """
    return _task_vectors(tensors, base, genes, key, variant, _RANDOM, elect=False)


def dare_ties(
    tensors: Sequence[Array], base: Array, genes: Genes, key: Array, variant: Variant
) -> Array:
    """The D_k of `dare_linear`, merged as in `ties`; the variants differ as there."""
    return _task_vectors(tensors, base, genes, key, variant, _RANDOM, elect=True)


def della(
    tensors: Sequence[Array], base: Array, genes: Genes, key: Array, variant: Variant
) -> Array:
    """As `dare_ties`, but larger deltas are kept more often: DELLA, arXiv 2406.11617.

    In each row along the last axis the probability rises from d - h to d + h with the rank of
    |delta|, in equal steps; equal ones share the mean of their ranks. h is cut to what fits between
    0 and 1. Rows are sorted, which takes 17 bytes for each value of one checkpoint, and 4
    of each are kept.

    paper: h is `epsilon` / 2, and `rescale` divides each delta that is kept by its probability.
    mergekit: h is `epsilon`, and `rescale` is that of `dare_linear`. An h that doesn't fit is an
        error there, but for d >= 1, which keeps all; so it does here, in both.
    """
    return _task_vectors(tensors, base, genes, key, variant, _BY_RANK, elect=True)


def della_linear(
    tensors: Sequence[Array], base: Array, genes: Genes, key: Array, variant: Variant
) -> Array:
    """The D_k of `della`, merged as in `dare_linear`; the variants differ as there."""
    return _task_vectors(tensors, base, genes, key, variant, _BY_RANK, elect=False)


def breadcrumbs(
    tensors: Sequence[Array], base: Array, genes: Genes, key: Array, variant: Variant
) -> Array:
    """Drop the largest and the smallest deltas: Model Breadcrumbs, arXiv 2312.06795.

    Of the n magnitudes the floor(gamma_k n) largest are dropped, floor(d_k n) are kept, and the
    rest, the smallest, are dropped too; where there are too few, fewer of the largest are dropped.
    Merged as in `dare_linear`, with the `rescale` of `ties`.

    Both variants are the same. mergekit keeps nothing where floor(gamma_k n) is 0 and d_k below 1,
    as in small tensors: that is a slip, and is not followed.
    """
    return _task_vectors(tensors, base, genes, key, variant, _MIDDLE, elect=False)


def breadcrumbs_ties(
    tensors: Sequence[Array], base: Array, genes: Genes, key: Array, variant: Variant
) -> Array:
    """The D_k of `breadcrumbs`, merged as in `ties`; the variants differ as there."""
    return _task_vectors(tensors, base, genes, key, variant, _MIDDLE, elect=True)


def _share(genes: Genes, size: int) -> tuple[Array, ...]:
    return (selection.share(genes["density"], size),)


def _largest(stored: Stored, found: tuple[selection.Largest], *_: Any) -> Array:
    return jnp.where(found[0](magnitude(stored)), delta(stored), 0)


def _bounds(genes: Genes, size: int) -> tuple[Array, ...]:
    """With what is dropped at the top, and that alone."""
    kept = selection.share(genes["density"], size)
    top = jnp.minimum(selection.share(genes["gamma"], size), jnp.uint32(size) - kept)
    return kept + top, top


def _middle(stored: Stored, found: Any, *_: Any) -> Array:
    both, top = found
    chosen = both(magnitude(stored)) & ~top(magnitude(stored))
    return jnp.where(chosen, delta(stored), 0)


def _nothing(*_: Any) -> tuple[()]:
    return ()


def _random(
    stored: Stored, _: Any, genes: Genes, checkpoint: Array, key: Array, variant: Variant
) -> Array:
    density = genes["density"]
    chosen = draws.drawn(density, key, checkpoint, stored[1].shape)
    kept = jnp.where(chosen, delta(stored), 0)
    if variant == "mergekit" or not genes["rescale"]:
        return kept
    return kept / jnp.where(density > 0, jnp.minimum(density, 1), 1)


def _factors(
    stored: Stored, genes: Genes, checkpoint: Array, key: Array, variant: Variant
) -> Array:
    """What deltas are multiplied by: 0 for those that are dropped."""
    density = jnp.clip(genes["density"], 0, 1)
    half = genes["epsilon"] / (1 if variant == "mergekit" else 2)
    half = jnp.clip(half, 0, jnp.minimum(density, 1 - density))
    probability = density + product(half, 2 * rank(magnitude(stored)) - 1)
    chosen = draws.drawn(probability, key, checkpoint, stored[1].shape)
    if variant == "mergekit" or not genes["rescale"]:
        return chosen.astype(jnp.float32)
    return jnp.where(chosen, 1 / jnp.where(chosen, probability, 1), 0)


def _multiplied(stored: Stored, found: Array, *_: Any) -> Array:
    return product(found, delta(stored))


_LARGEST = Sparsifier(_nothing, _largest, ranks=_share)
_MIDDLE = Sparsifier(_nothing, _middle, ranks=_bounds)
_RANDOM = Sparsifier(_nothing, _random, unbiased=True)
_BY_RANK = Sparsifier(_factors, _multiplied, unbiased=True)


def rank(magnitudes: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """The place of each value in its row along the last axis when that is sorted, from 0 to 1.

    Equal values share the mean of their places. In a row of one it is 1/2.
    """
    if not magnitudes.ndim or magnitudes.shape[-1] == 1:
        return jnp.full(magnitudes.shape, 0.5, jnp.float32)
    last = magnitudes.ndim - 1
    here = jax.lax.broadcasted_iota(jnp.int32, magnitudes.shape, last)
    ordered, origin = jax.lax.sort((magnitudes, here), dimension=last, num_keys=1)
    starts = jnp.concatenate(
        [jnp.ones_like(ordered[..., :1], bool), ordered[..., 1:] != ordered[..., :-1]], axis=-1
    )
    ends = jnp.roll(starts, -1, axis=-1)
    first = jax.lax.cummax(jnp.where(starts, here, 0), axis=last)
    size = magnitudes.shape[-1]
    behind = jax.lax.cummin(jnp.where(ends, here, size), axis=last, reverse=True)
    _, twice = jax.lax.sort((origin, first + behind), dimension=last, num_keys=1)
    return twice.astype(jnp.float32) / (2 * (size - 1))


_STATIC = ("sparsifier", "variant", "choices")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _find(
    stored: Stored,
    given: tuple[selection.Largest, ...] | None,
    numbers: Mapping[str, Array],
    checkpoint: Array,
    key: Array,
    *,
    sparsifier: Sparsifier,
    variant: Variant,
    choices: tuple[tuple[str, bool], ...],
) -> tuple[Any, Array]:
    """What is known of one checkpoint's tensor as a whole, and what `rescale` multiplies by.

    That is |delta|_1 / |D|_1, unless one of them is below 1e-7, or 1.
    """
    genes = {**numbers, **dict(choices)}
    if given is not None:
        found = given
    elif sparsifier.ranks:
        wanted = sparsifier.ranks(genes, stored[1].size)
        found = tuple(selection.largest(magnitude, stored, k) for k in wanted)
    else:
        found = sparsifier.find(stored, genes, checkpoint, key, variant)
    if not genes["rescale"] or (sparsifier.unbiased and variant == "paper"):
        return found, jnp.float32(1)
    kept = sparsifier.kept(stored, found, genes, checkpoint, key, variant)
    whole, part = (sums.total(jnp.abs(x)).reshape(()) for x in (delta(stored), kept))
    small = (whole < 1e-7) | (part < 1e-7)
    return found, jnp.where(small, 1, whole / jnp.where(small, 1, part))


def _task_vectors(
    tensors: Sequence[Array],
    base: Array,
    genes: Genes,
    key: Array,
    variant: Variant,
    sparsifier: Sparsifier,
    *,
    elect: bool,
) -> Array:
    """theta_0 + lambda times the sum or the elected mean of what is kept of the deltas.

    A program for one checkpoint, which serves all, and then one for all of them.
    """
    choices = tuple((name, gene) for name, gene in genes.items() if isinstance(gene, bool))
    numbers = {name: gene for name, gene in genes.items() if not isinstance(gene, bool)}
    each = [_of_checkpoint(numbers, k) for k in range(len(tensors))]
    places = [jnp.uint32(k) for k in range(len(tensors))]
    how = {"sparsifier": sparsifier, "variant": variant, "choices": choices}
    found = [
        _find((tensor, base), _given((tensor, base), own, sparsifier), own, place, key, **how)
        for tensor, own, place in zip(tensors, each, places)
    ]
    return _mix(tuple(tensors), base, found, each, places, key, elect=elect, **how)


def _given(
    stored: Stored, numbers: Mapping[str, Array], sparsifier: Sparsifier
) -> tuple[selection.Largest, ...] | None:
    """The largest magnitudes of a tensor on the host; None: they are found where it is."""
    if not sparsifier.ranks or not selection.on_host((stored, numbers)) or not stored[1].size:
        return None
    keys = np.asarray(_keys(stored)).reshape(-1)
    wanted = _ranks(numbers, ranks=sparsifier.ranks, size=keys.size)
    return tuple(selection.largest_here(keys, int(k)) for k in wanted)


@jax.jit
def _keys(stored: Stored) -> Array:
    return selection.bits(magnitude(stored))


@functools.partial(jax.jit, static_argnames=("ranks", "size"))
def _ranks(
    numbers: Mapping[str, Array], *, ranks: Callable[[Genes, int], tuple[Array, ...]], size: int
) -> tuple[Array, ...]:
    return ranks(numbers, size)


def _of_checkpoint(numbers: Mapping[str, Array], k: int) -> dict[str, Array]:
    return {name: gene[k] if gene.ndim else gene for name, gene in numbers.items()}


@functools.partial(jax.jit, static_argnames=(*_STATIC, "elect"))
def _mix(
    tensors: Sequence[Array],
    base: Array,
    found: Sequence[tuple[Any, Array]],
    numbers: Sequence[Mapping[str, Array]],
    places: Sequence[Array],
    key: Array,
    *,
    sparsifier: Sparsifier,
    variant: Variant,
    choices: tuple[tuple[str, bool], ...],
    elect: bool,
) -> Array:
    genes = [{**own, **dict(choices)} for own in numbers]
    kept = []
    for tensor, (of_tensor, scale), own, place in zip(tensors, found, genes, places):
        values = sparsifier.kept((tensor, base), of_tensor, own, place, key, variant)
        kept.append(product(scale, values))
    weights = [own["weight"] for own in genes]
    if elect:
        mixed = _elected(kept, weights, variant, normalize=genes[0]["normalize"])
    else:
        mixed = added([product(weight, values) for weight, values in zip(weights, kept)])
        if genes[0]["normalize"]:
            whole = added(weights)
            mixed = mixed / jnp.where(jnp.abs(whole) < 1e-8, 1, whole)
    return moved(base, product(genes[0]["lambda"], mixed))


def _elected(
    kept: Sequence[Array], weights: Sequence[Array], variant: Variant, *, normalize: bool
) -> Array:
    """The sum, or mean, of the terms w_k D_k that have the elected sign; see `ties`."""
    terms = [product(weight, values) for weight, values in zip(weights, kept)]
    if variant == "mergekit":
        voters, counted = terms, weights
        sign = jnp.where(added(terms) >= 0, 1.0, -1.0)
    else:
        voters, counted = kept, [jnp.abs(weight) for weight in weights]
        voices = [jnp.where(weight != 0, values, 0) for weight, values in zip(weights, kept)]
        sign = jnp.sign(added(voices))
    agreeing = [(jnp.sign(voter) == sign) & (sign != 0) for voter in voters]
    mixed = added([jnp.where(agrees, term, 0) for agrees, term in zip(agreeing, terms)])
    if not normalize:
        return mixed
    whole = added([jnp.where(agrees, each, 0) for agrees, each in zip(agreeing, counted)])
    return mixed / jnp.where(whole == 0, 1, whole)


def delta(stored: Stored) -> Float[Array, "*S"]:
    """theta_k - theta_0 in float32, of (theta_k, theta_0)."""
    tensor, base = stored
    return tensor.astype(jnp.float32) - base.astype(jnp.float32)


def magnitude(stored: Stored) -> Float[Array, "*S"]:
    """|delta_k|."""
    return jnp.abs(delta(stored))


def added(terms: Sequence[Array]) -> Array:
    """Their sum, in their order."""
    return functools.reduce(jnp.add, terms)


def moved(base: Array, by: Float[Array, "*S"]) -> Array:
    """theta_0 and a change, rounded once to the type of the base."""
    return (base.astype(jnp.float32) + by).astype(base.dtype)
