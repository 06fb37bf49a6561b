"""Orbax checkpoints: any that Orbax can read, and our own with a checksum per leaf.

The only file that imports `orbax.checkpoint.v1`, which is still experimental.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from jaxmerge.checkpoints import orbax_writing, parameters
from jaxmerge.checkpoints.digest import digests
from jaxmerge.checkpoints.leaves import Keep, as_read
from jaxmerge.checkpoints.orbax_writing import Later
from jaxmerge.checkpoints.source import Source
from jaxmerge.errors import JaxmergeError, at
from jaxmerge.models.architecture import up_to_date
from jaxmerge.textfiles import parse_json
from jaxmerge.trees import PyTree, map_named, named_leaves

_METADATA = "_CHECKPOINT_METADATA"  # of a checkpoint; older versions of Orbax wrote none
_TREE = "_METADATA"  # of a pytree, in its directory
_MARKERS = (_METADATA, _TREE, "orbax.checkpoint")
_ITEM = "state"  # of our own checkpoints
_ANEW = "the checkpoint as it was saved: copy it anew, or take another step"


def save(
    path: str | os.PathLike[str],
    params: PyTree,
    *,
    architecture: Mapping[str, Any] | None = None,
    like: Source | None = None,
    leaf: Callable[[str], jax.Array] | None = None,
) -> None:
    """Writes the parameters as one sharded checkpoint, with a checksum of every leaf.

    The directory appears whole or not at all.

    Args:
        path: the directory to make; it must not exist.
        params: pytree of arrays; or of what only says their shapes and dtypes.
        architecture: `Model.architecture`, so that the checkpoint can be opened by itself.
        like: an Orbax checkpoint whose item, subtree, carried leaves and metadata are kept, so
            that what reads it reads this one too. None: a checkpoint of our own.
        leaf: makes the leaf of a name; some are made and written before the next are, so that the
            whole tree is never in memory. None: `params` has them.

    Raises:
        JaxmergeError: there is something at `path`, or it can't be written; what is carried can't
            be read; a leaf has 64 bits.
    """
    path = absolute(path)
    with at(path):
        if path.exists():
            raise JaxmergeError(
                "there is something here already", where=str(path), expected="a path that is free"
            )
    parameters.check_width(str(path), params)
    checksums: dict[str, str] = {}
    make = leaf or named_leaves(params).__getitem__

    def made(name: str) -> Any:  # of NumPy too
        found = make(name)
        checksums.update({name: digest.checksum for name, digest in digests({name: found}).items()})
        return found

    def wanted(name: str, of: Any) -> Any:
        if leaf is None and not isinstance(of, jax.Array):  # of NumPy, which Orbax tells apart
            return made(name)
        return Later(functools.partial(made, name), of.shape, of.dtype)

    tree = map_named(wanted, params)
    ours = {"checksums": checksums, "architecture": dict(architecture or {})}
    custom: Any = {"jaxmerge": {**ours, "subtree": like.subtree if like else ""}}
    item = _ITEM
    if like is not None:
        custom, item = {**like.custom, **custom}, like.item
        if like.carried:
            carried = _load(like, _repeated(like.carried, params))
            tree = parameters.joined(tree, jax.tree.map(_kept, carried))
        tree = parameters.under(tree, like.subtree)
    with at(path), _system_errors():
        orbax_writing.write(path, item, tree, custom)


@contextlib.contextmanager
def _system_errors() -> Iterator[None]:
    """What the system refuses, as an `OSError`: tensorstore only puts the number in its text."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if not code:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def recognises(path: epath.Path) -> bool:
    """Whether there is a finished Orbax checkpoint here, or an item of one."""
    if not path.is_dir():
        return False
    directory, _ = _step_and_item(path)
    # Orbax itself takes any directory for a checkpoint, even an empty one.
    marked = any((directory / marker).exists() for marker in _MARKERS) or _items(directory)
    return bool(marked) and _orbax().is_orbax_checkpoint(directory)


