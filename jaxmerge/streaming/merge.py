"""Merges of Hugging Face directories with given weights, from file to file.

What exists in memory at a time is a few blocks, whatever the size of the models, the number of
checkpoints or that of the merges. All merges are made in one pass over the checkpoints.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxmerge.checkpoints import huggingface
from jaxmerge.checkpoints.digest import LeafDigest
from jaxmerge.checkpoints.huggingface import WeightsFile
from jaxmerge.checkpoints.pool import Record, check_values, record
from jaxmerge.checkpoints.rows import values_of
from jaxmerge.checkpoints.safetensors import OpenFiles
from jaxmerge.checkpoints.source import Source
from jaxmerge.checkpoints.unchanged import Unchanged
from jaxmerge.errors import JaxmergeError, way_out
from jaxmerge.rundir import RunDirectory
from jaxmerge.streaming.block import Kind, kinds
from jaxmerge.streaming.files import Writing
from jaxmerge.streaming.finished import Finished, damaged
from jaxmerge.streaming.pipeline import Part, Pipeline
from jaxmerge.trees import named_leaves


class Output(NamedTuple):
    """A merge to be made: a directory, and one weight per checkpoint."""

    path: Path
    weights: tuple[float, ...]


class Plan(NamedTuple):
    """What is to be read and written."""

    sources: tuple[Source, ...]
    kinds: dict[str, Kind]
    files: list[WeightsFile]

    def bytes_read(self) -> int:
        """Bytes of all checkpoints, in the dtypes that they are merged from."""
        return sum(
            tensor.size * sum(dtype.itemsize for dtype in self.kinds[name].stored)
            for file in self.files
            for name, tensor in file.tensors.items()
        )


def plan(
    sources: Sequence[Source],
    *,
    merged_dtype: str = "",
    dtype: str = "",
    shard_bytes: int = 5 * 10**9,
) -> Plan:
    """Lays out the files of the merges, from what is known of the checkpoints.

    Args:
        sources: Hugging Face directories, from `survey.survey` with `by_tensor`.
        merged_dtype: cast floating-point values to this before they are merged; "": as stored.
        dtype: of the floating-point tensors that are written; "": that in which they are merged.
        shard_bytes: see `huggingface.save`.
    """
    leaves = [named_leaves(source.abstract) for source in sources]
    stored = [[each[name].dtype for each in leaves] for name in leaves[0]]
    of_tensor = dict(zip(leaves[0], kinds(stored, merged_dtype, dtype)))
    written = {
        name: jax.ShapeDtypeStruct(leaf.shape, of_tensor[name].written)
        for name, leaf in leaves[0].items()
    }
    wide = {
        name: tensor.dtype
        for name, tensor in sources[0].tensors.items()
        if tensor.dtype.itemsize == 8
    }
    return Plan(tuple(sources), of_tensor, huggingface.split(written, shard_bytes, wide))


def merge(
    plan: Plan,
    outputs: Sequence[Output],
    run: RunDirectory,
    *,
    like: str,
    tokenizer: str = "",
    card: Callable[[Sequence[Record], Output], str],
    memory_bytes: int,
    progress: Callable[[int], object] = lambda count: None,
) -> tuple[Record, ...]:
    """Writes the merges; a directory appears whole or not at all.

    What an earlier call wrote before it was stopped is checked and kept, file by file.

    Args:
        plan: from `plan`.
        outputs: the merges.
        run: where it is recorded which files are finished, and with which checksums.
        like: Hugging Face directory with the config, tokenizer and chat template to copy.
        tokenizer: directory of another tokenizer and chat template; "": those of `like`.
        card: the README.md of a merge.
        memory_bytes: see `Pipeline`.
        progress: called with bytes of checkpoints that have been merged since.

    Returns:
        What `pool.json` says of the checkpoints.

    Raises:
        JaxmergeError: a file can't be read or written; a value is NaN or infinite; a tensor that
            can't be averaged differs; a merge that is there is not what was written, or was made of
            other files.
    """
    tensors = [source.tensors for source in plan.sources]
    beside = [source.rows.beside for source in plan.sources if source.rows][:1]
    read = [[tensor.file for tensor in of.values()] for of in (*tensors, *beside)]
    finished = Finished(run, read, [output.path for output in outputs])
    for output in outputs:
        if output.path.exists():
            finished.check_inputs(output.path)
    paths = [source.path for source in plan.sources]
    unchanged = Unchanged((each.file for of in tensors for each in of.values()), ", ".join(paths))
    files = OpenFiles()
    reads = [values_of(source, files.read_into) for source in plan.sources]
    pipeline = Pipeline(reads, paths, memory_bytes=memory_bytes, progress=progress)
    try:
        for file in plan.files:
            _merge_file(plan, file, outputs, pipeline, finished)
        unchanged.check()
        records = _records(plan, finished)
        for output in outputs:
            if not output.path.exists():
                text = functools.partial(card, records, output)
                huggingface.publish(_place(output), output.path, plan.files, like, text, tokenizer)
    except OSError as error:
        raise JaxmergeError(
            "the merge can't be written",
            where=str(outputs[0].path.parent),
            expected=way_out(error),
            found=error.strerror or str(error),
        ) from error
    finally:
        files.close()
    return records


def _merge_file(
    plan: Plan,
    file: WeightsFile,
    outputs: Sequence[Output],
    pipeline: Pipeline,
    finished: Finished,
) -> None:
    """Writes one file of all merges that have not got it."""
    sound = [finished.is_sound(file, i, _place(output)) for i, output in enumerate(outputs)]
    parts = [Part(name, leaf.shape, plan.kinds[name]) for name, leaf in file.tensors.items()]
    if all(sound):
        pipeline.progress(sum(part.bytes_read() for part in parts))
        return
    wanted = [i for i, output in enumerate(outputs) if not output.path.exists()]
    for i in {*range(len(outputs))} - {*wanted}:
        if not sound[i]:
            raise damaged(outputs[i].path / file.name)
    weights_PxK = np.array([outputs[i].weights for i in wanted], np.float32)
    with Writing([_place(outputs[i]) for i in wanted], file) as writing:
        digests = pipeline.merge(parts, weights_PxK, writing.write)
    checksums = [
        {name: rows[row].checksum for name, rows in digests.items()}
        for row in range(len(plan.sources) + len(wanted))
    ]
    of_inputs, of_outputs = checksums[: len(plan.sources)], checksums[len(plan.sources) :]
    _check_values(plan, file, digests)
    finished.add(file, of_inputs, dict(zip(wanted, of_outputs)))


def _place(output: Output) -> Path:
    """Where a merge is, or grows until it is whole."""
    partial = output.path.with_name(f".{output.path.name}.partial")
    return output.path if output.path.exists() else partial


def _check_values(
    plan: Plan, file: WeightsFile, digests: Mapping[str, Sequence[LeafDigest]]
) -> None:
    first = {name: rows[0] for name, rows in digests.items()}
    for k, source in enumerate(plan.sources):
        leaves = named_leaves(source.abstract)
        stored = {name: leaves[name] for name in file.tensors}
        check_values(source, stored, {name: rows[k] for name, rows in digests.items()}, first)


def _records(plan: Plan, finished: Finished) -> tuple[Record, ...]:
    """What `pool.json` says, from the checksums of all files."""
    records = []
    for k, source in enumerate(plan.sources):
        checksums = {
            name: LeafDigest(checksum, True)
            for file in plan.files
            for name, checksum in finished.inputs(file)[k].items()
        }
        records.append(record(source, source.abstract, checksums))
    return tuple(records)
