"""All ways to merge, as one table, and the merge of one tensor by any of them.

A method is one row: what it takes, its genes (the numbers that a merge or a search sets), and its
formula. *Combinations* are weighted sums of the checkpoints, whose coefficients may depend on their
norms and angles: see `merge.combinations`. *Masks* work value by value, after thresholds or draws:
see `merge.task_vectors` and `merge.masks`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxmerge.errors import JaxmergeError, check_choice
from jaxmerge.merge import blocks, combinations, draws, masks, selection, task_vectors
from jaxmerge.merge.geometry import geometry
from jaxmerge.merge.linear import weighted_sum

VARIANTS = ("paper", "mergekit")


@dataclass(frozen=True)
class Gene:
    """A number, or a choice, that a method takes.

    Attributes:
        name: as mergekit calls it.
        default: None: there is none, so that it must be given.
        low, high: between which a search looks for it; other values may be given.
        per_checkpoint: whether each checkpoint has its own.
        tolerance: whether it bounds an error, so that there is nothing to search.
    """

    name: str
    default: float | bool | None
    low: float = 0.0
    high: float = 1.0
    per_checkpoint: bool = False
    tolerance: bool = False

    @property
    def searched(self) -> bool:
        """Whether a search sets it, unless it is given; weights are by themselves."""
        chooses = isinstance(self.default, bool)
        return not (chooses or self.tolerance or self.name == "weight")


@dataclass(frozen=True)
class Method:
    """A way to merge.

    Attributes:
        kind: see the module.
        base: whether it takes a base, theta_0, which is not among the checkpoints.
        inputs: how many checkpoints it takes, at least and at most; None: there is no most.
        genes: in the order in which they are written.
        paper: where it is from.
        rule: its formula, whose docstring names what the variants do differently.
        geometry: of combinations: whether coefficients depend on the norms and angles of the
            checkpoints, or of their deltas where there is a base.
        draws: whether it draws at random.
    """

    kind: Literal["combination", "mask"]
    base: Literal["none", "optional", "required"]
    inputs: tuple[int, int | None]
    genes: tuple[Gene, ...]
    paper: str
    rule: Callable[..., Array]
    geometry: bool = False
    draws: bool = False


_WEIGHT = Gene("weight", None, per_checkpoint=True)
_DENSITY = Gene("density", 1.0, 0.05, 1.0, per_checkpoint=True)
_GAMMA = Gene("gamma", 0.01, 0.0, 0.2, per_checkpoint=True)
_SPREAD = Gene("epsilon", 0.15, 0.0, 0.5, per_checkpoint=True)
_LAMBDA = Gene("lambda", 1.0, 0.0, 2.0)
_SUM, _MEAN = Gene("normalize", False), Gene("normalize", True)
_AS_IS, _RESCALED = Gene("rescale", False), Gene("rescale", True)
_CHANGE = Gene("epsilon", 1e-5, 0.0, 1e-3)

# fmt: off
METHODS: dict[str, Method] = {
    "linear": Method(
        "combination", "none", (1, None), (_WEIGHT, _MEAN), "arXiv 2203.05482",
        combinations.linear),
    "slerp": Method(
        "combination", "none", (2, 2), (Gene("t", None),), "Shoemake, SIGGRAPH 1985",
        combinations.slerp, geometry=True),
    "nuslerp": Method(
        "combination", "optional", (2, 2),
        (_WEIGHT, Gene("nuslerp_flatten", True), Gene("nuslerp_row_wise", False)),
        "mergekit", combinations.nuslerp, geometry=True),
    "multislerp": Method(
        "combination", "optional", (2, None),
        (_WEIGHT, Gene("normalize_weights", True), Gene("eps", 1e-8, 1e-12, 1e-4, tolerance=True)),
        "mergekit", combinations.multislerp, geometry=True),
    "karcher": Method(
        "combination", "none", (2, None),
        (Gene("max_iter", 10.0, 1.0, 100.0, tolerance=True),
         Gene("tol", 1e-5, 1e-8, 1e-3, tolerance=True)),
        "arXiv 2603.04972", combinations.karcher, geometry=True),
    "task_arithmetic": Method(
        "combination", "required", (1, None), (_WEIGHT, _SUM, _LAMBDA), "arXiv 2212.04089",
        combinations.task_arithmetic),
    "ties": Method(
        "mask", "required", (1, None), (_WEIGHT, _DENSITY, _MEAN, _AS_IS, _LAMBDA),
        "arXiv 2306.01708", task_vectors.ties),
    "dare_linear": Method(
        "mask", "required", (1, None), (_WEIGHT, _DENSITY, _SUM, _RESCALED, _LAMBDA),
        "arXiv 2311.03099", task_vectors.dare_linear, draws=True),
    "dare_ties": Method(
        "mask", "required", (1, None), (_WEIGHT, _DENSITY, _SUM, _RESCALED, _LAMBDA),
        "arXiv 2311.03099", task_vectors.dare_ties, draws=True),
    "della": Method(
        "mask", "required", (1, None), (_WEIGHT, _DENSITY, _SPREAD, _MEAN, _RESCALED, _LAMBDA),
        "arXiv 2406.11617", task_vectors.della, draws=True),
    "della_linear": Method(
        "mask", "required", (1, None), (_WEIGHT, _DENSITY, _SPREAD, _SUM, _RESCALED, _LAMBDA),
        "arXiv 2406.11617", task_vectors.della_linear, draws=True),
    "breadcrumbs": Method(
        "mask", "required", (1, None), (_WEIGHT, _DENSITY, _GAMMA, _SUM, _AS_IS, _LAMBDA),
        "arXiv 2312.06795", task_vectors.breadcrumbs),
    "breadcrumbs_ties": Method(
        "mask", "required", (1, None), (_WEIGHT, _DENSITY, _GAMMA, _SUM, _AS_IS, _LAMBDA),
        "arXiv 2312.06795", task_vectors.breadcrumbs_ties),
    "sce": Method(
        "mask", "required", (1, None), (Gene("select_topk", 1.0, 0.05, 1.0),), "arXiv 2408.07990",
        masks.sce),
    "ram": Method("mask", "required", (1, None), (_CHANGE,), "arXiv 2601.13572", masks.ram),
    "ramplus_tl": Method(
        "mask", "required", (1, None), (_CHANGE, Gene("r", 0.1), Gene("alpha", 0.2)),
        "arXiv 2601.13572", masks.ramplus_tl),
    "model_stock": Method(
        "combination", "required", (2, None), (Gene("filter_wise", False),), "arXiv 2403.19522",
        combinations.model_stock, geometry=True),
    "metagpt": Method(
        "combination", "required", (1, None), (), "arXiv 2406.11385", combinations.metagpt,
        geometry=True),
    "nearswap": Method(
        "mask", "required", (1, 1), (Gene("t", None, 0.0, 0.01),),
        "model card of QuartetAnemoi-70B", masks.nearswap),
    "arcee_fusion": Method("mask", "required", (1, 1), (), "Arcee's blog", masks.arcee_fusion),
    "passthrough": Method(
        "combination", "none", (1, 1), (Gene("scale", 1.0, 0.0, 2.0, per_checkpoint=True),),
        "mergekit", combinations.passthrough),
}
# fmt: on


def merge_tensor(
    method: str,
    tensors: Sequence[Any],
    base: Any | None,
    genes: Mapping[str, Any],
    *,
    name: str,
    seed: int = 0,
    variant: Literal["paper", "mergekit"] = "paper",
) -> Array:
    """One tensor of K checkpoints, merged.

    All arithmetic is float32, rounded once. Programs are compiled once for each shape and number of
    tensors, those of combinations on the host for each number of tensors; other genes, names and
    seeds take the same. Tensors on a mesh are merged where they lie, to the same bits. It can be
    traced, as a part of a larger program.

    Args:
        method: a name in `METHODS`. `slerp` goes from the first tensor (t = 0) to the second.
        tensors: arrays of the K checkpoints, all of one shape, of floating-point types of up to 32
            bits. The base is not among them.
        base: theta_0, where the method takes one; None: there is none.
        genes: by name; those of a checkpoint are K numbers, or one for all. Those that choose are
            Python's True and False. What is missing has the default of the table.
        name: of the tensor; draws depend on it.
        seed: of draws, at least 0 and below 2^64.
        variant: whose rules hold where they differ; see the docstring of the method's `rule`.

    Returns:
        The merged tensor in the type of the base, or without one of the first checkpoint.

    Raises:
        JaxmergeError: the method takes other tensors or genes.

    >>> two = [jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])]
    >>> merge_tensor("linear", two, None, {"weight": [3, 1]}, name="x")
    Array([0.75, 0.25], dtype=float32)
    """
    check_choice("merge.method", method, tuple(METHODS))
    check_choice("merge.variant", variant, VARIANTS)
    check_inputs(method, len(tensors), with_base=base is not None)
    _check_tensors(name, [*([] if base is None else [base]), *tensors])
    numbers, choices = complete(method, genes, len(tensors))
    placed = [jnp.asarray(tensor) for tensor in tensors]
    placed_base = None if base is None else jnp.asarray(base)
    if not placed[0].size:
        return placed[0] if placed_base is None else placed_base
    key = jnp.asarray(draws.key(seed, name))
    return merged(method, variant, placed, placed_base, {**numbers, **choices}, key)


def merged(
    method: str,
    variant: str,
    tensors: Sequence[Array],
    base: Array | None,
    genes: Mapping[str, Any],
    key: Array,
) -> Array:
    """`merge_tensor` of what has been checked, where all may be traced but the choices.

    Args:
        genes: all of them, see `complete`.
        key: see `draws.key`.
    """
    row = METHODS[method]
    if row.kind == "mask":
        return row.rule(tensors, base, genes, key, variant)
    found = coefficients(method, variant, genes, tensors, base)
    axis = vector_axis(genes, tensors[0].ndim)
    if axis is None and blocks.fit((tensors, base, found)):
        made = (_combined(*each, found, axis=None) for each in blocks.cut(tensors, base))
        return blocks.joined(made, like=tensors[0] if base is None else base)
    return _combined(tuple(tensors), base, found, axis=axis)


def check_inputs(method: str, checkpoints: int, *, with_base: bool) -> None:
    """Raises `JaxmergeError` unless a method takes so many checkpoints, with a base or without."""
    row = METHODS[method]
    least, most = row.inputs
    if checkpoints < least or (most is not None and checkpoints > most):
        more = "" if most == least else (" or more" if most is None else f" to {most}")
        raise JaxmergeError(
            f"{method} takes another number of checkpoints",
            where="merge.method",
            expected=f"{least}{more}" + (", and a base besides" if row.base == "required" else ""),
            found=str(checkpoints),
        )
    if row.base == "required" and not with_base:
        raise JaxmergeError(
            f"{method} merges differences from a base, and there is none",
            where="pool.base",
            expected="the checkpoint that the others were made from",
        )
    if row.base == "none" and with_base:
        raise JaxmergeError(
            f"{method} takes no base",
            where="merge.method",
            expected="the base as one of the checkpoints, or not at all",
        )


def complete(
    method: str, genes: Mapping[str, Any], checkpoints: int
) -> tuple[dict[str, Array], dict[str, bool]]:
    """All genes of a method, what is missing at its default: numbers, and choices.

    Raises:
        JaxmergeError: there is no such gene, one is missing, or is not what it must be.
    """
    table = {gene.name: gene for gene in METHODS[method].genes}
    unknown = [name for name in genes if name not in table]
    if unknown:
        raise JaxmergeError(
            f"{method} has no gene of this name",
            where="merge.genes",
            expected=", ".join(table) or "none",
            found=", ".join(unknown),
        )
    numbers, choices = {}, {}
    for name, gene in table.items():
        value = genes.get(name, gene.default)
        if value is None:
            said = "a number" + " for each checkpoint" * gene.per_checkpoint
            raise JaxmergeError(f"{method} needs this", where=f"merge.genes.{name}", expected=said)
        if isinstance(gene.default, bool):
            if not isinstance(value, bool | np.bool_):
                raise JaxmergeError(
                    "this is a choice",
                    where=f"merge.genes.{name}",
                    expected="True or False",
                    found=str(value),
                )
            choices[name] = bool(value)
        else:
            numbers[name] = _number(gene, value, checkpoints)
    return numbers, choices


def _number(gene: Gene, value: Any, checkpoints: int) -> Array:
    found = jnp.asarray(value, jnp.float32)
    wanted = (checkpoints,) if gene.per_checkpoint else ()
    if found.shape not in ((), wanted):
        raise JaxmergeError(
            "this is not one number for each checkpoint"
            if gene.per_checkpoint
            else "this is one number",
            where=f"merge.genes.{gene.name}",
            expected=f"shape {wanted}" + (", or one number for all" if wanted else ""),
            found=f"shape {found.shape}",
        )
    return jnp.broadcast_to(found, wanted)


def _check_tensors(name: str, tensors: Sequence[Any]) -> None:
    """Before they are JAX's, which rounds 64 bits to 32 without a word."""
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) > 1:
        raise JaxmergeError(
            "tensors of different shapes can't be merged",
            where=name,
            expected="checkpoints of one model, or of models of one size",
            found=str(sorted(shapes)),
        )
    for tensor in tensors:
        if not jnp.issubdtype(tensor.dtype, jnp.floating) or tensor.dtype.itemsize > 4:
            raise JaxmergeError(
                "values of this type can't be merged",
                where=name,
                expected="floating point of up to 32 bits",
                found=str(tensor.dtype),
            )
    if tensors[0].size > selection.MOST:
        raise JaxmergeError(
            "the tensor is too large",
            where=name,
            expected=f"at most {selection.MOST} values",
            found=str(tensors[0].size),
        )


