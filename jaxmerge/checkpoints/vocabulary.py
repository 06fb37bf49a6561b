"""Vocabularies of several models made one, and the rows of embeddings that each gives to it.

A model that has a token gives its own row of it. For one that has not, the row is that of the only
model that has the token; else that of the base, if the base has it; else the mean over the models
that have it.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from jaxmerge.errors import JaxmergeError, as_written
from jaxmerge.textfiles import read_json

FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
# Files of a tokenizer that say the same as tokenizer.json, in the vocabulary of before.
_OF_OLD = re.compile(
    r"(tokenizer|spiece)\.model|vocab\.(json|txt)|merges\.txt|added_tokens\.json|tokenizer\.json"
)
_ALL = re.compile(
    _OF_OLD.pattern
    + r"|tokenizer_config\.json|special_tokens_map\.json|chat_template\.(jinja|json)"
)
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False}

# Rows that stand for a token: pairs of the number of a model and a row, whose mean is taken.
Taken = tuple[tuple[int, int], ...]


class Words(NamedTuple):
    """The tokens of a tokenizer."""

    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]  # settings of those that are matched before all others
    content: Mapping[str, Any]  # of tokenizer.json
    directory: Path
    cut: bool = False  # whether tokenizer.json has more, which the embeddings have no rows for


class Rule(NamedTuple):
    """What is said of a token: the rows that stand for it, and whether in all models."""

    taken: Taken
    force: bool = False


class Vocabulary(NamedTuple):
    """What a merge's embeddings are made of.

    Attributes:
        ids: of the tokens.
        rows: of the embeddings, padding included.
        own: for each model the row of each id, `[V]`; -1: it has none.
        taken: for each id the rows that stand for it where a model has none; (): zeros.
        forced: the ids at which all models take these.
        content: of tokenizer.json; None: the files of `directory` as they are.
        directory: where the other files of the tokenizer come from.
    """

    ids: Mapping[str, int]
    rows: int
    own: Sequence[np.ndarray]
    taken: Sequence[Taken]
    forced: frozenset[int]
    content: Mapping[str, Any] | None
    directory: Path

    def align(self, matrices: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The embeddings of all models, row by row for the tokens of this vocabulary.

        Args:
            matrices: `[R_k, D]` of each model.

        Returns:
            `[V, D]` of each, in the same dtypes.
        """
        size, width = len(self.taken), matrices[0].shape[1]
        default = np.zeros((size, width), np.float32)
        for index, rows in enumerate(self.taken):
            if rows:
                found = [np.asarray(matrices[k][row], np.float32) for k, row in rows]
                default[index] = np.mean(found, axis=0) if len(found) > 1 else found[0]
        aligned = []
        for matrix, own in zip(matrices, self.own):
            made = np.zeros((self.rows, width), matrix.dtype)
            has = own >= 0
            has[list(self.forced)] = False
            made[:size] = default.astype(matrix.dtype)
            made[:size][has] = matrix[own[has]]
            if self.rows > size:
                mean = made[:size].astype(np.float32).mean(axis=0)
                made[size:] = mean.astype(matrix.dtype)
            aligned.append(made)
        return aligned


