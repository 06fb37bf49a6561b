"""Hugging Face directories of safetensors: read by byte range into shards, written leaf by leaf.

A leaf is rows of tensors one after the other (`models.layout`), so nothing is transposed or copied
on its way between the file and its place on the mesh.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxmerge.checkpoints import directory
from jaxmerge.checkpoints.leaves import Keep, as_read, restore_leaves
from jaxmerge.checkpoints.rows import resized
from jaxmerge.checkpoints.safetensors import in_file_order, make_header, write_at
from jaxmerge.checkpoints.source import Source
from jaxmerge.durable import appear, making
from jaxmerge.errors import JaxmergeError
from jaxmerge.models.layout import Layout
from jaxmerge.textfiles import parse_json, read_text
from jaxmerge.trees import PyTree, named_leaves

_NAMES = (directory.WEIGHTS, directory.INDEX, *directory.PICKLES)

# What a model needs besides config.json and weights. Nothing else is copied: no weights, no
# adapters, no pickles and no code.
_COPIED = re.compile(r"generation_config\.json|(LICENSE|NOTICE)(\.txt|\.md)?")
_TOKENIZER = re.compile(
    r"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|"
    r"added_tokens\.json|vocab\.json|vocab\.txt|merges\.txt|(tokenizer|spiece)\.model|"
    r"chat_template\.(jinja|json)"
)
_TEMPLATES = "additional_chat_templates"


def recognises(path: epath.Path) -> bool:
    """Whether there are a model's weights here, be it in files that are refused."""
    return path.is_dir() and any((path / name).exists() for name in _NAMES)


def describe(
    name: str,
    path: epath.Path,
    subtree: str = "",
    base: str = "",
    item: str = "",
    *,
    by_tensor: bool = False,
) -> Source:
    """Reads the config and the headers of the weights.

    Args:
        name: unique in the pool.
        path: the directory.
        subtree: not heeded: a directory holds parameters alone.
        base: not heeded: a directory holds a whole model.
        item: not heeded, as `subtree`.
        by_tensor: see `directory.read`.

    Raises:
        JaxmergeError: see `directory.read`.
    """
    checkpoint = directory.read(path, by_tensor=by_tensor)
    return Source(
        name=name,
        path=str(path),
        format="huggingface",
        abstract=directory.abstract(checkpoint),
        subtree="",
        architecture=checkpoint.architecture,
        checksums={},
        directory=str(path),
        tensors=checkpoint.tensors,
    )


def restore(source: Source, abstract: PyTree, keep: Keep = as_read) -> PyTree:
    """Reads the parameters straight into their shards, leaf by leaf.

    Args:
        source: from `describe`.
        abstract: `ShapeDtypeStruct` with shardings, dtypes as stored; leaves that it leaves out
            are not read.
        keep: called with the name of each leaf and the leaf, which what it returns replaces.

    Raises:
        JaxmergeError: a file can't be read or is cut short.
    """
    # As `describe` read it: a decoder's leaves, or tensors by their names.
    by_tensor = source.architecture.get("model") != "decoder"
    checkpoint = directory.read(epath.Path(source.path), by_tensor=by_tensor)
    if "embedding" in named_leaves(abstract):
        directory.check_twins(checkpoint)
    values = functools.partial(directory.read_values, checkpoint.tensors)
    layout = checkpoint.layout
    if source.rows:
        values = source.rows.values(values, layout.tensors)
        layout = resized(layout, source.rows.count)
    return restore_leaves(abstract, layout, values, keep)


def layout(path: str, *, by_tensor: bool = False) -> Layout:
    """How the leaves of a directory's model make up its tensors.

    Args:
        path: of the directory.
        by_tensor: see `directory.read`.

    Raises:
        JaxmergeError: see `directory.read`.
    """
    where = epath.Path(path)
    # A base need not have weights: of a model that is known, the config is enough.
    alone = not by_tensor and not any(where.glob("*.safetensors"))
    known = directory.known(where) if alone else None
    return known or directory.read(where, by_tensor=by_tensor).layout


