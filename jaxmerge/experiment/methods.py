"""Merges by any method of the table, and searches over them, as a config says.

A merge with given numbers takes a tensor of every checkpoint at a time, and the base's.

Thresholds, norms and angles are of a whole tensor, so blocks of a tensor would not do. Memory holds
the largest tensor of every checkpoint, its base and its merge; `merge.methods` says which methods
take more.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxmerge.checkpoints.export import export, lacking
from jaxmerge.checkpoints.pool import Record
from jaxmerge.checkpoints.rows import values_of
from jaxmerge.checkpoints.safetensors import Tensor
from jaxmerge.checkpoints.source import Source
from jaxmerge.checkpoints.stream import LeafStream
from jaxmerge.config import Config
from jaxmerge.errors import JaxmergeError, check_finite
from jaxmerge.experiment import given as given_numbers
from jaxmerge.experiment.given import Given
from jaxmerge.experiment.sources import huggingface_directory, tokenizer_directory
from jaxmerge.merge.methods import METHODS, check_inputs, complete, merge_tensor
from jaxmerge.merge.searched import Searched, check_own
from jaxmerge.merge.searched import searched as find_searched
from jaxmerge.rundir import RunDirectory
from jaxmerge.search import space
from jaxmerge.streaming import recipes
from jaxmerge.streaming.leaves import keep
from jaxmerge.trees import named_leaves


def takes_weights(method: str) -> bool:
    """Whether checkpoints have weights, rather than all the same say."""
    return any(gene.name == "weight" for gene in METHODS[method].genes)


def takes_base(config: Config) -> bool:
    """Whether `pool.base` goes into the merge, and not only its tokenizer and configuration."""
    base = METHODS[config.merge.method].base
    return base == "required" or (base == "optional" and bool(config.pool.base))


def searched(config: Config, checkpoints: int) -> Searched | None:
    """What a search sets of `merge.method`; None: weights alone, of weighted sums.

    Args:
        config: of the run.
        checkpoints: K, without the base.

    Raises:
        JaxmergeError: names the field.
    """
    merge, own = config.merge, tuple(config.space.per_checkpoint)
    if merge.method == "linear":
        check_own(own, ())
        return None
    return find_searched(
        merge.method,
        dict(merge.genes),
        checkpoints,
        with_base=takes_base(config) and bool(config.pool.base),
        variant=merge.variant,
        seed=config.seed,
        own=own,
    )


def ranges(of: Searched) -> list[space.Range]:
    """Where a search looks for a method's numbers; what has no default starts in the middle."""
    return [
        space.Range(
            (gene.low + gene.high) / 2 if gene.default is None else gene.default,
            gene.low,
            gene.high,
        )
        for gene in of.genes
    ]


def check(config: Config, given: Given, checkpoints: int) -> None:
    """Refuses what a method does not take, before anything is read.

    Args:
        config: of the run.
        given: numbers of a merge.
        checkpoints: how many there are, the base not among them.

    Raises:
        JaxmergeError: names the field.
    """
    method = config.merge.method
    check_inputs(method, checkpoints, with_base=takes_base(config) and bool(config.pool.base))
    weights, genes = given.first
    numbers, _ = complete(method, _genes(config, weights, genes), checkpoints)
    for name, values in numbers.items():
        check_finite(f"merge.genes.{name}", values.ravel().tolist())


def merge(
    config: Config,
    path: Path,
    sources: Sequence[Source],
    given: Given,
    run: RunDirectory,
    *,
    record: str,
    card: Callable[[Sequence[Record]], str],
) -> tuple[list[Path], tuple[Record, ...]]:
    """Writes one merge, leaf by leaf of the decoder, or of Orbax checkpoints as they are stored.

    It goes on where it stopped: merged leaves are kept on disk until all formats are there.

    Args:
        config: of the run.
        path: the directory `merged`, which gets a directory for each format.
        sources: the checkpoints, and after them the base where the method takes one.
        given: numbers of the merge.
        run: its run directory.
        record: file there that says which leaves are finished.
        card: text of the README.md, from what `pool.json` says of the sources.

    Returns:
        The checkpoints that were written, and what `pool.json` says.
    """
    leaves = LeafStream(sources, jax.devices()[0], dtype=config.pool.dtype)
    layers = int(sources[0].architecture.get("layers") or 0)
    # What is merged has the dtype of the base, where there is one.
    first = named_leaves(sources[-1 if takes_base(config) else 0].abstract)
    kept = path.with_name(f".{path.name}.partial")
    like = {name: jax.ShapeDtypeStruct(x.shape, leaves.cast_to(x)) for name, x in first.items()}
    merged = functools.partial(_leaf, config, given, leaves, layers)
    if lacking(path, config.export.formats):
        merged = keep(
            merged,
            leaves,
            like,
            sources,
            kept,
            run,
            record=record,
            shard_bytes=config.export.shard_bytes,
        )
    written = export(
        path,
        leaves.abstract,
        merged,
        source=sources[0],
        formats=tuple(config.export.formats),
        architecture=sources[0].architecture,
        rope_type=config.pool.rope_type,
        dtype=config.export.dtype,
        shard_bytes=config.export.shard_bytes,
        like=huggingface_directory(config, sources),
        tokenizer=tokenizer_directory(config, sources),
        card=lambda: card(leaves.records()),
    )
    if not leaves.read:  # the merge was there: the checkpoints are compared with what it says
        for name in named_leaves(leaves.abstract):
            leaves(name)
    shutil.rmtree(kept, ignore_errors=True)
    return written, leaves.records()