def combined(
    words: Sequence[Words],
    rows: Sequence[int],
    base: int,
    *,
    source: int,
    union: bool = False,
    more: Iterable[str] = (),
    rules: Mapping[str, Rule] = MappingProxyType({}),
    least: int = 0,
    multiple: int = 1,
) -> Vocabulary:
    """One vocabulary out of several.

    Args:
        words: of each model, within its rows.
        rows: of the embeddings of each.
        base: whose row stands for a token that several models have.
        source: whose tokens come first, with the ids that they have there.
        union: whether all others' tokens come after them.
        more: tokens besides; each that no model has must have a rule.
        rules: what stands for a token, where it is said.
        least: rows that the embeddings have at least; those of no token are the source's.
        multiple: the number of rows is made one of it, by rows that are the mean of all others.
    """
    first = words[source]
    added = _new_tokens(first, words) if union else {}
    for token in more:
        if token not in first.ids and token not in added:
            added[token] = {**_PLAIN, "normalized": True, "special": False}
    ids = dict(first.ids)
    following = max(ids.values(), default=-1) + 1
    ids |= {token: following + i for i, token in enumerate(added)}
    size = max(following + len(added), least)
    text_of = dict(zip(ids.values(), ids))
    own = [_own(each, ids, size) for each in words]
    taken: list[Taken] = []
    for index in range(size):
        text = text_of.get(index)
        if text is not None and text in rules:
            taken.append(rules[text].taken)
        elif text is None and index < rows[source]:  # a row that nothing is read from
            taken.append(((source, index),))
        else:
            taken.append(_by_default([int(each[index]) for each in own], base))
    return Vocabulary(
        ids=ids,
        rows=-(-size // multiple) * multiple,
        own=own,
        taken=taken,
        forced=frozenset(ids[text] for text, rule in rules.items() if rule.force),
        content=_with(first, ids, added) if added or first.cut else None,
        directory=first.directory,
    )


def write_tokenizer(new: Path, vocabulary: Vocabulary) -> None:
    """Makes the files of the tokenizer in a directory those of a vocabulary."""
    for path in list(new.iterdir()):
        if _ALL.fullmatch(path.name):
            path.unlink()
    for path in sorted(vocabulary.directory.iterdir()):
        stale = vocabulary.content is not None and _OF_OLD.fullmatch(path.name)
        if _ALL.fullmatch(path.name) and path.is_file() and not stale:
            shutil.copyfile(path, new / path.name)
    if vocabulary.content is None:
        return
    text = json.dumps(vocabulary.content, ensure_ascii=False)
    (new / FILE).write_text(text, encoding="utf-8")
    settings = new / SETTINGS
    said = read_json(settings) if settings.exists() else {}
    # Of versions before 5, which read both.
    known = said.get("added_tokens_decoder") if isinstance(said, dict) else None
    if isinstance(known, dict):
        said["added_tokens_decoder"] = {
            str(each["id"]): {key: value for key, value in each.items() if key != "id"}
            for each in vocabulary.content.get("added_tokens") or []
        }
        settings.write_text(json.dumps(said, indent=2, ensure_ascii=False), encoding="utf-8")


def set_rows(config: dict[str, Any], rows: int) -> bool:
    """Sets the vocabulary's size in a `config.json`; whether it was another."""
    nested = config.get("text_config")
    inner: dict[str, Any] = nested if isinstance(nested, dict) else config
    changed = inner.get("vocab_size") != rows
    inner["vocab_size"] = rows
    return changed


_UNREADABLE = "the tokenizer can't be read"
_TOKENIZER = (
    "a tokenizer.json; transformers makes one: AutoTokenizer.from_pretrained(DIR)"
    ".save_pretrained(DIR)"
)


def read(directory: Path, rows: int) -> Words:
    """The tokens of a directory's tokenizer that the embeddings have rows for.

    Raises:
        JaxmergeError: there is no tokenizer.json, or it can't be read; it has tokens without rows,
            and is of a kind that they can't be taken from.
    """
    path = directory / FILE
    if not path.exists():
        raise JaxmergeError(_UNREADABLE, where=str(path), expected=_TOKENIZER, found="no such file")
    content = read_json(path)
    with as_written(str(path), _UNREADABLE, _TOKENIZER):
        model = content["model"]["vocab"]
        if isinstance(model, list):  # Unigram: pieces with their scores
            model = {piece: index for index, (piece, _) in enumerate(model)}
        added = {each["content"]: each for each in content.get("added_tokens") or []}
        ids = {**model, **{token: each["id"] for token, each in added.items()}}
        settings = {
            token: {key: bool(each.get(key, False)) for key in _FLAGS}
            for token, each in added.items()
        }
        if not all(type(index) is int and index >= 0 for index in ids.values()):
            raise TypeError("ids of tokens that are no whole numbers")
        in_order = dict(sorted(ids.items(), key=lambda item: item[1]))
    return _within(Words(in_order, settings, content, directory), rows)


def _new_tokens(first: Words, words: Sequence[Words]) -> dict[str, Mapping[str, Any]]:
    """The tokens that others have and the first has not: plain ones, and then those added to them.

    A plain one becomes a token that is matched before all others, since the first's merges do not
    make it.
    """
    plain, added = dict[str, Mapping[str, Any]](), dict[str, Mapping[str, Any]]()
    for each in words:
        for token in each.ids:
            if token in first.ids:
                continue
            if token in each.added:
                added.setdefault(token, each.added[token])
            else:
                plain.setdefault(token, {**_PLAIN, "normalized": True, "special": False})
    return {**{token: each for token, each in plain.items() if token not in added}, **added}


def _within(words: Words, rows: int) -> Words:
    """The tokens that the embeddings have rows for."""
    beyond = {token for token, index in words.ids.items() if index >= rows}
    if not beyond:
        return words
    model = words.content["model"]
    if model.get("type") != "BPE":
        raise JaxmergeError(
            "the tokenizer has tokens that the embeddings have no rows for",
            where=str(words.directory / FILE),
            expected=f"ids below {rows}",
            found=", ".join(sorted(beyond)[:5]),
        )
    content = copy.deepcopy(dict(words.content))
    content["added_tokens"] = [
        each for each in content.get("added_tokens") or [] if each["content"] not in beyond
    ]
    content["model"]["vocab"] = {
        token: index for token, index in model["vocab"].items() if token not in beyond
    }
    pairs = [each.split(" ") if isinstance(each, str) else each for each in model["merges"]]
    content["model"]["merges"] = [
        merge
        for merge, (left, right) in zip(model["merges"], pairs)
        if not {left, right, left + right} & beyond
    ]
    return words._replace(
        ids={token: index for token, index in words.ids.items() if token not in beyond},
        added={token: each for token, each in words.added.items() if token not in beyond},
        content=content,
        cut=True,
    )


def _own(words: Words, ids: Mapping[str, int], size: int) -> np.ndarray:
    """The row of each id in a model; -1: it has none."""
    own = np.full(size, -1)
    for token, index in ids.items():
        own[index] = words.ids.get(token, -1)
    return own


def _by_default(own: Sequence[int], base: int) -> Taken:
    having = [(k, row) for k, row in enumerate(own) if row >= 0]
    if len(having) > 1 and own[base] >= 0:
        return ((base, own[base]),)
    return tuple(having)


def _with(
    first: Words, ids: Mapping[str, int], added: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """tokenizer.json of the first with more added tokens."""
    content = copy.deepcopy(dict(first.content))
    entries = content.setdefault("added_tokens", [])
    entries += [
        {"id": ids[token], "content": token, **settings} for token, settings in added.items()
    ]
    return content
