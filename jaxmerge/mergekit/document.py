"""What a document of mergekit's YAML asks for, in dataclasses; nothing on disk is looked at.

`models` is the short form of one slice that has all layers of all models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxmerge.errors import JaxmergeError
from jaxmerge.mergekit.nodes import Node, documents
from jaxmerge.mergekit.settings import Parameters, parameters

DTYPES = ("float32", "bfloat16", "float16")
TEMPLATES = ("auto", "alpaca", "chatml", "exaone", "llama3", "mistral")

_TOP = (
    *("merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype"),
    *("out_dtype", "tokenizer_source", "tokenizer", "chat_template", "name"),
)
_REFERENCE = re.compile(r"(?P<path>[^@+]+)(@(?P<revision>[^@+]+))?")


class Reference(NamedTuple):
    """A model that a document names.

    Attributes:
        path: a directory, the id of a model on the hub, or the name of another document.
        revision: of the hub; "": the main one.
        lora: of an adapter that is added to it: path and revision; "": there is none.
    """

    path: str
    revision: str = ""
    lora: str = ""
    lora_revision: str = ""

    def __str__(self) -> str:
        def said(path: str, revision: str) -> str:
            return f"{path}@{revision}" if revision else path

        base = said(self.path, self.revision)
        return f"{base}+{said(self.lora, self.lora_revision)}" if self.lora else base


class Input(NamedTuple):
    """A model in a slice."""

    model: Reference
    layers: tuple[int, int] | None  # [first, last); None: all
    parameters: Parameters
    node: Node


class Slice(NamedTuple):
    """Layers of the result, made of as many layers of each of some models."""

    inputs: tuple[Input, ...]
    base_model: Reference | None
    parameters: Parameters
    node: Node


class Module(NamedTuple):
    """A part of a model that has layers of its own; most models are one."""

    name: str  # "": all modules
    slices: tuple[Slice, ...]
    parameters: Parameters
    node: Node


class Token(NamedTuple):
    """Where the row of a token comes from.

    Attributes:
        kind: model (the row of the same token in a model), model_token (that of another token),
            zero, or "" where the usual rules hold.
        model: of the first two.
        token: of model_token: a text, or the number of a row.
        force: whether models that have the token take this row all the same.
    """

    kind: str
    model: Reference | None
    token: str | int
    force: bool
    node: Node


class Tokenizer(NamedTuple):
    """The vocabulary of the result: `union`, `base`, or that of a model."""

    source: str | Reference
    tokens: Mapping[str, Token]
    multiple: int  # the rows are padded to a multiple of it; 0: they are not
    node: Node


class Document(NamedTuple):
    """A merge that mergekit's YAML asks for."""

    name: str  # "": the one that is written to --out
    method: Node
    modules: tuple[Module, ...]
    base_model: Reference | None
    parameters: Parameters
    dtype: str  # that all values are cast to first; "": as stored
    out_dtype: str  # of what is written; "": that
    tokenizer: Tokenizer | None
    chat_template: str  # of `TEMPLATES`, or a Jinja text; "": as the tokenizer has it
    node: Node

    def references(self) -> tuple[Reference, ...]:
        """The models that it names, each once: the base of each part, then its models."""
        found = [self.base_model] if self.base_model else []
        for module in self.modules:
            for part in module.slices:
                found += [part.base_model] if part.base_model else []
                found += [each.model for each in part.inputs]
        if self.tokenizer:
            for token in self.tokenizer.tokens.values():
                found += [token.model] if token.model else []
            found += [self.tokenizer.source] if isinstance(self.tokenizer.source, tuple) else []
        return tuple(dict.fromkeys(found))


def read(path: str) -> list[Document]:
    """The merges that a YAML file asks for, each after those whose results it takes.

    Raises:
        JaxmergeError: it is no YAML of mergekit's, or has what is not supported; names are missing
            or taken twice, or documents need each other.
    """
    found = [_document(node) for node in documents(path)]
    unnamed = [each for each in found if not each.name]
    if len(found) > 1 and len(unnamed) != 1:
        raise (unnamed[-1] if unnamed else found[-1]).node.error(
            "of several documents all but one have a name, and that one is the result",
            expected="name: NAME, in all but one",
            found=f"{len(unnamed)} without a name",
        )
    names = [each.name for each in found if each.name]
    for each in found:
        if names.count(each.name) > 1:
            raise each.node.error("two documents have the same name", found=each.name)
    return _in_order(found)


