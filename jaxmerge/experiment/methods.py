"""Merges by any method of the table: a tensor of every checkpoint at a time, and the base's.

Thresholds, norms and angles are of a whole tensor, so blocks of a tensor would not do. Memory holds
the largest tensor of every checkpoint, its base and its merge; `merge.methods` says which methods
take more.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxmerge.checkpoints import huggingface
from jaxmerge.checkpoints.export import export
from jaxmerge.checkpoints.pool import Record
from jaxmerge.checkpoints.rows import resized
from jaxmerge.checkpoints.source import Source
from jaxmerge.checkpoints.stream import LeafStream
from jaxmerge.config import Config
from jaxmerge.errors import JaxmergeError
from jaxmerge.experiment.sources import (
    huggingface_directory,
    like_by_tensor,
    rows_of,
    tokenizer_directory,
)
from jaxmerge.merge.methods import METHODS, check_inputs, complete, merge_tensor
from jaxmerge.trees import named_leaves


def takes_weights(method: str) -> bool:
    """Whether checkpoints have weights, rather than all the same say."""
    return any(gene.name == "weight" for gene in METHODS[method].genes)


def takes_base(config: Config) -> bool:
    """Whether `pool.base` goes into the merge, and not only its tokenizer and configuration."""
    base = METHODS[config.merge.method].base
    return base == "required" or (base == "optional" and bool(config.pool.base))


def check(config: Config, weights: Sequence[float], checkpoints: int) -> None:
    """Refuses what a method does not take, before anything is read.

    Args:
        config: of the run.
        weights: of a merge; (): it has none.
        checkpoints: how many there are, the base not among them.

    Raises:
        JaxmergeError: names the field.
    """
    method = config.merge.method
    check_inputs(method, checkpoints, with_base=takes_base(config) and bool(config.pool.base))
    numbers, _ = complete(method, _genes(config, weights), checkpoints)
    for name, values in numbers.items():
        if not all(map(math.isfinite, values.ravel().tolist())):
            raise JaxmergeError(
                "this is not finite", where=f"merge.genes.{name}", found=str(values.tolist())
            )


def merge(
    config: Config,
    path: Path,
    sources: Sequence[Source],
    weights: Sequence[float],
    *,
    by_tensor: bool,
    card: Callable[[Sequence[Record]], str],
) -> tuple[list[Path], tuple[Record, ...]]:
    """Writes one merge.

    Args:
        config: of the run.
        path: the directory `merged`, which gets a directory for each format.
        sources: the checkpoints, and after them the base where the method takes one.
        weights: of the checkpoints; (): the method has none.
        by_tensor: whether leaves are the tensors of Hugging Face directories.
        card: text of the README.md, from what `pool.json` says of the sources.

    Returns:
        The checkpoints that were written, and what `pool.json` says.
    """
    leaves = LeafStream(sources, jax.devices()[0], dtype=config.pool.dtype)
    layers = 0 if by_tensor else int(sources[0].architecture.get("layers") or 0)
    leaf = functools.partial(_leaf, config, weights, leaves, layers)

    def text() -> str:
        return card(leaves.records())

    like = huggingface_directory(config, sources)
    options = {name: config.export[name] for name in ("dtype", "shard_bytes")}
    options |= {"like": like, "tokenizer": tokenizer_directory(config, sources), "card": text}
    written = [path / "huggingface"]
    if not by_tensor:
        written = export(
            path,
            leaves.abstract,
            leaf,
            source=sources[0],
            formats=tuple(config.export.formats),
            architecture=sources[0].architecture,
            rope_type=config.pool.rope_type,
            **options,
        )
    elif not written[0].exists():
        stored = huggingface.layout(like_by_tensor(config, sources), by_tensor=True)
        layout = resized(stored, rows_of(sources))
        huggingface.save(written[0], layout, leaf, abstract=leaves.abstract, **options)
    if not leaves.read:  # the merge was there: the checkpoints are compared with what it says
        for name in named_leaves(leaves.abstract):
            leaves(name)
    return written, leaves.records()


def described(config: Config) -> str:
    """The method and its genes, as a card says them."""
    genes = ", ".join(f"{name} {value}" for name, value in sorted(dict(config.merge.genes).items()))
    named = f"`{config.merge.method}` ({METHODS[config.merge.method].paper})"
    variant = ", in mergekit's variant" if config.merge.variant == "mergekit" else ""
    return f"by {named}{variant}" + (f", with {genes}" if genes else "")


def _genes(config: Config, weights: Sequence[float]) -> dict[str, Any]:
    genes: Mapping[str, Any] = dict(config.merge.genes)
    if "weight" in genes:
        raise JaxmergeError(
            "weights have a field of their own",
            where="merge.genes.weight",
            expected="merge.weights",
        )
    return {**genes, "weight": tuple(weights)} if weights else dict(genes)


def _leaf(
    config: Config, weights: Sequence[float], leaves: LeafStream, layers: int, name: str
) -> jax.Array:
    tensors = leaves(name)
    if not jnp.issubdtype(tensors[0].dtype, jnp.floating):
        return tensors[0]
    if layers and name.startswith("layers/"):
        each = [
            _merged(config, weights, [tensor[layer] for tensor in tensors], f"{name}/{layer}")
            for layer in range(layers)
        ]
        return jnp.stack(each)
    return _merged(config, weights, tensors, name)


def _merged(
    config: Config, weights: Sequence[float], tensors: Sequence[jax.Array], name: str
) -> jax.Array:
    *members, last = tensors
    with_base = takes_base(config)
    return merge_tensor(
        config.merge.method,
        members if with_base else tensors,
        last if with_base else None,
        _genes(config, weights),
        name=name,
        seed=config.seed,
        variant=config.merge.variant,
    )
