"""What is known of a checkpoint before its data are read."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxmerge.checkpoints.safetensors import Tensor
from jaxmerge.trees import PyTree


class Source(NamedTuple):
    """A checkpoint on disk.

    Attributes:
        name: unique in its pool.
        path: absolute, or a URL such as `gs://bucket/run/checkpoint`.
        format: the module of `jaxmerge.checkpoints` that reads it.
        abstract: its parameters as `ShapeDtypeStruct`, as stored.
        subtree: where in the checkpoint the parameters are, such as `params`; "" for all of it.
        architecture: what rebuilds the model; {} where the checkpoint does not say.
        checksums: per leaf name, written when it was saved; {} where it was saved by others.
        directory: where the Hugging Face config and tokenizer files are; "" where there are none.
        base: the checkpoint that an adapter is laid upon; "" for a whole model.
        tensors: where each tensor of a Hugging Face directory lies; {} for other formats.
        item: of an Orbax checkpoint with named items, the one that holds the parameters.
        carried: its leaves that are not merged, as `ShapeDtypeStruct`: what is written takes those
            of the first checkpoint, see `parameters.split`.
        view: what the leaves are of a trainer's checkpoint that is taken for one of the decoder,
            see `trainers.View`; None for all others.
        rows: how its embeddings are read in the vocabulary of the pool, see `rows.Rows`; None: as
            they are stored.
        custom: what others wrote beside an Orbax or zarr checkpoint, kept with what is written.
        beside: keys of an Orbax tree that hold other arrays of a model, which are not merged.
    """

    name: str
    path: str
    format: str
    abstract: PyTree
    subtree: str
    architecture: Mapping[str, Any]
    checksums: Mapping[str, str]
    directory: str = ""
    base: str = ""
    tensors: Mapping[str, Tensor] = MappingProxyType({})
    item: str = ""
    carried: PyTree = MappingProxyType({})
    custom: Mapping[str, Any] = MappingProxyType({})
    view: Any = None
    rows: Any = None
    beside: tuple[str, ...] = ()