def merge_files(
    config: Config,
    path: Path,
    sources: Sequence[Source],
    given: Given,
    run: RunDirectory,
    *,
    record: str,
    card: Callable[[Sequence[Record]], str],
) -> tuple[Record, ...]:
    """Writes one merge of Hugging Face directories, tensor by tensor; goes on where it stopped.

    Args:
        config: of the run.
        path: the directory to make.
        sources: see `merge`; `card` too.
        given: numbers of the merge, without groups.
        run: its run directory.
        record: file there that says which files are finished.

    Returns:
        What `pool.json` says.
    """
    models = [
        recipes.Model(
            source.name,
            source.path,
            named_leaves(source.abstract),
            values_of(source),
            {**source.tensors, **_beside(source, first=source is sources[0])},
        )
        for source in sources
    ]
    last = len(models) - 1
    with_base = takes_base(config)
    of_tensors = {}
    for name, leaf in models[0].tensors.items():
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        merged = jnp.dtype(config.pool.dtype or leaf.dtype) if floating else leaf.dtype
        of_tensors[name] = recipes.Recipe(
            config.merge.method,
            tuple(recipes.Read(k, name) for k in range(len(models))),
            tuple(range(len(models) - with_base)),
            last if with_base else None,
            _genes(config, *given.first),
            leaf.shape,
            merged,
            jnp.dtype(config.export.dtype or merged) if floating else merged,
        )
    output = recipes.Output(
        path,
        huggingface_directory(config, sources),
        lambda new: None,
        card,
        tokenizer_directory(config, sources),
        record,
    )
    total = recipes.bytes_read(of_tensors, models)
    with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:
        return recipes.write(
            of_tensors,
            models,
            output,
            run,
            seed=given.seed,
            variant=config.merge.variant,
            shard_bytes=config.export.shard_bytes,
            progress=bar.update,
        )


def _beside(source: Source, *, first: bool) -> dict[str, Tensor]:
    """Tensors of a base that is no member and lends rows; they are told apart by their names."""
    lent = source.rows.beside if source.rows and first else {}
    return {f"base/{name}": tensor for name, tensor in lent.items()}


def findings(of: Searched | None) -> dict[str, Any]:
    """What results.json says of the method of a search; {}: it is over weighted sums."""
    if of is None:
        return {}
    fixed = {name: list(gene) if isinstance(gene, tuple) else gene for name, gene in of.fixed}
    method = {
        "name": of.method,
        "paper": METHODS[of.method].paper,
        "variant": of.variant,
        "weighted": of.weighted,
        "searched": [gene.name for gene in of.genes],
        "fixed": fixed,
        "seed": of.seed,
    }
    return {"method": method}


def described(config: Config, given: Given) -> str:
    """The method and its genes, as a card says them."""
    _, of_first = given.first
    said = dict(sorted(of_first.items()))
    genes = ", ".join(f"{name} {value}" for name, value in said.items())
    genes += " in the first group of leaves; others have their own" if given.groups else ""
    named = f"`{config.merge.method}` ({METHODS[config.merge.method].paper})"
    variant = ", in mergekit's variant" if config.merge.variant == "mergekit" else ""
    numbers = f", with {genes}" if genes else ""
    window = given_numbers.window(config).rstrip(".")
    return f"by {named}{variant}{numbers}" + (f". {window}" if window else "")


def _genes(config: Config, weights: Any, genes: Mapping[str, Any]) -> dict[str, Any]:
    if "weight" in genes:
        raise JaxmergeError(
            "weights have a field of their own",
            where="merge.genes.weight",
            expected="merge.weights",
        )
    if not takes_weights(config.merge.method):
        return dict(genes)
    return {**genes, "weight": tuple(np.asarray(weights).tolist())}


def _leaf(config: Config, given: Given, leaves: LeafStream, layers: int, name: str) -> jax.Array:
    tensors = leaves(name)
    if not jnp.issubdtype(tensors[0].dtype, jnp.floating):
        return tensors[0]
    if layers and name.startswith("layers/"):
        each = [
            _merged(config, given, [tensor[layer] for tensor in tensors], name, layer)
            for layer in range(layers)
        ]
        return jnp.stack(each)
    return _merged(config, given, tensors, name)


def _merged(
    config: Config,
    given: Given,
    tensors: Sequence[jax.Array],
    name: str,
    layer: int | None = None,
) -> jax.Array:
    *members, last = tensors
    with_base = takes_base(config)
    return merge_tensor(
        config.merge.method,
        members if with_base else tensors,
        last if with_base else None,
        _genes(config, *given.of(name, layer or 0)),
        name=name if layer is None else f"{name}/{layer}",
        seed=given.seed,
        variant=config.merge.variant,
    )
