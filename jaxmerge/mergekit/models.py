"""The models that a document of mergekit's YAML names, found on this machine and looked into."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from etils import epath

from jaxmerge import textfiles
from jaxmerge.checkpoints import directory, lora
from jaxmerge.checkpoints.leaves import Values
from jaxmerge.checkpoints.safetensors import Tensor
from jaxmerge.errors import JaxmergeError
from jaxmerge.mergekit.document import Document, Reference
from jaxmerge.trees import named_leaves

_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|embed_tokens_per_layer)"
    r"\.weight$"
)
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output)\.weight$")
_HUB = re.compile(r"[\w.-]+/[\w.-]+")
# A layer is the first number among the parts of a name.
_LAYER = re.compile(r"(?P<module>.*?)\.(?P<layer>\d{1,9})\.(?P<rest>.+)")


class Place(NamedTuple):
    """Where in a model a tensor is."""

    module: str  # the name before the number of the layer
    layer: int
    rest: str

    def at(self, layer: int) -> str:
        """The name of the same tensor in another layer."""
        return f"{self.module}.{layer}.{self.rest}"


class Member(NamedTuple):
    """A model of a merge.

    Attributes:
        name: as the YAML has it.
        directory: where its config and tokenizer are.
        config: its config.json.
        function: what that says of the function of the model.
        tensors: by name, with the dtype that they are read in.
        values: reads them, see `checkpoints.leaves.Values`.
        files: where it all lies.
    """

    name: str
    directory: Path
    config: Mapping[str, Any]
    function: Mapping[str, Any]
    tensors: Mapping[str, jax.ShapeDtypeStruct]
    values: Values
    files: Mapping[str, Tensor]

    def tensor(self, name: str) -> str:
        """The tensor of this name; of a model whose output embeddings are its input ones, those."""
        if name in self.tensors or not is_head(name) or not self.tied:
            return name
        return next((each for each in self.tensors if is_embedding(each)), name)

    @property
    def tied(self) -> bool:
        """Whether input and output embeddings are one."""
        inner = self.config.get("text_config") or {}
        return bool(self.config.get("tie_word_embeddings", inner.get("tie_word_embeddings", False)))

    def layers(self) -> dict[str, int]:
        """The number of layers of each module."""
        found: dict[str, int] = {}
        for name in self.tensors:
            spot = place(name)
            if spot:
                found[spot.module] = max(found.get(spot.module, 0), spot.layer + 1)
        return found


def place(name: str) -> Place | None:
    """Where a tensor is, by its name; None: in no layer."""
    match = _LAYER.fullmatch(name)
    return Place(match["module"], int(match["layer"]), match["rest"]) if match else None


def is_embedding(name: str) -> bool:
    """Whether a tensor is the input embeddings, by its name."""
    return place(name) is None and bool(_EMBEDDING.search(name))


def is_head(name: str) -> bool:
    """Whether a tensor is the output embeddings, by its name."""
    return place(name) is None and bool(_HEAD.search(name))


def find(document: Document, made: Mapping[str, Path]) -> dict[Reference, Member]:
    """The models that a document names, as those of the same architecture.

    Args:
        document: from `document.read`.
        made: directories of the results of other documents, by their names.

    Raises:
        JaxmergeError: a model is not here or can't be read, or is of another architecture than the
            first.
    """
    members: dict[Reference, Member] = {}
    for reference in document.references():
        try:
            members[reference] = _member(reference, made)
        except JaxmergeError as error:
            raise JaxmergeError(
                error.what,
                where=f"{document.node.file}, model {reference}: {error.where}",
                expected=error.expected,
                found=error.found,
            ) from error
    first, *others = members.values()
    kinds = ("architectures", "model_type")
    for other in others:
        if any(first.config.get(key) != other.config.get(key) for key in kinds):
            raise JaxmergeError(
                "the models have different architectures",
                where=document.node.file,
                expected=f"{first.name}: {[first.config.get(key) for key in kinds]}",
                found=f"{other.name}: {[other.config.get(key) for key in kinds]}",
            )
    return members


def config_differences(first: Member, others: list[Member]) -> list[str]:
    """What configs say of the function of a model that differs from the first's, in sentences.

    The number of layers and of tokens is not told: a merge may change both.
    """

    def heeded(member: Member) -> dict[str, Any]:
        return {
            key: value
            for key, value in member.function.items()
            if key not in ("vocab_size", "num_hidden_layers", "architectures", "layer_types")
        }

    expected = heeded(first)
    found = []
    for other in others:
        own = heeded(other)
        found += [
            f"config.json: {key} is {own.get(key)!r} in {other.name}; the merge has "
            f"{expected.get(key)!r}, from {first.name}"
            for key in sorted({*expected, *own})
            if expected.get(key) != own.get(key)
        ]
    return found


def _member(reference: Reference, made: Mapping[str, Path]) -> Member:
    path = locate(reference.path, reference.revision, made)
    if (path / lora.CONFIG).exists():
        raise JaxmergeError(
            "this is an adapter, not a model", where=str(path), expected="BASE+ADAPTER in the YAML"
        )
    config = read_json(path / "config.json")
    checkpoint = directory.read(epath.Path(path), by_tensor=True)
    function = checkpoint.architecture
    abstract = named_leaves(directory.abstract(checkpoint))
    if reference.lora:
        adapter = locate(reference.lora, reference.lora_revision, made)
        laid = lora.laid(epath.Path(adapter), str(path))
        tensors = {name: abstract[name] for name in laid.tensors}
        return Member(str(reference), path, config, function, tensors, laid.values, laid.files)
    values = functools.partial(directory.read_values, checkpoint.tensors)
    return Member(str(reference), path, config, function, abstract, values, checkpoint.tensors)


def locate(path: str, revision: str = "", made: Mapping[str, Path] = MappingProxyType({})) -> Path:
    """The directory of a model: of this machine, of another document, or of the hub's cache.

    Args:
        path: a directory, the name of another document, or an id on the hub.
        revision: of the last; "": the main one.
        made: see `find`.

    Raises:
        JaxmergeError: there is none; nothing is downloaded.
    """
    if path in made:
        return made[path]
    here = Path(path).expanduser()
    if here.is_dir() and not revision:
        return here.absolute()
    if _HUB.fullmatch(path):
        from huggingface_hub import snapshot_download  # half a second
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(path, revision=revision or None, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError):
            pass
    at = f" --revision {revision}" if revision else ""
    raise JaxmergeError(
        "there is no such model here",
        where=path,
        expected="a directory"
        + (f"; or first: hf download {path}{at}" if _HUB.fullmatch(path) else ""),
    )


def count_layers(path: Path) -> int:
    """How many layers a `config.json` says; 0 where it does not.

    Raises:
        JaxmergeError: the file can't be read, or says something else.
    """
    count = read_json(path).get("num_hidden_layers", 0)
    if type(count) is not int or count < 0:
        raise JaxmergeError(
            "num_hidden_layers is no whole number",
            where=str(path),
            expected="the number of layers, as transformers writes it",
            found=str(count)[:80],
        )
    return count


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a model.

    Raises:
        JaxmergeError: it can't be read, or is no JSON object.
    """
    found = textfiles.read_json(path)
    if not isinstance(found, dict):
        raise JaxmergeError(
            "this is no JSON object", where=str(path), expected="the file as transformers writes it"
        )
    return found