def describe(
    name: str, path: epath.Path, subtree: str = "", base: str = "", item: str = ""
) -> Source:
    """Reads the metadata of a checkpoint: kilobytes, whatever its size.

    Args:
        name: unique in the pool.
        path: of the checkpoint, or of one of its items, such as MaxText's `<step>/items`.
        subtree: where in it the parameters are; "": see `parameters.subtree`. Where the step holds
            several items, it may begin with the name of one.
        base: not heeded: a checkpoint holds a whole model.
        item: of a step with several, the one that holds the parameters; "": see `parameters.item`.

    Raises:
        JaxmergeError: the metadata can't be read, or hold no such item or subtree; it is not clear
            which item or subtree holds the parameters; a parameter has 64 bits.
    """
    directory, item = _which(path, item, subtree)
    if item and subtree.split("/")[0] == item and len(_items(directory)) > 1:
        subtree = subtree[len(item) + 1 :]
    metadata = _metadata(directory, item)
    custom = dict(metadata.custom_metadata or {})
    ours: Any = custom.pop("jaxmerge", {})
    where, tree = str(directory / item), metadata.metadata
    found = subtree or ours.get("subtree", "") or parameters.subtree(where, tree)
    beside = () if subtree else parameters.beside(tree, found)
    whole = map_named(
        lambda leaf, of: _abstract(where, leaf, of), parameters.at(where, tree, found)
    )
    if len(named_leaves(whole)) != len(jax.tree.leaves(whole)):
        raise JaxmergeError(
            "two leaves of the checkpoint have the same name, with / between the keys",
            where=where,
            expected="keys that have no / in them, or tell leaves apart all the same",
        )
    checksums = ours.get("checksums", {}) if found == ours.get("subtree", "") else {}
    abstract, carried = parameters.split(whole, checksums)
    parameters.check_width(where, abstract)
    return Source(
        name=name,
        path=str(directory),
        format="orbax",
        abstract=abstract,
        subtree=found,
        architecture=up_to_date(ours.get("architecture", {})),
        checksums=checksums,
        item=item,
        carried=carried,
        custom=custom,
        beside=beside,
    )


def restore(source: Source, abstract: PyTree, keep: Keep = as_read) -> PyTree:
    """Reads the parameters straight into their shards.

    Args:
        source: from `describe`.
        abstract: `ShapeDtypeStruct` with shardings, on this or any other mesh; leaves that it
            leaves out are not read.
        keep: called with the name of each leaf and the leaf, which what it returns replaces.

    Raises:
        JaxmergeError: data are missing or cut short.
    """
    return map_named(keep, _load(source, abstract))


def _load(source: Source, abstract: PyTree) -> PyTree:
    """Some of a checkpoint's leaves."""
    wanted = parameters.under(abstract, source.subtree)
    ocp = _orbax()
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    # Bytes on their way from disk: one leaf, or small ones together; it must exceed the largest.
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract)]
    context.memory.read_concurrent_bytes = max(2**26, max(sizes, default=0) + 2**20)
    try:
        with _buffers_returned(), context:
            tree = ocp.load(source.path, wanted, checkpointable_name=source.item or None)
            jax.block_until_ready(tree)
    except Exception as error:  # Orbax raises Exception itself for a file that is cut short
        # Narrower types that no file is the reason of, such as JAX's for a device without memory,
        # go on as they are.
        unreadable = (OSError, ValueError, ocp.errors.InvalidLayoutError)
        if type(error) is not Exception and not isinstance(error, unreadable):
            raise
        cause = error.__cause__ if type(error) is Exception else error
        raise JaxmergeError(
            "the checkpoint's data can't be read: a file is missing or cut short",
            where=source.path,
            expected=_ANEW,
            found=_first_line(cause),
        ) from error
    return parameters.at(source.path, tree, source.subtree)


def _kept(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray):  # which Orbax tells apart
        return leaf
    return Later(lambda: leaf, leaf.shape, leaf.dtype)


def _repeated(abstract: PyTree, beside: PyTree) -> PyTree:
    """The leaves with a sharding: whole on every device that others lie on.

    Those of 64 bits, which JAX would cut, are asked for as NumPy's.
    """
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    where = getattr(jax.tree.leaves(beside)[0], "sharding", None) or here
    if isinstance(where, NamedSharding):
        where = NamedSharding(where.mesh, PartitionSpec())
    wide = (np.int64, np.uint64)
    return jax.tree.map(
        lambda leaf: (
            np.empty(leaf.shape, leaf.dtype)
            if leaf.dtype in wide
            else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
        ),
        abstract,
    )


