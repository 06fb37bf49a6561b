"""NumPy's `.npz`: one file of named arrays, as big_vision and many scripts write their parameters.

Names have a slash between keys: `params/img/kernel`. A file is a zip archive of `.npy` files,
compressed or not; each has a checksum, which is compared when it is read.
"""

from __future__ import annotations

import lzma
import math
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxmerge.checkpoints import parameters
from jaxmerge.checkpoints.leaves import Keep, as_read
from jaxmerge.checkpoints.source import Source
from jaxmerge.durable import replacing
from jaxmerge.errors import JaxmergeError
from jaxmerge.hosts import processes
from jaxmerge.trees import PyTree, map_named, named_leaves, nested

_SUFFIX = ".npz"  # with a step behind it in big_vision: checkpoint.npz-000010000
_MOST = 1032  # bytes that one of a compressed file can stand for
_BROKEN = (  # what zipfile and NumPy raise for files that are cut short or garbled
    *(OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
    *(OverflowError, MemoryError),  # a garbled header asks for an array of any size
    # zipfile: of an encrypted file; and NotImplementedError, which is one, of a compression or a
    # version that it does not know. Nothing but zipfile and NumPy runs where these are caught.
    RuntimeError,
)


def recognises(path: epath.Path) -> bool:
    """Whether this is such a file."""
    return _SUFFIX in path.name and path.is_file()


def describe(
    name: str, path: epath.Path, subtree: str = "", base: str = "", item: str = ""
) -> Source:
    """Reads the names, shapes and dtypes.

    Args:
        name: unique in the pool.
        path: of the file.
        subtree: where in it the parameters are; "": `params` where it is all that there is,
            `opt/target`, where big_vision once had them, if `params` is not there; else see
            `parameters.subtree`.
        base: not heeded: a file holds a whole model.
        item: not heeded: a file has none.

    Raises:
        JaxmergeError: the file can't be read; there is no such subtree; an array is none that can
            be merged.
    """
    where = str(path)
    with _opened(where) as archive:
        names = nested({each: each for each in _names(archive, where)})
        found = subtree or _subtree(where, names)
        taken = parameters.below(where, names, found)
        headers = jax.tree.map(lambda each: _header(archive, each, where), taken)
    abstract, carried = parameters.split(headers, {})
    return Source(name, where, "npz", abstract, found, {}, {}, carried=carried)


def restore(source: Source, abstract: PyTree, keep: Keep = as_read) -> PyTree:
    """Reads the parameters array by array, each whole on its way to its shards.

    Args:
        source: from `describe`.
        abstract: `ShapeDtypeStruct` with shardings; leaves that it leaves out are not read.
        keep: called with the name of each leaf and the leaf, which what it returns replaces.

    Raises:
        JaxmergeError: data are missing or damaged.
    """
    prefix = _prefix(source)
    with _opened(source.path) as archive:

        def read(name: str, leaf: jax.ShapeDtypeStruct) -> Any:
            with _readable(f"{source.path}, array {name}"):
                with archive.open(f"{prefix}{name}.npy") as stream:
                    array = np.lib.format.read_array(stream, allow_pickle=False)
                array = array.view(leaf.dtype) if array.dtype.kind == "V" else array
                array = np.asarray(array, leaf.dtype, order="C").reshape(leaf.shape)
            where = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
            placed = jax.make_array_from_callback(leaf.shape, where, lambda index: array[index])
            return keep(name, jax.block_until_ready(placed))

        return map_named(read, abstract)


def save(
    path: str | os.PathLike[str],
    abstract: PyTree,
    leaf: Callable[[str], jax.Array],
    like: Source | None = None,
) -> None:
    """Writes leaves as `numpy.savez` does, one after the other; process 0 does so for all.

    Args:
        path: of the file.
        abstract: tree of the leaves.
        leaf: gives the leaf of a name; called once for each.
        like: such a file, whose subtree and carried arrays are kept, see `parameters.split`.

    Raises:
        JaxmergeError: it can't be written; what is carried can't be read.
    """
    names = list(named_leaves(abstract))
    if not processes.first():
        for name in names:
            processes.gather(leaf(name))
        return
    prefix = _prefix(like) if like else ""
    carried = named_leaves(restore(like, like.carried)) if like and like.carried else {}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(Path(path)) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name in [*names, *carried]:
            array = np.asarray(carried[name]) if name in carried else processes.gather(leaf(name))
            if array.dtype == jnp.bfloat16:  # NumPy writes it without its name
                array = array.view("V2")
            with archive.open(f"{prefix}{name}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, array, allow_pickle=False)


def _prefix(source: Source) -> str:
    return f"{source.subtree}/" if source.subtree else ""


def _subtree(where: str, tree: PyTree) -> str:
    """What big_vision takes for the parameters."""
    if isinstance(tree.get("opt"), Mapping) and "target" in tree["opt"] and "params" not in tree:
        return "opt/target"
    if list(tree) == ["params"]:
        return "params"
    return parameters.subtree(where, tree)


@contextmanager
def _readable(where: str) -> Iterator[None]:
    """What a file does not hold as it should be is said in one message."""
    try:
        yield
    except _BROKEN as error:
        raise JaxmergeError(
            "this can't be read",
            where=where,
            expected="a whole .npz that this user may read; copy it anew",
            found=f"{type(error).__name__}: {error}"[:300],
        ) from error


@contextmanager
def _opened(path: str) -> Iterator[zipfile.ZipFile]:
    with ExitStack() as stack:
        with _readable(path):
            stream = stack.enter_context(epath.Path(path).open("rb"))
            archive = stack.enter_context(zipfile.ZipFile(stream))
        yield archive


def _names(archive: zipfile.ZipFile, where: str) -> list[str]:
    """The names of the arrays."""
    times = Counter(archive.namelist())
    wrong = [file for file, count in times.items() if count > 1 or not file.endswith(".npy")]
    if wrong or not times:
        raise JaxmergeError(
            "the file holds something that is no array, or two of one name",
            where=where,
            expected="arrays alone, as numpy.savez writes them",
            found=wrong[0] if wrong else "nothing",
        )
    return [file.removesuffix(".npy") for file in times]


def _header(archive: zipfile.ZipFile, name: str, where: str) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array that the file can hold."""
    info, at = archive.getinfo(f"{name}.npy"), f"{where}, array {name}"
    with _readable(at), archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_2_0
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else read
        shape, _, dtype = read(stream)
        begin = stream.tell()
    dtype = np.dtype(jnp.bfloat16) if dtype == np.dtype("V2") else dtype
    header = parameters.header(at, shape, dtype)
    size = begin + math.prod(shape) * dtype.itemsize
    if size != info.file_size or size > _MOST * info.compress_size + _MOST:
        raise JaxmergeError(
            "the file contradicts itself",
            where=at,
            expected=f"{size} bytes for {dtype}{list(shape)}",
            found=f"{info.file_size}, of {info.compress_size} in the file",
        )
    return header
