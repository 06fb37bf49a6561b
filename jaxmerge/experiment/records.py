"""What a run records before its first evaluation, and refuses to go on with when it differs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import secrets
import sys
from collections.abc import Sequence

import jax
import numpy as np

from jaxmerge import config as configs
from jaxmerge.checkpoints.pool import Record
from jaxmerge.config import Config
from jaxmerge.errors import JaxmergeError, as_written
from jaxmerge.hosts import processes
from jaxmerge.rundir import RunDirectory
from jaxmerge.scores.formatting import plain_bounds
from jaxmerge.tasks.common import Example, Task


def open_directory(config: Config, workdir: str, *, orbax: bool) -> RunDirectory:
    """The run directory, which process 0 writes and all processes know.

    Args:
        config: of the run.
        workdir: its path.
        orbax: whether an Orbax checkpoint will be written to it, by all processes.

    Raises:
        JaxmergeError: see `RunDirectory`; or not all processes see what they are to write to.
    """
    directory = RunDirectory(
        workdir,
        configs.plain(config),
        writer=processes.first(),
        from_writer=processes.from_first,
    )
    say_unlocked(directory)
    if processes.several() and orbax:
        try:
            _check_shared(directory)
        except JaxmergeError:
            directory.close()
            raise
    return directory


def say_unlocked(directory: RunDirectory) -> None:
    """Warns where nothing keeps another machine from writing to a run directory."""
    if directory.unlocked:
        print(
            f"jaxmerge: {directory.path}: the file system has no locks ({directory.unlocked}): "
            "see to it that no other machine runs in this directory",
            file=sys.stderr,
        )


def _check_shared(directory: RunDirectory) -> None:
    mark = directory.path / "shared.txt"

    def make() -> bytes:
        mark.write_text(secrets.token_hex(8))
        return mark.read_bytes()

    token = processes.from_first(make)
    blind = processes.spread(
        lambda _: [float(not (mark.exists() and mark.read_bytes() == token))],
        range(jax.process_count()),  # one for each
    )
    if blind.any():
        raise JaxmergeError(
            "an Orbax checkpoint is written by all processes, and not all see the directory",
            where=str(directory.path),
            expected="a file system that they share, or export.formats without orbax",
            found=f"nothing of it in process {np.flatnonzero(blind).tolist()}",
        )


def record_pool(directory: RunDirectory, of_pool: Sequence[Record], *, base: bool = False) -> None:
    """Writes pool.json; refuses a directory whose candidates were made of other checkpoints.

    Args:
        directory: of the run.
        of_pool: the checkpoints.
        base: whether the last is the base, which stands by itself there.
    """
    records = [dataclasses.asdict(record) for record in of_pool]
    known = directory.read_json("pool.json")
    if known is not None:
        with as_written(str(directory.path / "pool.json")):
            before_all = known["checkpoints"] + ([known["base"]] if "base" in known else [])
            fingerprints = [before["fingerprint"] for before in before_all]
        for before, now in zip(fingerprints, records):
            if before != now["fingerprint"]:
                raise JaxmergeError(
                    "the checkpoint is not the one that this run directory was started with",
                    where=now["source"],
                    expected=f"fingerprint {before}",
                    found=now["fingerprint"],
                )
    apart = {"base": records.pop()} if base else {}
    directory.write_json("pool.json", {"checkpoints": records, **apart})


def record_tasks(directory: RunDirectory, tasks: Sequence[Task]) -> None:
    """Writes tasks.json; refuses a directory whose candidates were scored on other examples."""
    records = {
        task.name: {"bounds": plain_bounds(task.bounds)}
        | {
            split: {"examples": len(examples), "digest": _digest(examples)}
            for split, examples in task.splits.items()
            if split != "train"
        }
        for task in tasks
    }
    processes.agree("the tasks' examples", json.dumps(records).encode())
    known = directory.read_json("tasks.json") or records
    with as_written(str(directory.path / "tasks.json")):
        changed = [
            name
            for name, record in records.items()
            # Directories of before have no bounds, which are for the report.
            if {"bounds": record["bounds"], **known.get(name, {})} != record
        ]
    if changed:
        raise JaxmergeError(
            "the examples are not those that this run directory was started with",
            where=f"task {', '.join(changed)}",
            expected=str([known.get(name) for name in changed]),
            found=str([records[name] for name in changed]),
        )
    directory.write_json("tasks.json", records)


def _digest(examples: Sequence[Example]) -> str:
    """Of what is asked and what is right, 16 hexadecimal digits."""
    asked = [(example.prompt, example.target, example.choices) for example in examples]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