def result(found: Sequence[Document]) -> Document:
    """The document whose merge is the result: that without a name, of several."""
    return found[0] if len(found) == 1 else next(each for each in found if not each.name)


def _in_order(found: Sequence[Document]) -> list[Document]:
    names = {each.name for each in found if each.name}
    waiting, done, ordered = list(found), set[str](), []
    while waiting:
        ready = [
            each
            for each in waiting
            if not ({ref.path for ref in each.references()} & names - {each.name} - done)
        ]
        if not ready:
            raise waiting[0].node.error(
                "documents need each other's results",
                found=", ".join(each.name for each in waiting if each.name),
            )
        ordered += ready
        done |= {each.name for each in ready}
        waiting = [each for each in waiting if each not in ready]
    return ordered


def _document(node: Node) -> Document:
    top = node.mapping(_TOP)
    if "merge_method" not in top:
        raise node.error(
            "this is no merge of mergekit's: it has no merge_method",
            expected="merge_method: linear, or another method",
        )
    kinds = [key for key in ("models", "slices", "modules") if key in top]
    if len(kinds) != 1:
        raise node.error(
            "needs exactly one of models, slices and modules", found=", ".join(kinds) or "none"
        )
    given = {key: top[key] for key in ("tokenizer", "tokenizer_source") if key in top}
    if len(given) == 2:
        raise top["tokenizer_source"].error("tokenizer says this too", expected="one of the two")
    name = top["name"].text() if "name" in top else ""
    if name and not re.fullmatch(r"[^./\\@+\0][^/\\@+\0]*", name):
        raise top["name"].error("must be the name of a directory", found=name)
    return Document(
        name=name,
        method=top["merge_method"],
        modules=_modules(top, kinds[0], node),
        base_model=_optional(top, "base_model"),
        parameters=parameters(top.get("parameters")),
        dtype=top["dtype"].choice(DTYPES) if "dtype" in top else "",
        out_dtype=top["out_dtype"].choice(DTYPES) if "out_dtype" in top else "",
        tokenizer=_tokenizer(given),
        chat_template=_template(top.get("chat_template")),
        node=node,
    )


def _modules(top: Mapping[str, Node], kind: str, node: Node) -> tuple[Module, ...]:
    if kind != "modules":
        return (Module("", _slices(top, kind), {}, node),)
    found = []
    for name, module in top["modules"].mapping().items():
        entries = module.mapping(("models", "slices", "parameters"))
        inner = [key for key in ("models", "slices") if key in entries]
        if len(inner) != 1:
            raise module.error("needs exactly one of models and slices")
        settings = parameters(entries.get("parameters"))
        found.append(Module(name, _slices(entries, inner[0]), settings, module))
    if not found:
        raise top["modules"].error("names no module")
    return tuple(found)


def _slices(entries: Mapping[str, Node], kind: str) -> tuple[Slice, ...]:
    if kind == "models":
        node = entries["models"]
        inputs = tuple(_input(each, ("model", "parameters")) for each in node.sequence())
        return (Slice(inputs, None, {}, node),)
    return tuple(_slice(each) for each in entries["slices"].sequence())


def _slice(node: Node) -> Slice:
    entries = node.mapping(("sources", "base_model", "parameters"))
    if "sources" not in entries:
        raise node.error("a slice needs sources", found=node.shown())
    keys = ("model", "layer_range", "parameters")
    inputs = tuple(_input(each, keys) for each in entries["sources"].sequence())
    settings = parameters(entries.get("parameters"))
    return Slice(inputs, _optional(entries, "base_model"), settings, node)


def _input(node: Node, keys: tuple[str, ...]) -> Input:
    entries = node.mapping(keys)
    if "model" not in entries:
        raise node.error("names no model", expected="model: DIRECTORY", found=node.shown())
    layers = None
    if "layer_range" in entries:
        ends = entries["layer_range"].sequence()
        if len(ends) != 2 or not ends[0].whole() < ends[1].whole():
            raise entries["layer_range"].error(
                "must be two whole numbers, the first layer and that after the last",
                found=entries["layer_range"].shown(),
            )
        layers = (ends[0].whole(), ends[1].whole())
    return Input(reference(entries["model"]), layers, parameters(entries.get("parameters")), node)