def _step_and_item(path: epath.Path) -> tuple[epath.Path, str]:
    """The checkpoint that a path names, and the item of it that it names, if it does."""
    inside = (path / _TREE).exists() and not (path / _METADATA).exists()
    if inside and (path.parent / _METADATA).exists():
        return path.parent, path.name
    return path, ""


def _items(directory: epath.Path) -> list[str]:
    """The pytrees of a step; none where the tree lies in the directory itself."""
    if (directory / _TREE).exists():
        return []
    return sorted(each.name for each in directory.iterdir() if (each / _TREE).exists())


def _which(path: epath.Path, item: str, subtree: str) -> tuple[epath.Path, str]:
    """The checkpoint, and its item that holds the parameters; "": it has no items."""
    directory, named = _step_and_item(path)
    items = _items(directory)
    for wanted in filter(None, (named, item)):
        if wanted not in items or wanted != (item or named):
            raise JaxmergeError(
                f"the checkpoint has no item {item!r}",
                where=str(path),
                expected="pool.item: one of those that are there, or nothing",
                found=", ".join(items) or "a tree without items",
            )
    if item or named or not items:
        return directory, item or named
    if len(items) > 1 and subtree.split("/")[0] in items:
        return directory, subtree.split("/")[0]

    def has_arrays(name: str) -> bool:
        leaves = jax.tree.leaves(_metadata(directory, name).metadata)
        return any(hasattr(leaf, "shape") for leaf in leaves)

    return directory, parameters.item(str(directory), items, has_arrays)


def _metadata(directory: epath.Path, item: str) -> Any:
    """What Orbax says of an item, or of a checkpoint without items."""
    ocp = _orbax()
    # What it raises for metadata that are missing, cut short or garbled.
    broken = (OSError, ValueError, KeyError, TypeError, ocp.errors.InvalidLayoutError)
    try:
        metadata = ocp.metadata(directory, item or None)
    except broken as error:
        raise JaxmergeError(
            "the checkpoint's metadata can't be read",
            where=str(directory),
            expected=_ANEW,
            found=_first_line(error),
        ) from error
    lost = metadata.init_timestamp_nsecs is None  # Orbax logs this and goes on, without checksums
    if lost and ((directory / _METADATA).exists() or _is_ours(directory / item / _TREE)):
        raise JaxmergeError(
            "the checkpoint's metadata can't be read",
            where=str(directory / _METADATA),
            expected=_ANEW,
        )
    return metadata


def _is_ours(tree: epath.Path) -> bool:
    said = parse_json(tree.read_bytes(), str(tree)) if tree.exists() else None
    return isinstance(said, dict) and said.get("custom_metadata") == orbax_writing.MARK


def absolute(path: str | os.PathLike[str]) -> epath.Path:
    """The path as Orbax wants it: absolute, or a URL left as it is."""
    path = epath.Path(path).expanduser()
    return path if "://" in str(path) else path.resolve()


def _orbax() -> Any:
    from orbax.checkpoint import v1  # takes a third of a second to import

    return v1


def _abstract(path: str, name: str, found: Any) -> jax.ShapeDtypeStruct:
    if not hasattr(found, "shape") or not hasattr(found, "dtype"):
        raise JaxmergeError(
            "a leaf of the checkpoint is no array",
            where=f"{path}, leaf {name}",
            expected="parameters alone; pool.subtree names the part that holds them",
            found=type(found).__name__,
        )
    return jax.ShapeDtypeStruct(found.shape, found.dtype)


@contextlib.contextmanager
def _buffers_returned() -> Iterator[None]:
    """Lets glibc give large buffers back to the system as soon as they are freed.

    It would keep those below 32 MiB for the thread that read them: more than a checkpoint in all.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt"):
        yield
        return
    mmap_threshold, trim_threshold = -3, -1  # malloc.h
    libc.mallopt(mmap_threshold, 2**20)
    try:
        yield
    finally:
        # Where glibc's own adjustment ends: big enough for what a program uses again and again.
        libc.mallopt(mmap_threshold, 2**25)
        libc.mallopt(trim_threshold, 2**26)
        libc.malloc_trim(0)


def _first_line(error: BaseException | None) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
