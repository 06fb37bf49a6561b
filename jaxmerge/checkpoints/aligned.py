"""Checkpoints of different vocabularies as those of one: their rows are moved as they are read."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from jaxmerge.checkpoints import directory, huggingface, lora, vocabulary
from jaxmerge.checkpoints.leaves import Values
from jaxmerge.checkpoints.rows import Rows, has_rows
from jaxmerge.checkpoints.source import Source
from jaxmerge.checkpoints.vocabulary import Vocabulary
from jaxmerge.errors import JaxmergeError, check_choice
from jaxmerge.textfiles import read_json
from jaxmerge.trees import PyTree, map_named, named_leaves

CHOICES = ("", "base", "union")
_LEAVES = ("embedding", "unembedding")  # of the decoder, that have a row for each token
_FORMATS = ("huggingface", "lora")


def check(choice: str, others: str) -> None:
    """Raises `JaxmergeError`, which names the field of a config, unless it can be so.

    Args:
        choice: see `align`; "": there is no common vocabulary.
        others: another tokenizer, or model, that is asked for; "": none is.
    """
    check_choice("pool.vocabulary", choice, CHOICES)
    if choice and others:
        raise JaxmergeError(
            "a common vocabulary has the tokenizer of the base, and is for models of the package",
            where="pool.vocabulary",
            expected='"" with pool.tokenizer or pool.model; or neither of these',
            found=f"{choice} with {others}",
        )


def align(
    sources: Sequence[Source], choice: str, base: str = "", *, by_tensor: bool = False
) -> tuple[Source, ...]:
    """Checkpoints that are read in one vocabulary.

    All have the config of the base then, with as many rows as there are, and its tokenizer, with
    what the union has besides: `Source.directory` has both.

    Args:
        sources: from `survey.find`, as they are stored.
        choice: `base`, whose tokens are those of all; or `union`: the others' come after them.
        base: directory of the model whose vocabulary comes first; "": that of the first checkpoint.
        by_tensor: see `survey.find`.

    Raises:
        JaxmergeError: a checkpoint is of another format, or its embeddings can't be told; a
            tokenizer can't be read; the base is another model.
    """
    for source in sources:
        if source.format not in _FORMATS:
            raise JaxmergeError(
                "the checkpoint has no tokenizer, so its rows can't be told by their tokens",
                where=source.path,
                expected='a Hugging Face directory or an adapter; or pool.vocabulary = ""',
                found=source.format,
            )
    members, at = list(sources), 0
    if base:
        paths = [os.path.realpath(each.path) for each in sources]
        base = os.path.realpath(os.path.expanduser(base))
        at = paths.index(base) if base in paths else len(paths)
        if base not in paths:
            members.append(huggingface.describe("base", epath.Path(base), by_tensor=by_tensor))
    rows = [_rows(each) for each in members]
    words = [vocabulary.read(_tokenizer(each), count) for each, count in zip(members, rows)]
    common = vocabulary.combined(
        words, rows, at, source=at, union=choice == "union", least=rows[at]
    )
    _check_base(members[at], members[0], common.rows)
    place = _directory(members[at], common, rows[at])
    values = [functools.partial(_values, each) for each in members]
    beside = {} if at < len(sources) else members[at].tensors
    return tuple(
        _aligned(
            source, None if _fits(common, k, count) else Rows(common, k, values, beside), place
        )
        for k, (source, count) in enumerate(zip(sources, rows))
    )


def with_rows(architecture: Mapping[str, Any], rows: int) -> Mapping[str, Any]:
    """An architecture with another number of rows, where it says how many there are."""
    changed: dict[str, Any] = {key: rows for key in ("vocab", "vocab_size") if key in architecture}
    nested = architecture.get("text_config")
    if isinstance(nested, dict) and "vocab_size" in nested:
        changed["text_config"] = {**nested, "vocab_size": rows}
    return {**architecture, **changed}


def _aligned(source: Source, rows: Rows | None, place: str) -> Source:
    if rows is None:
        return source._replace(directory=place)
    return source._replace(
        directory=place,
        rows=rows,
        abstract=_resized(source.abstract, rows.count),
        architecture=with_rows(source.architecture, rows.count),
    )


def _has_rows(leaf: str) -> bool:
    return leaf in _LEAVES or has_rows(leaf)


def _resized(abstract: PyTree, rows: int) -> PyTree:
    def leaf(name: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        shape = (rows, *leaf.shape[1:]) if _has_rows(name) else leaf.shape
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    return map_named(leaf, abstract)


def _rows(source: Source) -> int:
    """Of the input embeddings."""
    found = {
        name: leaf.shape[0]
        for name, leaf in named_leaves(source.abstract).items()
        if name == _LEAVES[0] or directory.EMBEDDING.search(name)
    }
    if len({*found.values()}) != 1:
        raise JaxmergeError(
            "the input embeddings can't be told by their name",
            where=source.path,
            expected="one tensor such as model.embed_tokens.weight",
            found=", ".join(found) or "none",
        )
    return next(iter(found.values()))


def _tokenizer(source: Source) -> Path:
    """The directory with a member's tokenizer: of an adapter without one, its base's."""
    own = Path(source.path)
    return own if (own / vocabulary.FILE).exists() else Path(source.directory)


def _fits(common: Vocabulary, k: int, rows: int) -> bool:
    """Whether a member's rows are those of the common vocabulary as they are."""
    ids = np.array(sorted(common.ids.values()))
    return rows == common.rows and bool((np.asarray(common.own[k])[ids] == ids).all())


def _values(source: Source) -> Values:
    """Reads tensors of a member as they are stored; of tied embeddings also by the head's name."""
    if source.format == "lora":
        return lora.laid(epath.Path(source.path), source.base).values
    tied = next((name for name in source.tensors if directory.EMBEDDING.search(name)), "")

    def read(name: str, first: int, out: np.ndarray) -> None:
        directory.read_values(source.tensors, name if name in source.tensors else tied, first, out)

    return read


def _check_base(base: Source, first: Source, rows: int) -> None:
    """Raises unless the base, whose config the merge has, is a model of the same shapes."""
    expected, found = (
        {name: leaf.shape for name, leaf in named_leaves(_resized(each.abstract, rows)).items()}
        for each in (base, first)
    )
    wrong = [
        name
        for name in {**expected, **found}
        if expected.get(name) != found.get(name) and not directory.may_lack(name)
    ]
    if wrong:
        raise JaxmergeError(
            f"the base is not a model such as {first.path}",
            where=base.path,
            expected="leaves of the same names and shapes, but for the rows of the vocabulary",
            found=", ".join(sorted(wrong)[:5]),
        )


def _directory(base: Source, common: Vocabulary, rows: int) -> str:
    """Where config and tokenizer of the common vocabulary are; made where they are nowhere."""
    own = Path(base.directory)
    if common.content is None and common.directory == own and common.rows == rows:
        return base.directory
    new = Path(tempfile.mkdtemp(prefix="jaxmerge-vocabulary-"))
    atexit.register(shutil.rmtree, new, ignore_errors=True)
    huggingface.copy_files(own, new, "", common.directory)
    vocabulary.write_tokenizer(new, common)
    file = new / "config.json"
    config = read_json(file) if file.exists() else {}
    if config and vocabulary.set_rows(config, common.rows):
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return str(new)
