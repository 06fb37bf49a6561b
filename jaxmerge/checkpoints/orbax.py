"""Orbax checkpoints: any that Orbax can read, and our own with a checksum per leaf.

The only file that imports `orbax.checkpoint.v1`, which is still experimental.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils import epath

from jaxmerge.checkpoints.digest import digests
from jaxmerge.checkpoints.leaves import Keep, as_read
from jaxmerge.checkpoints.source import Source
from jaxmerge.errors import JaxmergeError, at
from jaxmerge.trees import PyTree, map_named

_METADATA = "_CHECKPOINT_METADATA"
_MARKERS = (_METADATA, "_METADATA", "orbax.checkpoint")


def save(
    path: str | os.PathLike[str], params: PyTree, *, architecture: Mapping[str, Any] | None = None
) -> None:
    """Writes the parameters as one sharded checkpoint, with a checksum of every leaf.

    The directory appears whole or not at all. Nothing is compressed: the bytes of weights hardly
    shrink, and zstd makes the writing several times slower.

    Args:
        path: the directory to make; it must not exist.
        params: pytree of arrays.
        architecture: `Model.architecture`, so that the checkpoint can be opened by itself.

    Raises:
        JaxmergeError: there is something at `path`, or it can't be written.
    """
    path = absolute(path)
    with at(path):
        if path.exists():
            raise JaxmergeError(
                "there is something here already", where=str(path), expected="a path that is free"
            )
    checksums = {name: digest.checksum for name, digest in digests(params).items()}
    ours: Any = {"checksums": checksums, "architecture": dict(architecture or {})}
    ocp = _orbax()
    context = ocp.Context()
    context.array.saving.use_compression = False
    with at(path), _system_errors(), context:
        ocp.save(path, params, custom_metadata={"jaxmerge": ours})


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
    """Whether there is a finished Orbax checkpoint here."""
    # Orbax itself takes any directory for a checkpoint, even an empty one.
    marked = path.is_dir() and any((path / marker).exists() for marker in _MARKERS)
    return marked and _orbax().is_orbax_checkpoint(path)


def describe(name: str, path: epath.Path, subtree: str = "", base: str = "") -> Source:
    """Reads the metadata of a checkpoint: kilobytes, whatever its size.

    Args:
        name: unique in the pool.
        path: of the checkpoint.
        subtree: where in it the parameters are; "" for all of it.
        base: not heeded: a checkpoint holds a whole model.

    Raises:
        JaxmergeError: the metadata can't be read, or hold no such subtree.
    """
    ocp = _orbax()
    # What it raises for metadata that are missing, cut short or garbled.
    broken = (OSError, ValueError, KeyError, TypeError, ocp.errors.InvalidLayoutError)
    try:
        metadata = ocp.metadata(path)
    except broken as error:
        raise JaxmergeError(
            "the checkpoint's metadata can't be read", where=str(path), found=_first_line(error)
        ) from error
    if metadata.init_timestamp_nsecs is None and (path / _METADATA).exists():
        # Orbax logs this and goes on; the checksums would be lost.
        raise JaxmergeError("the checkpoint's metadata can't be read", where=str(path / _METADATA))
    tree = metadata.metadata
    for key in filter(None, subtree.split("/")):
        if not isinstance(tree, Mapping) or key not in tree:
            keys = sorted(tree) if isinstance(tree, Mapping) else "no further keys"
            raise JaxmergeError(
                f"the checkpoint has no subtree {subtree!r}", where=str(path), found=f"keys: {keys}"
            )
        tree = tree[key]
    custom: Any = metadata.custom_metadata or {}
    ours = custom.get("jaxmerge", {})
    return Source(
        name=name,
        path=str(path),
        format="orbax",
        abstract=map_named(lambda leaf, found: _abstract(str(path), leaf, found), tree),
        subtree=subtree,
        architecture=ours.get("architecture", {}),
        checksums=ours.get("checksums", {}) if not subtree else {},
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
    wanted = abstract
    for key in reversed([key for key in source.subtree.split("/") if key]):
        wanted = {key: wanted}
    ocp = _orbax()
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    # Bytes on their way from disk: one leaf, or small ones together; it must exceed the largest.
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract)]
    context.memory.read_concurrent_bytes = max(2**26, max(sizes, default=0) + 2**20)
    try:
        with _buffers_returned(), context:
            tree = ocp.load(source.path, wanted)
            jax.block_until_ready(tree)
    except Exception as error:
        # Orbax raises Exception itself for a file that is cut short. Narrower types that no file
        # is the reason of, such as JAX's for a device without memory, go on as they are.
        unreadable = (OSError, ValueError, ocp.errors.InvalidLayoutError)
        if type(error) is not Exception and not isinstance(error, unreadable):
            raise
        cause = error.__cause__ if type(error) is Exception else error
        raise JaxmergeError(
            "the checkpoint's data can't be read: a file is missing or cut short",
            where=source.path,
            found=_first_line(cause),
        ) from error
    for key in filter(None, source.subtree.split("/")):
        tree = tree[key]
    return map_named(keep, tree)


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
