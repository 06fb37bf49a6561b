"""Merges that mergekit's YAML asks for: from the file to the merged models."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from jaxmerge import config as configs
from jaxmerge.checkpoints import card
from jaxmerge.checkpoints.pool import Record
from jaxmerge.config import Config
from jaxmerge.errors import JaxmergeError
from jaxmerge.experiment.records import record_pool, say_unlocked
from jaxmerge.experiment.sources import start_jax
from jaxmerge.mergekit import document as documents
from jaxmerge.mergekit.document import Document
from jaxmerge.mergekit.finish import finish
from jaxmerge.mergekit.models import Member, config_differences, find
from jaxmerge.mergekit.plan import Plan, plan
from jaxmerge.rundir import RunDirectory
from jaxmerge.streaming import recipes
from jaxmerge.streaming.recipes import Output

# What the config may say; all else is said by the YAML.
_HEEDED = ("seed", "mesh", "compilation_cache", "export", "report")


def merge(config: Config, path: str, workdir: str, command: str, out: str) -> list[str]:
    """Makes the merges of a YAML file, one after the other.

    Args:
        config: of which `seed` and `export.shard_bytes` are looked at.
        path: of the file.
        workdir: what is recorded of the merge, and the results of documents with names.
        command: what the model card says to run again.
        out: the directory of the result.

    Returns:
        What should be known of the merges, in sentences.

    Raises:
        JaxmergeError: anything that the user can mend.
    """
    workdir, out = os.path.expanduser(workdir), os.path.expanduser(out)
    documents.check_kind(path, "merge_method")
    _check(config)
    found = documents.read(path)
    start_jax(config)
    text = Path(path).read_text(encoding="utf-8")
    if Path(out).exists() and not (Path(workdir) / "config.json").exists():
        raise JaxmergeError(
            "there is something here already", where=out, expected="a new directory"
        )
    names = {each.name for each in found if len(found) > 1}
    ready = {  # before anything is written: most mistakes are found now
        each.name: _prepared(each, {})
        for each in found
        if not names & {reference.path for reference in each.references()}
    }
    made: dict[str, Path] = {}
    warnings: list[str] = []
    identity = {"mode": "mergekit", "yaml": text, **configs.plain(config)}
    with closing(RunDirectory(workdir, identity)) as directory:
        say_unlocked(directory)
        for each in found:
            prepared = ready.get(each.name) or _prepared(each, made)
            warnings += prepared.warnings
            if each is documents.result(found):
                _merge(config, prepared, text, directory, Path(out), command)
                continue
            made[each.name] = directory.path / each.name / "merged"
            inner = RunDirectory(directory.path / each.name, {**identity, "document": each.name})
            with closing(inner):
                _merge(config, prepared, text, inner, made[each.name], command)
    return warnings


class _Prepared(NamedTuple):
    """A merge of which all is known but the values."""

    document: Document
    members: tuple[Member, ...]
    plan: Plan
    warnings: tuple[str, ...]


def _prepared(document: Document, made: Mapping[str, Path]) -> _Prepared:
    members = find(document, made)
    planned = plan(document, members)
    unlike = [each for each in members.values() if each is not planned.first]
    warnings = (*planned.warnings, *config_differences(planned.first, unlike))
    return _Prepared(document, tuple(members.values()), planned, warnings)


def _check(config: Config) -> None:
    """Raises for fields that are set, and that the YAML decides."""
    default = configs.plain(configs.default())
    for section, value in configs.plain(config).items():
        if section not in _HEEDED and value != default[section]:
            raise JaxmergeError(
                "is set, and not heeded where a YAML says what is merged",
                where=f"--config.{section}",
                expected=f"the default; {', '.join(_HEEDED)} can be set",
            )


def _merge(
    config: Config,
    prepared: _Prepared,
    text: str,
    directory: RunDirectory,
    out: Path,
    command: str,
) -> None:
    """Makes one merge."""
    document, members, planned, warnings = prepared
    output = Output(
        path=out,
        like=str(planned.first.directory),
        rest=functools.partial(finish, document=document, plan=planned, members=members, text=text),
        card=functools.partial(_card, document, text, warnings, command),
    )
    total = recipes.bytes_read(planned.recipes, planned.models)
    with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:
        records = recipes.write(
            planned.recipes,
            planned.models,
            output,
            directory,
            seed=config.seed,
            shard_bytes=config.export.shard_bytes,
            progress=bar.update,
        )
    record_pool(directory, records)


def _card(
    document: Document,
    text: str,
    warnings: Sequence[str],
    command: str,
    records: Sequence[Record],
) -> str:
    plain = [dataclasses.asdict(record) for record in records]
    return card.of_yaml(plain, [document.method.value], text, warnings, command)