def save(
    path: str | os.PathLike[str],
    layout: Layout,
    leaf: Callable[[str], jax.Array],
    *,
    abstract: PyTree,
    like: str,
    tokenizer: str = "",
    dtype: str = "",
    shard_bytes: int = 5 * 10**9,
    card: Callable[[], str] | None = None,
) -> None:
    """Writes a directory that transformers reads, one leaf in host memory at a time.

    The directory appears whole or not at all. The files are those that transformers would write.

    Args:
        path: the directory to make; it must not exist.
        layout: how leaves make up tensors, see `layout`.
        leaf: gives the leaf of a name; called once for each.
        abstract: tree of the leaves, or of their `ShapeDtypeStruct`: headers come before values.
        like: Hugging Face directory with the config, tokenizer and chat template to copy.
        tokenizer: directory of another tokenizer and chat template; "": those of `like`.
        dtype: of the floating-point tensors, rounded to nearest even; "" keeps that of the leaves.
        shard_bytes: no file holds more tensors than this, unless a single one does.
        card: text of README.md; called when all leaves have been written.

    Raises:
        JaxmergeError: there is something at `path`; it can't be written; leaves are not those of
            the layout; a value is too large for `dtype`.
    """
    target = Path(path).absolute()
    if target.exists() or target.is_symlink():
        raise JaxmergeError(
            "there is something here already", where=str(path), expected="a path that is free"
        )
    dtypes = _tensor_dtypes(layout, abstract, dtype)
    tensors = {
        name: jax.ShapeDtypeStruct(shape, dtypes[name]) for name, shape in layout.tensors.items()
    }
    files = split(tensors, shard_bytes, layout.wide)
    with making(target, "the model") as new:
        _write_files(new, files, layout, leaf)
        publish(new, target, files, like, card, tokenizer)


class WeightsFile(NamedTuple):
    """A file of weights to be written."""

    name: str
    tensors: Mapping[str, jax.ShapeDtypeStruct]  # in the order of the file
    header: bytes
    starts: Mapping[str, int]  # where each tensor begins
    size: int


def split(
    tensors: Mapping[str, jax.ShapeDtypeStruct],
    limit: int,
    wide: Mapping[str, np.dtype] = MappingProxyType({}),
) -> list[WeightsFile]:
    """Tensors to files, layer after layer, each as full as the limit of bytes allows.

    Args:
        tensors: those of the model.
        limit: bytes of a file, unless a single tensor has more.
        wide: see `Layout.wide`.
    """

    def stored(name: str) -> tuple[np.dtype, tuple[int, ...]]:
        tensor = tensors[name]
        return (
            (wide[name], tensor.shape[:-1])
            if name in wide
            else (np.dtype(tensor.dtype), tensor.shape)
        )

    def by_number(name: str) -> list[tuple[bool, int, str]]:
        parts = re.split(r"(\d{1,18})", name)
        return [(each.isdecimal(), int(each) if each.isdecimal() else 0, each) for each in parts]

    groups: list[list[str]] = [[]]
    size = 0
    for name in sorted(tensors, key=by_number):
        if groups[-1] and size + _bytes(tensors[name]) > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += _bytes(tensors[name])
    files = []
    for number, group in enumerate(groups, start=1):
        order = in_file_order({name: stored(name)[0] for name in group})
        header = make_header((name, *stored(name)) for name in order)
        starts, at = {}, len(header)
        for name in order:
            starts[name] = at
            at += _bytes(tensors[name])
        alone = len(groups) == 1
        file = directory.WEIGHTS if alone else f"model-{number:05}-of-{len(groups):05}.safetensors"
        files.append(WeightsFile(file, {name: tensors[name] for name in order}, header, starts, at))
    return files


def publish(
    new: Path,
    target: Path,
    files: Sequence[WeightsFile],
    like: str,
    card: Callable[[], str] | None = None,
    tokenizer: str = "",
    rest: Callable[[Path], None] = lambda new: None,
) -> None:
    """Adds to a directory of written weights what else a model needs, and gives it its name.

    Args:
        new: the directory; the weights are in it.
        target: what it is to be called, beside `new`.
        files: the weights.
        like: see `save`.
        card: see `save`.
        tokenizer: see `save`.
        rest: called with the directory after that, to change it and to add to it.
    """
    _write_index(new, files)
    copy_files(Path(like), new, _most_common(files), Path(tokenizer or like))
    rest(new)
    if card:
        (new / "README.md").write_text(card(), "utf-8", errors="backslashreplace")
    appear(new, target)


def _bytes(tensor: jax.ShapeDtypeStruct) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _tensor_dtypes(layout: Layout, abstract: PyTree, dtype: str) -> dict[str, np.dtype]:
    """The dtype that each tensor is written in."""
    leaves = named_leaves(abstract)
    wrong = [
        f"{name} is {leaves[name].shape if name in leaves else 'missing'}, not {shape}"
        for name, shape in layout.shapes.items()
        if name not in leaves or leaves[name].shape != shape
    ]
    wrong += [f"{name} is not known" for name in leaves if name not in layout.shapes]
    if wrong:
        raise JaxmergeError(
            "the leaves are not those of the layout:\n  " + "\n  ".join(wrong),
            expected="a tree as the model's pool has it, each leaf of its name and shape",
        )
    dtypes: dict[str, np.dtype] = {}
    for name, parts in layout.leaves.items():
        stored = jnp.dtype(leaves[name].dtype)
        if dtype and jnp.issubdtype(stored, jnp.floating):
            stored = jnp.dtype(dtype)
        for part in parts:
            dtypes[part.tensor] = jnp.promote_types(stored, dtypes.get(part.tensor, stored))
    return {name: dtypes[name] for name in layout.tensors}


