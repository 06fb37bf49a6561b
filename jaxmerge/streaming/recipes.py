"""Merges from file to file in which each tensor is made in a way of its own, a tensor at a time.

What is in memory is one tensor of each model that it is made of; of small tensors, several at a
time are read, merged and written.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxmerge.checkpoints import digest, huggingface
from jaxmerge.checkpoints.digest import LeafDigest
from jaxmerge.checkpoints.huggingface import WeightsFile
from jaxmerge.checkpoints.leaves import Values
from jaxmerge.checkpoints.pool import Record
from jaxmerge.checkpoints.safetensors import Tensor
from jaxmerge.checkpoints.unchanged import Unchanged
from jaxmerge.errors import JaxmergeError, way_out
from jaxmerge.merge.combinations import Variant
from jaxmerge.merge.methods import merge_tensor
from jaxmerge.rundir import RunDirectory
from jaxmerge.streaming import ahead
from jaxmerge.streaming.block import pages
from jaxmerge.streaming.files import Writing
from jaxmerge.streaming.finished import NAME, Finished, damaged
from jaxmerge.streaming.pipeline import WORKERS
from jaxmerge.trees import byte_count, parameter_count

_MEMORY = 2**30  # bytes that tensors that are worked on at a time take, unless one takes more
# Makes matrices of other rows out of those that were read, one for one.
Align = Callable[[Sequence[np.ndarray]], Sequence[np.ndarray]]


class Model(NamedTuple):
    """A model that tensors are read from.

    Attributes:
        name: for people.
        source: where it is.
        tensors: by name, with the dtype that they are read in.
        values: reads them, see `checkpoints.leaves.Values`.
        files: where it all lies; what shows that a model is still the one that it was.
    """

    name: str
    source: str
    tensors: Mapping[str, jax.ShapeDtypeStruct]
    values: Values
    files: Mapping[str, Tensor]


class Read(NamedTuple):
    """A tensor of one of the models."""

    model: int
    tensor: str


class Recipe(NamedTuple):
    """How a tensor is made.

    Attributes:
        method: see `merge.methods.merge_tensor`.
        reads: what it is made of.
        inputs: which of the reads are merged, in this order.
        base: which of them is the base; None: there is none.
        genes: the method's numbers.
        shape: of the result.
        merged: dtype that floating-point values are cast to first.
        written: dtype of the result.
        align: called with all that was read and cast, for matrices of the same rows; None: they
            are merged as they are.
    """

    method: str
    reads: tuple[Read, ...]
    inputs: tuple[int, ...]
    base: int | None
    genes: Mapping[str, Any]
    shape: tuple[int, ...]
    merged: np.dtype
    written: np.dtype
    align: Align | None = None


class Output(NamedTuple):
    """A directory to be made.

    Attributes:
        path: of the directory.
        like: Hugging Face directory that config, tokenizer and licence are copied from.
        rest: called with the directory before it has its name, to add and change what is not a
            tensor.
        card: the text of README.md.
        tokenizer: directory of another tokenizer and chat template; "": those of `like`.
        record: file of the run directory that says which files are finished.
    """

    path: Path
    like: str
    rest: Callable[[Path], None]
    card: Callable[[Sequence[Record]], str]
    tokenizer: str = ""
    record: str = NAME


def write(
    recipes: Mapping[str, Recipe],
    models: Sequence[Model],
    output: Output,
    run: RunDirectory,
    *,
    seed: int = 0,
    variant: Variant = "mergekit",
    shard_bytes: int = 5 * 10**9,
    progress: Callable[[int], object] = lambda count: None,
) -> tuple[Record, ...]:
    """Writes a merge; its directory appears whole or not at all.

    What an earlier call wrote before it was stopped is checked and kept, file by file.

    Args:
        recipes: by the name of the tensor.
        models: that they read.
        output: where it goes.
        run: where it is recorded which files are finished, and with which checksums.
        seed: of methods that draw.
        variant: see `merge.methods.merge_tensor`.
        shard_bytes: no file holds more, unless a single tensor does.
        progress: called with bytes that have been read and merged since.

    Returns:
        What `pool.json` says of the models: the sizes and fingerprints of what was read of them.

    Raises:
        JaxmergeError: a file can't be read or written; a value is NaN or infinite; the merge that
            is there is not what was written, or was made of other files.
    """
    files = _files(recipes, models, shard_bytes)
    read = [[tensor.file for tensor in model.files.values()] for model in models]
    finished = Finished(run, read, [output.path], output.record)
    if output.path.exists():
        finished.check_inputs(output.path)
    where = ", ".join(model.source for model in models)
    unchanged = Unchanged((file for files in read for file in files), where)
    place = output.path.with_name(f".{output.path.name}.partial")
    try:
        for file in files:
            there = output.path if output.path.exists() else place
            if finished.is_sound(file, 0, there):
                progress(sum(_bytes_read(recipes[name], models) for name in file.tensors))
            elif output.path.exists():
                raise damaged(output.path / file.name)
            else:
                make = functools.partial(_made, models, seed, variant)
                _write_file(file, place, recipes, models, finished, make, progress)
        unchanged.check()
        records = _records(files, models, finished)
        if not output.path.exists():
            text = functools.partial(output.card, records)
            huggingface.publish(
                place, output.path, files, output.like, text, output.tokenizer, output.rest
            )
    except OSError as error:
        raise JaxmergeError(
            "the merge can't be written",
            where=str(output.path),
            expected=way_out(error),
            found=error.strerror or str(error),
        ) from error
    return records


def _files(
    recipes: Mapping[str, Recipe], models: Sequence[Model], shard_bytes: int
) -> list[WeightsFile]:
    """What is written, file by file."""
    tensors = {
        name: jax.ShapeDtypeStruct(recipe.shape, recipe.written) for name, recipe in recipes.items()
    }
    stored = {
        name: models[recipe.reads[0].model].files[recipe.reads[0].tensor].dtype
        for name, recipe in recipes.items()
    }
    wide = {name: dtype for name, dtype in stored.items() if dtype.itemsize == 8}
    return huggingface.split(tensors, shard_bytes, wide)


def bytes_read(recipes: Mapping[str, Recipe], models: Sequence[Model]) -> int:
    """Bytes that all recipes read."""
    return sum(_bytes_read(recipe, models) for recipe in recipes.values())


def _bytes_read(recipe: Recipe, models: Sequence[Model]) -> int:
    return sum(byte_count(models[read.model].tensors[read.tensor]) for read in recipe.reads)


class _Made(NamedTuple):
    """A tensor with its digest, and those of what it was made of."""

    value: Array
    digest: LeafDigest
    of_reads: list[LeafDigest]


class _Memory(threading.local):
    """Pages of a thread for one tensor after the other.

    New pages have to be faulted in, which takes several times as long as to read into them.

    Args:
        most: bytes of a tensor for which pages are kept.
    """

    def __init__(self, most: int):
        self._most, self._kept = most, dict[int, np.ndarray]()

    def take(self, number: int, size: int) -> np.ndarray:
        """Bytes for one of the reads of a tensor, whose number is `number`."""
        kept = self._kept.get(number)
        if kept is None or kept.size < size:
            kept = pages(max(size, 1))
            if size <= self._most:
                self._kept[number] = kept
        return kept[:size]


def _write_file(
    file: WeightsFile,
    place: Path,
    recipes: Mapping[str, Recipe],
    models: Sequence[Model],
    finished: Finished,
    make: Callable[[_Memory, str, Recipe], _Made],
    progress: Callable[[int], object],
) -> None:
    inputs: list[dict[str, str]] = [{} for _ in models]
    outputs = {}
    reads = max((len(recipes[name].reads) for name in file.tensors), default=1)
    memory = _Memory(_MEMORY // (2 * WORKERS * reads))
    with Writing([place], file) as writing:

        def written(name: str) -> tuple[LeafDigest, list[LeafDigest]]:
            made = make(memory, name, recipes[name])
            writing.write(0, name, 0, np.asarray(made.value).reshape(-1))
            return made.digest, made.of_reads

        def size(name: str) -> int:
            return 3 * _bytes_read(recipes[name], models) // 2  # with thresholds and the result

        for name, (output, of_reads) in ahead.done([*file.tensors], written, size, _MEMORY):
            outputs[name] = output.checksum
            for read, found in zip(recipes[name].reads, of_reads):
                inputs[read.model][read.tensor] = found.checksum
            progress(_bytes_read(recipes[name], models))
    finished.add(file, inputs, {0: outputs})


def _made(
    models: Sequence[Model], seed: int, variant: Variant, memory: _Memory, name: str, recipe: Recipe
) -> _Made:
    """Reads, casts, aligns and merges; the next call takes the memory of what was read."""
    leaves = [
        _read(models[each.model], each.tensor, functools.partial(memory.take, number))
        for number, each in enumerate(recipe.reads)
    ]
    digests = [digest.digests({"": leaf})[""] for leaf in leaves]
    for read, found in zip(recipe.reads, digests):
        if not found.finite:
            raise JaxmergeError(
                f"the checkpoint holds NaN or infinite values, in tensor {read.tensor}",
                where=models[read.model].source,
                expected="a checkpoint whose values are finite",
            )
    if not jnp.issubdtype(leaves[0].dtype, jnp.floating):
        return _Made(_the_same(name, recipe, digests, models, leaves), digests[0], digests)
    cast = [leaf.astype(recipe.merged) for leaf in leaves]
    if recipe.align:
        cast = [jnp.asarray(each) for each in recipe.align([np.asarray(leaf) for leaf in cast])]
    value = merge_tensor(
        recipe.method,
        [cast[i] for i in recipe.inputs],
        None if recipe.base is None else cast[recipe.base],
        recipe.genes,
        name=name,
        seed=seed,
        variant=variant,
    ).astype(recipe.written)
    found = digest.digests({"": value})[""]
    if not found.finite:
        raise JaxmergeError(
            f"tensor {name} comes out with NaN or infinite values in {recipe.written}",
            expected="bfloat16 or float32 as the dtype that is written, or other numbers",
        )
    return _Made(value, found, digests)


def _the_same(
    name: str,
    recipe: Recipe,
    digests: Sequence[LeafDigest],
    models: Sequence[Model],
    leaves: Sequence[Array],
) -> Array:
    """A tensor of whole numbers, which can't be merged: that of the models, if they agree."""
    for read, found in zip(recipe.reads, digests):
        if found.checksum != digests[0].checksum:
            raise JaxmergeError(
                f"tensor {name} is not floating point and differs, so it can't be merged",
                where=models[read.model].source,
                expected=f"the same values as in {models[recipe.reads[0].model].source}",
            )
    return leaves[0]


def _read(model: Model, tensor: str, take: Callable[[int], np.ndarray]) -> Array:
    shape = model.tensors[tensor]
    # In pages of its own, which JAX takes over instead of copying them.
    values = take(math.prod(shape.shape) * shape.dtype.itemsize).view(shape.dtype)
    model.values(tensor, 0, values)
    return jax.device_put(values.reshape(shape.shape))


def _records(
    files: Sequence[WeightsFile], models: Sequence[Model], finished: Finished
) -> tuple[Record, ...]:
    records = []
    for k, model in enumerate(models):
        known = {
            name: LeafDigest(checksum, True)
            for file in files
            for name, checksum in finished.inputs(file)[k].items()
        }
        tree = {name: model.tensors[name] for name in known}
        records.append(
            Record(
                name=model.name,
                source=model.source,
                format="huggingface",
                bytes=byte_count(tree),
                parameters=parameter_count(tree),
                dtype=",".join(sorted({str(leaf.dtype) for leaf in tree.values()})),
                fingerprint=digest.fingerprint(tree, known),
            )
        )
    return tuple(records)
