"""What a search sets of a method: the checkpoints' weights, and those of its numbers left open.

A candidate of a method is a row `[K + M + 1]`: K weights, M genes, and 1; or such a row for each
group of leaves that has its own, `[G, K + M + 1]`. A row of K weights alone is a weighted sum,
whatever the method: single checkpoints and baselines are. Filled up with zeros it has the same
length, and its last number says that it is one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxmerge.errors import JaxmergeError, check_finite
from jaxmerge.merge.methods import METHODS, Gene, check_inputs, complete, vector_axis


class Searched(NamedTuple):
    """A method, and which of its numbers a search sets.

    Attributes:
        method: a name in `METHODS`.
        checkpoints: K; the base is not among them.
        with_base: whether there is a base.
        genes: what is searched beside the weights, M of them, each one number.
        fixed: all other genes of the method but the weights, by name.
        variant: see `methods.merge_tensor`; `seed` too.
        own: those of which each checkpoint has a number of its own, which are genes named as
            `own_name` says; the numbers of others hold for all checkpoints.
    """

    method: str
    checkpoints: int
    with_base: bool
    genes: tuple[Gene, ...]
    fixed: tuple[tuple[str, bool | float | tuple[float, ...]], ...]
    variant: Literal["paper", "mergekit"] = "paper"
    seed: int = 0
    own: tuple[str, ...] = ()

    @property
    def weighted(self) -> bool:
        """Whether checkpoints have weights, rather than all the same say."""
        return any(gene.name == "weight" for gene in METHODS[self.method].genes)

    @property
    def numbers(self) -> int:
        """How many a search sets of each group."""
        return self.checkpoints * self.weighted + len(self.genes)

    @property
    def width(self) -> int:
        """Of a row."""
        return self.checkpoints + len(self.genes) + 1

    @property
    def choices(self) -> dict[str, bool]:
        """The genes that choose."""
        return {name: gene for name, gene in self.fixed if isinstance(gene, bool)}

    @property
    def summed(self) -> bool:
        """See `summed`."""
        return summed(self.method, self.choices)

    def padded(self, rows: Float[np.ndarray, "*_ _"]) -> Float[np.ndarray, "*_ R"]:
        """Rows of weights alone as rows of the length of all others."""
        missing = self.width - rows.shape[-1]
        return np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, missing)]).astype(np.float32)

    def complete(self, row: Any) -> dict[str, Any]:
        """All genes of a row `[R]` that ends with 1, as the rules take them; it may be traced."""
        K, found = self.checkpoints, dict[str, Any](self.choices)
        # Times 1, which the compiler does not know. Of a constant it would see that it is no NaN,
        # and fuse what `linear.product` keeps apart.
        one = jax.lax.stop_gradient(jnp.asarray(row[-1], jnp.float32))
        for name, gene in self.fixed:
            if name not in found:
                found[name] = one * jnp.asarray(gene, jnp.float32)
        if self.weighted:
            found["weight"] = row[:K]
        for place, gene in enumerate(self.genes, start=K):
            number = row[place]
            found[gene.name] = jnp.broadcast_to(number, (K,)) if gene.per_checkpoint else number
        for name in self.own:
            found[name] = jnp.stack([found.pop(own_name(name, k)) for k in range(K)])
        return found


def own_name(gene: str, checkpoint: int) -> str:
    """What the number that a checkpoint has of a gene is called: `density[0]` of the first."""
    return f"{gene}[{checkpoint}]"


def summed(method: str, choices: Mapping[str, Any]) -> bool:
    """Whether a method's merge is a weighted sum, with the same coefficients for all of a tensor.

    Args:
        method: a name in `METHODS`.
        choices: its genes that choose, where they are not at their defaults.
    """
    return METHODS[method].kind == "combination" and vector_axis(choices, 2) is None


def check_differentiable(method: str, where: str) -> None:
    """Raises `JaxmergeError` unless merges by a method have derivatives by its numbers.

    Args:
        method: a name in `METHODS`.
        where: the field that asks for them.
    """
    if METHODS[method].kind == "mask":
        raise JaxmergeError(
            f"{method} cuts off at thresholds or draws at random, which has no derivatives",
            where=where,
            expected='a strategy of evosax, such as "CMA_ES" or "SNES"; or a merge.method that is '
            "a weighted sum, such as task_arithmetic",
        )


def check(method: str, genes: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """Refuses what a search over another method than the weighted sum does not go with.

    Args:
        method: a name in `METHODS`.
        genes: those that are given.
        fields: of a config, by their full names.

    Raises:
        JaxmergeError: names the field.
    """
    for where in ("search.strategy", "search.warm_start"):
        if fields[where] == "gradient":
            check_differentiable(method, where)
    places = ("device", "host", "disk", "auto") if summed(method, genes) else ("device",)
    with_base = METHODS[method].base != "required" or fields["pool.base"] != ""
    for where, right, expected in (
        ("pool.base", with_base, "the checkpoint that the others were made from"),
        ("analyses.pool_sizes", not fields["analyses.pool_sizes"], "()"),
        ("pool.storage", fields["pool.storage"] == "exact", '"exact"'),
        ("pool.residency", fields["pool.residency"] in places, '"device"'),
        ("merge.rematerialise", not fields["merge.rematerialise"], "False"),
    ):
        if not right:
            raise JaxmergeError(
                f"a search over {method} does not go with this",
                where=where,
                expected=expected,
                found=str(fields[where]),
            )


def searched(
    method: str,
    fixed: Mapping[str, Any],
    checkpoints: int,
    *,
    with_base: bool,
    variant: Literal["paper", "mergekit"] = "paper",
    seed: int = 0,
    own: Sequence[str] = (),
) -> Searched:
    """What a search over a method sets: the weights, and every number that is not given.

    Choices and tolerances stay at their defaults unless they are given.

    Args:
        method: a name in `METHODS`.
        fixed: genes that are given.
        checkpoints: K, without the base.
        with_base: whether there is a base.
        variant: see `methods.merge_tensor`; `seed` too.
        own: names of genes that each checkpoint is to have a number of its own of.

    Raises:
        JaxmergeError: the method takes other checkpoints or genes, or nothing is left to search.
    """
    check_inputs(method, checkpoints, with_base=with_base)
    if "weight" in fixed:
        raise JaxmergeError(
            "weights are what is searched",
            where="merge.genes.weight",
            expected="no weights; or --mode=merge with merge.weights",
        )
    table = METHODS[method].genes
    open_genes = tuple(gene for gene in table if gene.searched and gene.name not in fixed)
    check_own(own, [gene.name for gene in open_genes if gene.per_checkpoint])
    # The middle of the range stands for what has no default, to have the rest checked.
    stand_ins = {gene.name: (gene.low + gene.high) / 2 for gene in table if gene.default is None}
    numbers, choices = complete(method, {**stand_ins, **fixed}, checkpoints)
    open_names = {"weight", *(gene.name for gene in open_genes)}
    rest = {name: _plain(name, x) for name, x in numbers.items() if name not in open_names}
    kept = tuple({**rest, **choices}.items())
    columns = tuple(
        each
        for gene in open_genes
        for each in (_of_each(gene, checkpoints) if gene.name in own else (gene,))
    )
    found = Searched(method, checkpoints, with_base, columns, kept, variant, seed, tuple(own))
    if not found.numbers:
        raise JaxmergeError(
            f"nothing of {method} is left to search",
            where="merge.genes" if fixed else "merge.method",
            expected="a number that is not given in merge.genes, or another merge.method; "
            "--mode=merge makes the one merge that there is",
            found=", ".join(f"{name} = {gene}" for name, gene in fixed.items()),
        )
    return found


def check_own(own: Sequence[str], possible: Sequence[str]) -> None:
    """Raises `JaxmergeError` unless checkpoints can have numbers of their own of all these."""
    for name in own:
        if name not in possible:
            raise JaxmergeError(
                "not a number that is searched, and that each checkpoint can have its own of",
                where="space.per_checkpoint",
                expected=", ".join(possible) or "()",
                found=name,
            )


def _of_each(gene: Gene, checkpoints: int) -> list[Gene]:
    names = [own_name(gene.name, k) for k in range(checkpoints)]
    return [dataclasses.replace(gene, name=name, per_checkpoint=False) for name in names]


def _plain(name: str, gene: Any) -> float | tuple[float, ...]:
    values = np.asarray(gene).tolist()
    check_finite(f"merge.genes.{name}", np.ravel(values).tolist())
    return tuple(values) if isinstance(values, list) else values
