"""Merges with given weights: from a config to the merged models, without evaluating anything."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import jax
from tqdm import tqdm

from jaxmerge import config as configs
from jaxmerge.checkpoints import card, lora_export, survey
from jaxmerge.checkpoints.export import export, in_order, place
from jaxmerge.checkpoints.pool import Record
from jaxmerge.checkpoints.source import Source
from jaxmerge.checkpoints.stream import LeafStream
from jaxmerge.checkpoints.survey import formats
from jaxmerge.checkpoints.trainers import STORED
from jaxmerge.config import Config
from jaxmerge.errors import JaxmergeError
from jaxmerge.experiment import adapters, given, methods
from jaxmerge.experiment.given import Given
from jaxmerge.experiment.records import record_pool, say_unlocked
from jaxmerge.experiment.sources import (
    base_of,
    find_checkpoints,
    host_alone,
    huggingface_directory,
    members,
    start_jax,
    tokenizer_directory,
)
from jaxmerge.rundir import RunDirectory
from jaxmerge.streaming import merge as streaming
from jaxmerge.streaming.merge import Output
from jaxmerge.trees import named_leaves

_SUM_ERROR = 1e-3  # of weights that were written down with four digits; it changes nothing


class Merge(NamedTuple):
    """One merge that the config asks for."""

    path: str  # in the run directory
    weights: tuple[float, ...]  # of a file the means over groups
    given: Given  # its numbers


def merge(config: Config, workdir: str, command: str = "", out: str = "") -> list[Path]:
    """The merges with the weights of `config.merge`; any architecture will do.

    Between Hugging Face directories they go from file to file in blocks, see `streaming`. All
    other checkpoints are read, and written, leaf by leaf.

    Args:
        config: from a `get_config()`; its tasks and search are not looked at.
        workdir: the run directory; the merge is written to its `merged`.
        command: what the model card says to run again.
        out: where the checkpoint goes, of one merge in one format; "": `merged` in `workdir`.

    Weights that do not sum to 1 are used as they are, and a warning says so.

    Returns:
        The checkpoints that were written, one per merge and format.

    Raises:
        JaxmergeError: anything that the user can mend.
    """
    workdir, out = os.path.expanduser(workdir), os.path.expanduser(out)
    configs.check_pool(config)
    start_jax(config)
    if config.merge.method != "linear":
        return _by_method(config, workdir, command, out)
    in_blocks, by_leaf = _paths(config)
    as_stored = survey.by_name(members(config)) and not config.merge.weights_file
    sources = find_checkpoints(config, by_tensor=bool(in_blocks), as_stored=as_stored)
    # Before anything is written: it may refuse what can be merged by tensor, or as it is stored.
    parts = [
        (wanted, sources)
        if stored == as_stored and not in_blocks
        else (wanted, find_checkpoints(config, as_stored=stored))
        for wanted, stored in _views(config, by_leaf)
    ]
    merges = _merges(config, sources)
    if "lora" in config.export.formats:
        lora_export.check_weights([each.weights for each in merges])
    for said in filter(None, [given.window(config), *map(_warning, merges)]):
        print(f"jaxmerge: {said}", file=sys.stderr)
    if out:
        _check_place(Path(out), Path(workdir), merges, config.export.formats)
    written = []
    with closing(RunDirectory(workdir, {"mode": "merge", **configs.plain(config)})) as directory:
        say_unlocked(directory)
        given.expect_pool(config, directory)
        if in_blocks:
            written += _in_blocks(config, sources, merges, directory, command, out)
        for number, (wanted, whole) in enumerate(parts):
            if out and Path(out).exists():
                break
            path = directory.path
            paths, records = _by_leaf(
                config, wanted, whole, merges, path, command, compare=not in_blocks and not number
            )
            written += paths
            if not in_blocks and not number:
                record_pool(directory, records)
            if out:
                paths[0].rename(out)
    if out:
        return [Path(out)]
    return in_order(written, config.export.formats)


def _by_method(config: Config, workdir: str, command: str, out: str) -> list[Path]:
    """The merges by another method than the weighted sum, a tensor at a time."""
    with_base = methods.takes_base(config)
    count = survey.count(members(config))
    methods.check_inputs(config.merge.method, count, with_base=bool(with_base and config.pool.base))
    by_tensor = _paths(config) == (("huggingface",), ())
    by_name = {*formats(members(config)), *config.export.formats} <= STORED.keys()
    sources = find_checkpoints(
        config,
        by_tensor=by_tensor,
        # A base, and numbers by group, are of the decoder's leaves.
        as_stored=by_name and not with_base and not config.merge.weights_file,
        with_base=with_base,
    )
    merges = _merges(config, sources[:count])
    for each in merges:
        methods.check(config, each.given, count)
    if out:
        _check_place(Path(out), Path(workdir), merges, config.export.formats)
    written, records = [], ()
    with closing(RunDirectory(workdir, {"mode": "merge", **configs.plain(config)})) as directory:
        say_unlocked(directory)
        given.expect_pool(config, directory)
        for each in merges:
            text = functools.partial(_method_card, config, each, command)
            path = directory.path / each.path
            record = "merge.json" if len(merges) == 1 else f"merge-{path.name}.json"
            if by_tensor:
                place = Path(out) if out else path / "huggingface"
                records = methods.merge_files(
                    config, place, sources, each.given, directory, record=record, card=text
                )
                written.append(place)
                continue
            if out and Path(out).exists():
                return [Path(out)]
            paths, records = methods.merge(
                config, path, sources, each.given, directory, record=record, card=text
            )
            written += paths
        record_pool(directory, records)
    if out and not by_tensor:
        written[0].rename(out)
    if out:
        return [Path(out)]
    return in_order(written, config.export.formats)


def _method_card(config: Config, merge: Merge, command: str, records: Sequence[Record]) -> str:
    plain = [dataclasses.asdict(record) for record in records]
    weighted = methods.takes_weights(config.merge.method)
    said = [f"{weight:.6g}" for weight in merge.weights] if weighted else ["-"] * len(plain)
    if methods.takes_base(config):
        said = [*said[: len(plain) - 1], "base"]
    return card.of_method(plain, said, methods.described(config, merge.given), command)


def set_up_host(config: Config) -> None:
    """See `sources.host_alone`; for merges from file to file alone."""
    if not _paths(config)[1]:
        host_alone()


def _paths(config: Config) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The formats that are written in blocks, and those that are written leaf by leaf."""
    wanted = tuple(config.export.formats)
    if formats(members(config)) != {"huggingface"} or config.merge.weights_file:
        return (), wanted
    in_blocks = tuple(name for name in wanted if name == "huggingface")
    return in_blocks, tuple(name for name in wanted if name not in in_blocks)


