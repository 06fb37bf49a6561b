"""Merged leaves on disk, until the checkpoint that they go into is written.

Orbax checkpoints, and those of JAX trainers, are written whole. So their leaves are merged into
files first, as tensors are between Hugging Face directories: a merge that was stopped keeps those
that it has finished.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxmerge.checkpoints import huggingface
from jaxmerge.checkpoints.digest import digests
from jaxmerge.checkpoints.huggingface import WeightsFile
from jaxmerge.checkpoints.safetensors import DTYPES, read_into
from jaxmerge.checkpoints.source import Source
from jaxmerge.checkpoints.stream import LeafStream
from jaxmerge.checkpoints.unchanged import Unchanged, files_of
from jaxmerge.errors import at
from jaxmerge.rundir import RunDirectory
from jaxmerge.streaming.files import Writing
from jaxmerge.streaming.finished import Finished

_FILE = 2**28  # bytes of a file at most, unless a leaf has more: what is lost where it stops

Merged = Callable[[str], jax.Array]  # a merged leaf, by its name


def keep(
    merge: Merged,
    stream: LeafStream,
    like: Mapping[str, jax.ShapeDtypeStruct],
    sources: Sequence[Source],
    place: Path,
    run: RunDirectory,
    *,
    record: str,
    shard_bytes: int = _FILE,
) -> Merged:
    """Merges all leaves that are not there yet.

    Args:
        merge: makes a leaf, of what it has the stream read.
        stream: is told of what an earlier call had read.
        like: the merged leaves; those that are not floating point are left to `merge`.
        sources: what the stream reads.
        place: the directory of the files.
        run: where it is recorded which files are finished, and with which checksums.
        record: file there.
        shard_bytes: see `_FILE`; less is taken, not more.

    Returns:
        What reads a leaf back.

    Raises:
        JaxmergeError: a file can't be read or written, or was written to meanwhile; and what
            `merge` raises.
    """
    kept = {name: leaf for name, leaf in like.items() if _fits(leaf.dtype)}
    files = huggingface.split(kept, min(shard_bytes, _FILE))
    read_from = [_files(source) for source in sources]
    finished = Finished(run, read_from, [place], record)
    where = ", ".join(source.path for source in sources)
    unchanged = Unchanged((file for files in read_from for file in files), where)
    with at(place):
        for file in files:
            if not finished.is_sound(file, 0, place):
                _write(file, place, merge, stream, finished)
            stream.known(finished.inputs(file))
    unchanged.check()
    file_of = {name: file for file in files for name in file.tensors}

    def leaf(name: str) -> jax.Array:
        return _read(file_of[name], place, name) if name in file_of else merge(name)

    return leaf


def _fits(dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and np.dtype(dtype) in DTYPES.values()


def _files(source: Source) -> list[str]:
    """What shows that a checkpoint is still the one that it was."""
    found: list[str] = []
    for path in filter(None, (source.path, source.base)):
        of_address = epath.Path(path).iterdir() if "://" in path else ()
        found += files_of(path) + [str(each) for each in of_address if each.is_file()]
    beside = source.rows.beside.values() if source.rows else ()
    return [*found, *(tensor.file for tensor in beside)]


def _write(
    file: WeightsFile, place: Path, merge: Merged, stream: LeafStream, finished: Finished
) -> None:
    outputs = {}
    with Writing([place], file) as writing:
        for name in file.tensors:
            value = merge(name)
            writing.write(0, name, 0, np.asarray(value).reshape(-1))
            outputs[name] = digests({name: value})[name].checksum
    finished.add(file, stream.checksums(file.tensors), {0: outputs})


def _read(file: WeightsFile, place: Path, name: str) -> jax.Array:
    tensor = file.tensors[name]
    values = np.empty(tensor.shape, tensor.dtype)
    read_into(str(place / file.name), file.starts[name], values.reshape(-1))
    return jnp.asarray(values)
