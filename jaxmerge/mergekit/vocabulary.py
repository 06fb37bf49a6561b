"""The vocabulary of a merge, and the rows of embeddings that it takes from each model.

A model that has a token gives its own row of it. For one that has not, the row is that of the only
model that has the token; else that of the base, if the base has it; else the mean over the models
that have it. `tokens` of the YAML says otherwise, and with `force` for all models. Rows that pad
the vocabulary are the mean of all rows.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxmerge import textfiles
from jaxmerge.errors import JaxmergeError
from jaxmerge.mergekit.document import Reference, Token, Tokenizer
from jaxmerge.mergekit.models import Member

FILE = "tokenizer.json"
_SETTINGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False}


class Words(NamedTuple):
    """The tokens of a tokenizer."""

    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]  # settings of those that are matched before all others
    content: Mapping[str, Any]  # of tokenizer.json
    directory: Path
    cut: bool = False  # whether tokenizer.json has more, which the embeddings have no rows for


class Vocabulary(NamedTuple):
    """What a merge's embeddings are made of.

    Attributes:
        ids: of the tokens.
        rows: of the embeddings, padding included.
        own: for each model the row of each id, `[V]`; -1: it has none.
        taken: for each id the rows that stand for it where a model has none: pairs of the number of
            a model and a row, whose mean is taken; (): zeros.
        forced: the ids at which all models take these.
        content: of tokenizer.json; None: the files of `directory` as they are.
        directory: where the other files of the tokenizer come from.
    """

    ids: Mapping[str, int]
    rows: int
    own: Sequence[np.ndarray]
    taken: Sequence[tuple[tuple[int, int], ...]]
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


def vocabulary(
    choice: Tokenizer, members: Mapping[Reference, Member], base: Reference, rows: Sequence[int]
) -> Vocabulary:
    """The vocabulary that a document asks for.

    Args:
        choice: `tokenizer` or `tokenizer_source` of the YAML.
        members: the models.
        base: the one whose tokenizer and rows come first.
        rows: of the embeddings of each model.

    Raises:
        JaxmergeError: a tokenizer can't be read, or a token is not where the YAML says.
    """
    words = [
        _within(_read(member.directory), count) for member, count in zip(members.values(), rows)
    ]
    order = list(members)
    source = order.index(choice.source if isinstance(choice.source, Reference) else base)
    first = words[source]
    added: dict[str, Mapping[str, Any]] = {}
    if choice.source == "union":
        added = _new_tokens(first, words)
    for token in choice.tokens:
        if token not in first.ids and token not in added:
            added[token] = {**_PLAIN, "normalized": True, "special": False}
    ids = dict(first.ids)
    for token in added:
        ids[token] = max(ids.values()) + 1
    size = max(ids.values()) + 1
    text_of = dict(zip(ids.values(), ids))
    own = [_own(each, ids, size) for each in words]
    taken: list[tuple[tuple[int, int], ...]] = []
    forced = set()
    for index in range(size):
        text = text_of.get(index)
        rule = choice.tokens.get(text) if text is not None else None
        if text is None and index < rows[source]:  # no token of it: a row that nothing is read from
            taken.append(((source, index),))
        elif rule and rule.kind:
            taken.append(_by_rule(rule, str(text), words, order, rows))
            forced |= {index} if rule.force else set()
        else:
            found = _by_default([int(each[index]) for each in own], order.index(base))
            if not found:
                raise choice.node.error(
                    f"no model has the token {text}",
                    expected=f"tokens: {{{text}: {{source: ...}}}}, a model's row or kind: zero",
                )
            taken.append(found)
    multiple = choice.multiple or 1
    return Vocabulary(
        ids=ids,
        rows=-(-size // multiple) * multiple,
        own=own,
        taken=taken,
        forced=frozenset(forced),
        content=_with(first, ids, added) if added or first.cut else None,
        directory=first.directory,
    )


def _read(directory: Path) -> Words:
    path = directory / FILE
    if not path.exists():
        raise _unreadable(path, "no such file")
    content = textfiles.read_json(path)
    try:
        model = content["model"]["vocab"]
        if isinstance(model, list):  # Unigram: pieces with their scores
            model = {piece: index for index, (piece, _) in enumerate(model)}
        added = {each["content"]: each for each in content.get("added_tokens") or []}
        ids = {**model, **{token: each["id"] for token, each in added.items()}}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(path, f"{type(error).__name__}: {error}") from error
    settings = {
        token: {key: bool(each.get(key, False)) for key in _SETTINGS}
        for token, each in added.items()
    }
    in_order = dict(sorted(ids.items(), key=lambda item: item[1]))
    return Words(in_order, settings, content, directory)


def _unreadable(path: Path, found: str) -> JaxmergeError:
    return JaxmergeError(
        "the tokenizer can't be read",
        where=str(path),
        expected="a tokenizer.json; transformers makes one: AutoTokenizer"
        ".from_pretrained(DIR).save_pretrained(DIR)",
        found=found,
    )


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


def _by_default(own: Sequence[int], base: int) -> tuple[tuple[int, int], ...]:
    having = [(k, row) for k, row in enumerate(own) if row >= 0]
    if len(having) > 1 and own[base] >= 0:
        return ((base, own[base]),)
    return tuple(having)


def _by_rule(
    rule: Token,
    text: str,
    words: Sequence[Words],
    order: Sequence[Reference],
    rows: Sequence[int],
) -> tuple[tuple[int, int], ...]:
    if rule.kind == "zero":
        return ()
    assert rule.model
    k = order.index(rule.model)
    wanted = rule.token if rule.kind == "model_token" else text
    row = wanted if isinstance(wanted, int) else words[k].ids.get(wanted, -1)
    if not 0 <= row < rows[k]:
        raise rule.node.error(
            f"{rule.model} has no such token", expected=f"a row below {rows[k]}", found=str(wanted)
        )
    return ((k, row),)


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