def _views(config: Config, by_leaf: tuple[str, ...]) -> list[tuple[tuple[str, ...], bool]]:
    """The formats that are written leaf by leaf, and whether of the leaves as they are stored.

    Orbax checkpoints and the like are merged by name, whatever model they are of, and written as
    they came. All other formats are made of the decoder's leaves.
    """
    if not survey.by_name(members(config)) or config.merge.weights_file:
        return [(by_leaf, False)] if by_leaf else []
    by_name = tuple(each for each in by_leaf if each in STORED)
    skipped = () if base_of(config) else ("huggingface",)  # see `export`
    made = tuple(each for each in by_leaf if each not in (*by_name, *skipped))
    return [(each, each is by_name) for each in (by_name, made) if each]


def _merges(config: Config, sources: Sequence[Source]) -> list[Merge]:
    """The merges that are asked for, each with one weight per checkpoint."""
    weights, names = given.weights_of(config, len(sources)), tuple(config.merge.names)
    if config.merge.weights_file:
        return [_from_file(config, sources)]
    several = any(isinstance(each, tuple | list) for each in weights)
    rows = weights if several else (weights,)
    if methods.takes_weights(config.merge.method):
        for row in rows:
            given.check_weights(row, [source.name for source in sources])
    elif weights:
        raise JaxmergeError(
            f"checkpoints have no weights in {config.merge.method}",
            where="merge.schedule" if config.merge.schedule else "merge.weights",
            expected="neither weights nor a schedule",
            found=config.merge.schedule or str(weights),
        )
    if not several and not names:
        return [_merge_of(config, "merged", weights)]
    names = names or tuple(map(str, range(len(rows))))
    one_directory = all(re.fullmatch(r"[^./\\\0][^/\\\0]*", name) for name in names)
    if len({*names}) != len(rows) or not one_directory:
        raise JaxmergeError(
            "needs one name per merge, all different, each the name of a directory",
            where="merge.names",
            expected=f"{len(rows)} names",
            found=str(names),
        )
    return [_merge_of(config, f"merged/{name}", row) for name, row in zip(names, rows)]


def _merge_of(config: Config, path: str, weights: Sequence[int | float]) -> Merge:
    own = tuple(map(float, weights))
    return Merge(path, own, given.from_config(config, own))


def _from_file(config: Config, sources: Sequence[Source]) -> Merge:
    """The merge of `merge.weights_file`."""
    stacked = "layers" if sources[0].architecture.get("layers") else ""
    names = [source.name for source in sources]
    found = given.read(config, sources[0].abstract, stacked, names)
    return Merge("merged", found.means, found)