def _write_files(
    new: Path, files: Sequence[WeightsFile], layout: Layout, leaf: Callable[[str], jax.Array]
) -> None:
    """Leaf after leaf, the rows of each tensor to their place in whichever file has it."""
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(open(new / file.name, "wb", 0)) for file in files]
        place = {}
        for file, stream in zip(files, streams):
            os.posix_fallocate(stream.fileno(), 0, file.size)  # a full disk is found now
            write_at(stream.fileno(), 0, np.frombuffer(file.header, np.uint8))
            for name, tensor in file.tensors.items():
                place[name] = (stream.fileno(), file.starts[name], np.dtype(tensor.dtype))
        for name, parts in layout.leaves.items():
            wanted = functools.reduce(jnp.promote_types, (place[p.tensor][2] for p in parts))
            values, at = _host(name, leaf(name), wanted).reshape(-1), 0
            for part in parts:
                descriptor, start, dtype = place[part.tensor]
                row = math.prod(layout.tensors[part.tensor][1:])
                count = (part.stop - part.start) * row
                rows = values[at : at + count].astype(dtype, copy=False)
                write_at(descriptor, start + part.start * row * dtype.itemsize, rows)
                at += count


def _host(name: str, leaf: jax.Array, dtype: np.dtype) -> np.ndarray:
    """A leaf in host memory, cast; not the caller's array, which would keep the host's copy."""
    cast = jnp.array(leaf, dtype=dtype, copy=True)
    if cast.dtype != leaf.dtype and not jnp.isfinite(cast).all():
        raise JaxmergeError(
            f"leaf {name} has values that are too large for {dtype}",
            expected="bfloat16 or float32",
        )
    return np.asarray(cast)


def _write_index(new: Path, files: Sequence[WeightsFile]) -> None:
    if len(files) == 1:
        return
    shapes = [tensor.shape for file in files for tensor in file.tensors.values()]
    index = {
        "metadata": {
            "total_parameters": sum(map(math.prod, shapes)),
            "total_size": sum(file.size - len(file.header) for file in files),
        },
        "weight_map": {name: file.name for file in files for name in file.tensors},
    }
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (new / directory.INDEX).write_text(text)


def copy_files(like: Path, new: Path, dtype: str, tokenizer: Path) -> None:
    """What transformers needs besides the weights.

    Args:
        like: directory of the config, and of the licence.
        new: where they go.
        dtype: that the weights have now, which the config says then; "": as it was.
        tokenizer: directory of the tokenizer and chat template.
    """
    _copy_matching(like, new, _COPIED)
    copy_tokenizer(tokenizer, new)
    if not (like / "config.json").exists():
        return
    text = read_text(like / "config.json")
    config = parse_json(text.encode(), str(like / "config.json"))
    named = [key for key in ("dtype", "torch_dtype") if config.get(key)]  # of version 5, and before
    if dtype and any(config[key] != dtype for key in named):
        config |= dict.fromkeys(named, dtype)
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (new / "config.json").write_text(text)


def copy_tokenizer(tokenizer: Path, new: Path) -> None:
    """The files of a tokenizer, with its chat templates."""
    _copy_matching(tokenizer, new, _TOKENIZER)
    for template in sorted((tokenizer / _TEMPLATES).glob("*.jinja")):
        (new / _TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(template, new / _TEMPLATES / template.name)


def _copy_matching(place: Path, new: Path, wanted: re.Pattern[str]) -> None:
    for file in sorted(place.iterdir()):
        if wanted.fullmatch(file.name) and file.is_file():
            shutil.copyfile(file, new / file.name)


def _most_common(files: Sequence[WeightsFile]) -> str:
    """The floating-point dtype of most values; "" where there is none."""
    count: Counter[str] = Counter()
    for file in files:
        for tensor in file.tensors.values():
            if jnp.issubdtype(tensor.dtype, jnp.floating):
                count[str(tensor.dtype)] += math.prod(tensor.shape)
    return count.most_common(1)[0][0] if count else ""
