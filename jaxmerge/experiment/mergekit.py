"""Merges that mergekit's YAML asks for: from the file to the merged models."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from tqdm import tqdm

from jaxmerge import config as configs
from jaxmerge.checkpoints import card
from jaxmerge.checkpoints.pool import Record
from jaxmerge.config import Config
from jaxmerge.errors import JaxmergeError
from jaxmerge.experiment.records import record_pool
from jaxmerge.experiment.sources import start_jax
from jaxmerge.mergekit import document as documents
from jaxmerge.mergekit.document import Document
from jaxmerge.mergekit.finish import finish
from jaxmerge.mergekit.models import config_differences, find
from jaxmerge.mergekit.plan import plan
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
    documents.check_kind(path, "merge_method")
    _check(config)
    found = documents.read(path)
    start_jax(config)
    text = Path(path).read_text(encoding="utf-8")
    if Path(out).exists() and not (Path(workdir) / "config.json").exists():
        raise JaxmergeError("there is something here already", where=out, expected="a new directory")
    made: dict[str, Path] = {}
    warnings: list[str] = []
    identity = {"mode": "mergekit", "yaml": text, **configs.plain(config)}
    with closing(RunDirectory(workdir, identity)) as directory:
        for each in found:
            if each is documents.result(found):
                warnings += _merge(config, each, made, text, directory, Path(out), command)
                continue
            made[each.name] = directory.path / each.name / "merged"
            inner = RunDirectory(directory.path / each.name, {**identity, "document": each.name})
            with closing(inner):
                warnings += _merge(config, each, made, text, inner, made[each.name], command)
    return warnings


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
    document: Document,
    made: Mapping[str, Path],
    text: str,
    directory: RunDirectory,
    out: Path,
    command: str,
) -> list[str]:
    """Makes one merge."""
    others = {name: path for name, path in made.items() if name != document.name}
    members = find(document, others)
    planned = plan(document, members)
    unlike = [each for each in members.values() if each is not planned.first]
    warnings = [*planned.warnings, *config_differences(planned.first, unlike)]
    output = Output(
        path=out,
        like=str(planned.first.directory),
        rest=functools.partial(
            finish, document=document, plan=planned, members=[*members.values()], text=text
        ),
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
    return warnings


def _card(
    document: Document,
    text: str,
    warnings: Sequence[str],
    command: str,
    records: Sequence[Record],
) -> str:
    plain = [dataclasses.asdict(record) for record in records]
    return card.of_yaml(plain, [document.method.value], text, warnings, command)