def _check_place(out: Path, workdir: Path, merges: Sequence[Merge], wanted: Sequence[str]) -> None:
    """Raises unless `out` can be, or is, the one checkpoint that is asked for."""
    if len(merges) * len(wanted) != 1:
        raise JaxmergeError(
            "one directory holds one merge in one format",
            where="--out",
            expected="a run with a config file: python -m jaxmerge.run --mode=merge",
            found=f"{len(merges)} merges, formats {', '.join(wanted)}",
        )
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()
    if out.exists() and not (workdir / "config.json").exists():
        raise JaxmergeError(
            "there is something here already", where=str(out), expected="a new directory"
        )


def _warning(merge: Merge) -> str:
    """What is said of weights that make no average; they are used as they are. "": nothing."""
    total = math.fsum(merge.weights)
    if abs(total - 1) <= _SUM_ERROR:
        return ""
    return (
        f"the weights of {merge.path} sum to {total:.6g}, not 1: they are used as they are, so its "
        f"tensors are {total:.6g} times an average of the checkpoints'. For an average divide each "
        f"weight by {total:.6g}"
        if total
        else f"the weights of {merge.path} sum to 0: they are used as they are, so it is a "
        "difference of checkpoints and no average of them"
    )


def _in_blocks(
    config: Config,
    sources: Sequence[Source],
    merges: Sequence[Merge],
    directory: RunDirectory,
    command: str,
    out: str,
) -> list[Path]:
    """Writes the Hugging Face directories of all merges, in one pass over the checkpoints."""
    plan = streaming.plan(
        sources,
        merged_dtype=config.pool.dtype,
        dtype=config.export.dtype,
        shard_bytes=config.export.shard_bytes,
    )
    outputs = [Output(directory.path / each.path / "huggingface", each.weights) for each in merges]
    if out:
        outputs = [Output(Path(out), merges[0].weights)]
    with tqdm(total=plan.bytes_read(), unit="B", unit_scale=True, disable=None) as bar:
        records = streaming.merge(
            plan,
            outputs,
            directory,
            like=huggingface_directory(config, sources),
            tokenizer=tokenizer_directory(config, sources),
            card=lambda records, output: _card(config, records, output.weights, command),
            memory_bytes=config.merge.memory_bytes,
            progress=bar.update,
        )
    record_pool(directory, records)
    return [output.path for output in outputs]


def _by_leaf(
    config: Config,
    wanted: Sequence[str],
    sources: Sequence[Source],
    merges: Sequence[Merge],
    directory: Path,
    command: str,
    *,
    compare: bool,
) -> tuple[list[Path], tuple[Record, ...]]:
    """Writes the other formats, one merge after the other; what `pool.json` says besides.

    Args:
        compare: of merges that are all there, read the checkpoints to be compared with what it
            says; a merge in blocks has done so.
    """
    written, records = [], ()
    finished = all(
        place(directory / each.path, name).exists() for each in merges for name in wanted
    )
    for each in merges:
        leaves = LeafStream(sources, jax.devices()[0], dtype=config.pool.dtype)
        text = functools.partial(_card_of_stream, config, leaves, each, command)
        written += export(
            directory / each.path,
            leaves.abstract,
            functools.partial(
                leaves.linear, weights_K=each.given.weights, groups=each.given.groups
            ),
            source=sources[0],
            architecture=sources[0].architecture,
            like=huggingface_directory(config, sources),
            tokenizer=tokenizer_directory(config, sources),
            card=text,
            adapter=adapters.writer(config, sources, each.given.weights, text, each.given.groups),
            rope_type=config.pool.rope_type,
            formats=wanted,
            dtype=config.export.dtype,
            shard_bytes=config.export.shard_bytes,
        )
        if finished and compare and each is merges[-1]:
            _read_all(leaves)
        if leaves.read:  # not of a merge that was there
            records = leaves.records()
    return written, records


def _read_all(leaves: LeafStream) -> None:
    for name in named_leaves(leaves.abstract):
        leaves(name)


def _card_of_stream(config: Config, leaves: LeafStream, merge: Merge, command: str) -> str:
    if not leaves.read:  # of an adapter, whose factors alone were read
        _read_all(leaves)
    groups = merge.given.groups
    count = len(groups.names) if groups else 1
    return _card(config, leaves.records(), merge.weights, command, count)


def _card(
    config: Config,
    records: Sequence[Record],
    weights: Sequence[float],
    command: str,
    groups: int = 1,
) -> str:
    plain = [dataclasses.asdict(record) for record in records]
    return card.of_weights(plain, list(weights), command, groups, given.window(config))