def _optional(entries: Mapping[str, Node], key: str) -> Reference | None:
    return reference(entries[key]) if key in entries and entries[key].value is not None else None


def reference(node: Node) -> Reference:
    """`path[@revision][+lora[@revision]]`, or the same as a mapping.

    Raises:
        JaxmergeError: it is neither.
    """
    if isinstance(node.value, dict):
        entries = node.mapping(("model", "lora"))
        if "model" not in entries:
            raise node.error("names no model", expected="model: {path: DIRECTORY}")
        parts = [_part(entries[key]) for key in ("model", "lora") if key in entries]
    else:
        texts = node.text().split("+")
        matches = [_REFERENCE.fullmatch(each) for each in texts]
        if len(texts) > 2 or not all(matches):
            raise node.error(
                "can't be read as a model",
                expected="PATH, or PATH@REVISION, or PATH+ADAPTER",
                found=node.shown(),
            )
        parts = [(each["path"].strip(), each["revision"] or "") for each in matches if each]
    return Reference(*parts[0], *(parts[1] if len(parts) > 1 else ()))


def _part(node: Node) -> tuple[str, str]:
    if not isinstance(node.value, dict):
        return node.text(), ""
    entries = node.mapping(("path", "revision"))
    if "path" not in entries:
        raise node.error("names no model", expected="path: DIRECTORY")
    given = entries.get("revision")
    return entries["path"].text(), given.text() if given and given.value is not None else ""


def _tokenizer(given: Mapping[str, Node]) -> Tokenizer | None:
    if not given:
        return None
    (node,) = given.values()
    if "tokenizer_source" in given:
        return Tokenizer(_source(node), {}, 0, node)
    entries = node.mapping(("source", "tokens", "pad_to_multiple_of"))
    source = _source(entries["source"]) if "source" in entries else "union"
    tokens = entries["tokens"].mapping() if "tokens" in entries else {}
    padded = entries.get("pad_to_multiple_of")
    multiple = padded.whole(1) if padded and padded.value is not None else 0
    return Tokenizer(source, {key: _token(each) for key, each in tokens.items()}, multiple, node)


def _source(node: Node) -> str | Reference:
    return node.value if node.value in ("union", "base") else reference(node)


def _token(node: Node) -> Token:
    entries = node.mapping(("source", "force"))
    force = entries["force"].boolean() if "force" in entries else False
    source = entries.get("source")
    if source is None or source.value is None:
        if force:
            raise node.error("force needs a source, whose row all models take")
        return Token("", None, "", False, node)
    if not isinstance(source.value, dict) or "kind" not in source.value:
        return Token("model", reference(source), "", force, node)
    inner = source.mapping(("kind", "model", "token", "token_id"))
    kind = inner["kind"].choice(("zero", "model_token"))
    if kind == "zero":
        return Token(kind, None, "", force, node)
    if "model" not in inner or ("token" in inner) == ("token_id" in inner):
        raise source.error("needs a model and one of token and token_id", found=source.shown())
    token = inner["token"].text() if "token" in inner else inner["token_id"].whole()
    return Token(kind, reference(inner["model"]), token, force, node)


def _template(node: Node | None) -> str:
    if node is None or node.value is None:
        return ""
    text = node.text()
    if text in TEMPLATES or (len(text) >= 20 and "{" in text):
        return text
    raise node.error(
        "is no chat template", expected=f"{', '.join(TEMPLATES)}, or a Jinja text", found=text
    )


def is_yaml(path: str) -> bool:
    """Whether a path is that of a YAML file, by its name."""
    return path.endswith((".yml", ".yaml"))


def check_kind(path: str, key: str) -> None:
    """Raises `JaxmergeError` unless the first document of a file has a key that tells its kind."""
    first = documents(path)[0]
    if key in first.mapping():
        return
    commands = {"merge_method": "jaxmerge merge", "genome": "jaxmerge search"}
    other = next((each for each in commands if each in first.mapping()), "")
    raise JaxmergeError(
        f"there is no {key} in this file",
        where=path,
        expected=f"{commands[other]} {path}, for what is in it" if other else f"a YAML with {key}",
    )