def coefficients(
    method: str,
    variant: str,
    genes: Mapping[str, Any],
    tensors: Sequence[Array],
    base: Array | None,
) -> Array:
    """c of a combination, `[K]`, or `[R, K]` of each vector that the tensor is made of.

    Args:
        genes: all of them, see `complete`.
    """
    choices = tuple((name, gene) for name, gene in genes.items() if isinstance(gene, bool))
    numbers = {name: gene for name, gene in genes.items() if not isinstance(gene, bool)}
    found = None
    if METHODS[method].geometry:
        axis = vector_axis(genes, tensors[0].ndim)
        found = geometry(tuple(tensors), base, axis=axis)
    return rule(method, variant, choices)(found, numbers)


def vector_axis(genes: Mapping[str, Any], ndim: int) -> int | None:
    """The axis along which the vectors of a combination run; None: the tensor is one vector."""
    if ndim < 2 or not (genes.get("filter_wise") or not genes.get("nuslerp_flatten", True)):
        return None
    return 0 if genes.get("nuslerp_row_wise") else ndim - 1


@functools.cache
def rule(method: str, variant: str, choices: tuple[tuple[str, bool], ...]) -> Any:
    """`(geometry, numbers) -> c` of a combination, compiled; see `coefficients`."""

    def of_vectors(geometry: Any, numbers: Mapping[str, Array]) -> Array:
        return METHODS[method].rule(geometry, {**numbers, **dict(choices)}, variant)

    def of_tensor(geometry: Any, numbers: Mapping[str, Array]) -> Array:
        if geometry is None or geometry.norms.ndim == 1:
            return of_vectors(geometry, numbers)
        return jax.vmap(of_vectors, in_axes=(0, None))(geometry, numbers)

    return jax.jit(of_tensor)


@functools.partial(jax.jit, static_argnames="axis")
def _combined(
    tensors: Sequence[Array], base: Array | None, found: Array, *, axis: int | None
) -> Array:
    """sum_k c_k theta_k + (1 - sum_k c_k) theta_0: the linear kernel, whatever the coefficients."""
    leaves = list(tensors)
    if base is not None:
        found = jnp.concatenate([1 - jnp.sum(found, axis=-1, keepdims=True), found], axis=-1)
        leaves = [base, *leaves]
    if axis is None:
        return weighted_sum(leaves, found)
    rows = [jnp.moveaxis(leaf, axis, -1) for leaf in leaves]
    flat = [row.reshape(-1, row.shape[-1]) for row in rows]
    return jnp.moveaxis(weighted_sum(flat, found).reshape(rows[0].shape), -1, axis)
