"""Which files of a merge are finished: what a merge that was stopped need not do again."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from jaxmerge.checkpoints import digest
from jaxmerge.checkpoints.huggingface import WeightsFile
from jaxmerge.checkpoints.safetensors import read_into
from jaxmerge.errors import JaxmergeError, as_written
from jaxmerge.rundir import RunDirectory

NAME = "merge.json"
_STEP = 2**20  # values that are read back at once

Checksums = Mapping[str, str]  # of tensors, by name


class Finished:
    """The record of finished files in the run directory, `merge.json`.

    It is written anew after each file, when the file is on disk.

    Args:
        directory: of the run.
        read: the files of each checkpoint; a record of others than these is not heeded.
        outputs: directories of the merges.
        name: of the record; several merges of a run may each have their own.
    """

    def __init__(
        self,
        directory: RunDirectory,
        read: Sequence[Iterable[str]],
        outputs: Sequence[Path],
        name: str = NAME,
    ):
        self._directory, self._name = directory, name
        run = directory.path.absolute()
        head = {
            "inputs": [_identity(each) for each in read],
            "outputs": [os.path.relpath(output.absolute(), run) for output in outputs],
        }
        known = directory.read_json(name) or {}
        self._inputs_before = known.get("inputs", head["inputs"])
        same = all(known.get(key) == value for key, value in head.items())
        with as_written(str(directory.path / name)):
            self._record: dict[str, Any] = {**head, "files": {**known["files"]} if same else {}}

    def add(
        self, file: WeightsFile, inputs: Sequence[Checksums], outputs: Mapping[int, Checksums]
    ) -> None:
        """Records that a file is on disk.

        Args:
            file: what was written.
            inputs: checksums of the tensors that it was made of, of each checkpoint.
            outputs: checksums of the tensors that were written, by the number of the merge.
        """
        known = self._record["files"].get(file.name, {}).get("outputs", {})
        of_outputs = known | {str(number): each for number, each in outputs.items()}
        entry = {"bytes": file.size, "inputs": list(inputs), "outputs": of_outputs}
        self._record["files"][file.name] = entry
        self._directory.write_json(self._name, self._record)

    def inputs(self, file: WeightsFile) -> list[dict[str, str]]:
        """Checksums of the tensors that a file was made of, of each checkpoint."""
        return self._record["files"][file.name]["inputs"]

    def check_inputs(self, output: Path) -> None:
        """Raises unless the checkpoints are those that a merge which is there was made of.

        Args:
            output: the merge.

        Raises:
            JaxmergeError: files have another name, size or time: all of them are listed.
        """
        with as_written(str(self._directory.path / self._name)):
            before, now = (
                [_say(file) for files in inputs for file in files]
                for inputs in (self._inputs_before, self._record["inputs"])
            )
        if before != now:
            raise JaxmergeError(
                "the checkpoints are not those that the merge here was made of; "
                "without this directory they are merged anew",
                where=str(output),
                expected="; ".join(file for file in before if file not in now),
                found="; ".join(file for file in now if file not in before),
            )

    def is_sound(self, file: WeightsFile, output: int, directory: Path) -> bool:
        """Whether a file of a merge is what was recorded; reads all of it."""
        path = directory / file.name
        entry = self._record["files"].get(file.name)
        if entry is None or str(output) not in entry["outputs"] or not path.is_file():
            return False
        if path.stat().st_size != file.size or not _begins_with(path, file.header):
            return False
        return all(
            _checksum(path, file.starts[name], tensor) == entry["outputs"][str(output)].get(name)
            for name, tensor in file.tensors.items()
        )


def _identity(files: Iterable[str]) -> list[list[Any]]:
    """Name, size and time of files."""
    return [[file, *_size_and_time(file)] for file in sorted({*files})]


def _size_and_time(file: str) -> tuple[int, float]:
    if "://" in file:  # of which whole seconds are known
        found = epath.Path(file).stat()
        return found.length, float(found.mtime)
    stat = os.stat(file)
    return stat.st_size, stat.st_mtime


def _say(file: Sequence[Any]) -> str:
    """What `_identity` knows of a file, for people."""
    name, size, mtime = file
    return f"{name} of {size} bytes and {datetime.fromtimestamp(mtime, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _begins_with(path: Path, header: bytes) -> bool:
    with open(path, "rb") as stream:
        return stream.read(len(header)) == header


def _checksum(path: Path, start: int, tensor: jax.ShapeDtypeStruct) -> str:
    """The checksum of a tensor, read in pieces."""
    shape, dtype = tensor.shape, np.dtype(tensor.dtype)
    per_word = digest.values_per_word(shape, dtype)
    lanes, size = np.zeros(2, np.uint32), tensor.size
    values = np.zeros(min(_STEP, -(-size // 4) * 4), dtype)
    positions = np.zeros(values.size // per_word, np.uint32)
    for first in range(0, size, max(values.size, 1)):
        count = min(values.size, size - first)
        read_into(str(path), start + first * dtype.itemsize, values[:count])
        values[count:] = 0
        digest.positions(shape, dtype, first // per_word, positions[: count // per_word])
        positions[count // per_word :] = 0
        words = digest.words(values, per_word)
        lanes += np.asarray(digest.block_sums(words[None], positions, dtype))[0, :2]
    return digest.checksum(lanes)


def damaged(path: Path) -> JaxmergeError:
    """The error for a merge that is there and is not what was written."""
    return JaxmergeError(
        "the merge that is here is not the one that was written",
        where=str(path),
        expected="the file as it was, or no such directory: then it is merged again",
    )
