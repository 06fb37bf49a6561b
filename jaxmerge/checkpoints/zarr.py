"""Directories of zarr arrays, as Levanter and EasyDeL write them: read and written by tensorstore.

Each leaf is an array of its own, in a directory that has its name, or all are in one OCDBT
database. What these trainers write beside them, in JSON, is kept.

A chunk of zeros need not be stored in zarr, so of arrays in directories nothing tells a chunk that
was lost from one of zeros: neither here nor in the trainers.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxmerge.checkpoints import parameters
from jaxmerge.checkpoints.leaves import Keep, as_read
from jaxmerge.checkpoints.source import Source
from jaxmerge.durable import appear, making
from jaxmerge.errors import JaxmergeError
from jaxmerge.hosts import processes
from jaxmerge.textfiles import parse_json, read_text
from jaxmerge.trees import PyTree, map_named, named_leaves, nested

_STEP = "metadata.json"  # of both: which step; Levanter's whether it may be deleted
_INDEX = "tensorstore_index.json"  # EasyDeL's: paths, shapes and dtypes
_MANIFEST = "manifest.json"  # Levanter's, of 2026: the same and chunks; it opens what is named here
_OPTIMISER = "tx_structure.json"  # EasyDeL's: the tree of an optimiser's state, which is not merged
# What _STEP says of a checkpoint and what is not so of a merge: Levanter would delete it, EasyDeL
# look for an optimiser's state and for a model with adapters.
_NOT_SO = ("is_temporary", "has_optimizer_state", "has_resume_model")
_DATABASE = "manifest.ocdbt"
_DRIVERS = {"/.zarray": "zarr", "/zarr.json": "zarr3"}  # by the file of an array's metadata
_CHUNK = 2**26  # bytes
_BROKEN = (OSError, ValueError)  # of files; of metadata, data and databases, from tensorstore


def recognises(path: epath.Path) -> bool:
    """Whether a trainer has finished such a checkpoint here."""
    if not path.is_dir():
        return False
    arrays = (path / _DATABASE).exists() or (path / "model").is_dir()
    return (path / _INDEX).exists() or (arrays and (path / _STEP).exists())


def describe(
    name: str, path: epath.Path, subtree: str = "", base: str = "", item: str = ""
) -> Source:
    """Reads the metadata of all arrays.

    Args:
        name: unique in the pool.
        path: the directory, such as Levanter's `step-1000`.
        subtree: where in it the parameters are; "": in `model`, or see `parameters.subtree`.
        base: not heeded: a checkpoint holds a whole model.
        item: not heeded: a checkpoint has none.

    Raises:
        JaxmergeError: the metadata can't be read, or there is no such subtree.
    """
    where = str(path)
    drivers = _arrays(where)
    names = nested({each: each for each in drivers})
    found = subtree or ("model" if "model" in names else parameters.subtree(where, names))
    taken = parameters.below(where, names, found)

    def header(each: str) -> jax.ShapeDtypeStruct:
        at = f"{where}, array {each}"
        with _readable(at):
            array = _open(where, each, drivers[each])
        return parameters.header(at, array.shape, array.dtype.numpy_dtype)

    abstract, carried = parameters.split(jax.tree.map(header, taken), {})
    custom = {
        "driver": {each: drivers[each] for each in named_leaves(taken).values()},
        "database": _in_database(where),
        "files": {
            file.name: read_text(file) for file in path.glob("*.json") if file.name != _OPTIMISER
        },
    }
    return Source(name, where, "zarr", abstract, found, {}, {}, carried=carried, custom=custom)


def restore(source: Source, abstract: PyTree, keep: Keep = as_read) -> PyTree:
    """Reads the parameters array by array into their shards.

    Args:
        source: from `describe`.
        abstract: `ShapeDtypeStruct` with shardings; leaves that it leaves out are not read.
        keep: called with the name of each leaf and the leaf, which what it returns replaces.

    Raises:
        JaxmergeError: data can't be read.
    """
    prefix = f"{source.subtree}/" if source.subtree else ""

    def read(name: str, leaf: jax.ShapeDtypeStruct) -> Any:
        where = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        with _readable(f"{source.path}, array {prefix}{name}"):
            stored = prefix + name
            array = _open(source.path, stored, source.custom["driver"][stored])
            placed = jax.make_array_from_callback(
                leaf.shape, where, lambda index: array[index].read().result(), dtype=leaf.dtype
            )
        return keep(name, jax.block_until_ready(placed))

    return map_named(read, abstract)


def save(
    path: str | os.PathLike[str],
    abstract: PyTree,
    leaf: Callable[[str], jax.Array],
    like: Source | None = None,
) -> None:
    """Writes leaves one after the other, in full and not compressed; process 0 does so for all.

    Args:
        path: the directory to make; it appears whole or not at all.
        abstract: tree of the leaves.
        leaf: gives the leaf of a name; called once for each.
        like: such a checkpoint, whose subtree, storage, carried arrays and files of JSON are kept.
            None: one OCDBT database of zarr 3.

    Raises:
        JaxmergeError: it can't be written; what is carried can't be read.
    """
    names = list(named_leaves(abstract))
    if not processes.first():
        for name in names:
            processes.gather(leaf(name))
        return
    kept: Mapping[str, Any] = like.custom if like else {}
    prefix = f"{like.subtree}/" if like and like.subtree else ""
    carried = named_leaves(restore(like, like.carried)) if like and like.carried else {}
    target, written = Path(path).absolute(), []
    with making(target, "the checkpoint") as new:
        for name in [*names, *carried]:
            values = np.asarray(carried[name]) if name in carried else processes.gather(leaf(name))
            stored, drivers = prefix + name, kept.get("driver", {})
            driver = drivers.get(stored, "zarr3")
            _write(str(new), stored, driver, values, database=kept.get("database", True))
            entry = {"path": stored, "shape": list(values.shape), "dtype": str(values.dtype)}
            written.append(entry)
        for file, text in kept.get("files", {}).items():
            (new / file).write_text(_said(file, text, prefix, written))
        appear(new, target)


def _said(file: str, text: str, prefix: str, written: list[dict[str, Any]]) -> str:
    """A trainer's file beside the arrays, as it is of the merge."""
    if file not in (_STEP, _INDEX, _MANIFEST):
        return text
    said = parse_json(text.encode(), file)
    if not isinstance(said, dict):
        return text
    if file == _STEP:
        said |= {key: False for key in _NOT_SO if key in said}
    elif file == _MANIFEST:
        said["arrays"] = [{**each, "chunk_shape": _chunk(**each)} for each in written]
    else:
        of = prefix.split("/")[0] or next((each["path"].split("/")[0] for each in written), "")
        said = {**said, "prefixes": {of: written}} if "prefixes" in said else said
    return json.dumps(said, indent=2 if file == _INDEX else None)


def _in_database(where: str) -> bool:
    return (epath.Path(where) / _DATABASE).exists()


def _store(where: str, *, database: bool, at: str = "") -> dict[str, Any]:
    """What tensorstore calls a place in a directory, or in the database that is in it."""
    scheme, _, rest = where.rpartition("://")
    below = "" if database else at
    if scheme:
        bucket, _, inner = rest.partition("/")
        driver = {"gs": "gcs"}.get(scheme, scheme)
        base = {"driver": driver, "bucket": bucket, "path": f"{inner}/{below}"}
    else:
        base = {"driver": "file", "path": f"{where}/{below}"}
    return {"driver": "ocdbt", "base": base, "path": at} if database else base


def _arrays(where: str) -> dict[str, str]:
    """The driver of each array, by name."""
    import tensorstore

    with _readable(where):
        spec = _store(where, database=_in_database(where))
        keys = tensorstore.KvStore.open(spec).result().list().result()
        names = [key.decode() for key in keys]
    found = {
        name[: -len(end)]: driver
        for end, driver in _DRIVERS.items()
        for name in names
        if name.endswith(end)
    }
    if not found:
        raise JaxmergeError("there is no array here", where=where, expected="a whole checkpoint")
    return dict(sorted(found.items()))


def _open(where: str, name: str, driver: str) -> Any:
    import tensorstore

    store = _store(where, database=_in_database(where), at=name)
    return tensorstore.open({"driver": driver, "kvstore": store}, open=True).result()


def _chunk(shape: Sequence[int], dtype: Any, **_: Any) -> list[int]:
    """The shape of the chunks that an array is written in: rows of its first axis."""
    row = max(math.prod(shape[1:]) * jnp.dtype(dtype).itemsize, 1)
    chunk = [min(_CHUNK // row, shape[0]), *shape[1:]] if shape else []
    return [max(size, 1) for size in chunk]


def _write(where: str, name: str, driver: str, values: np.ndarray, *, database: bool) -> None:
    import tensorstore

    shape = list(values.shape)
    chunk = _chunk(shape, values.dtype)
    if driver == "zarr":
        metadata: dict[str, Any] = {"shape": shape, "chunks": chunk, "compressor": None}
    else:
        grid = {"name": "regular", "configuration": {"chunk_shape": chunk}}
        metadata = {"shape": shape, "chunk_grid": grid}
    spec = {
        "driver": driver,
        "kvstore": _store(where, database=database, at=name),
        "metadata": metadata,
        "store_data_equal_to_fill_value": True,
    }
    array = tensorstore.open(spec, create=True, dtype=tensorstore.dtype(values.dtype)).result()
    array.write(values).result()


@contextmanager
def _readable(where: str) -> Iterator[None]:
    """What tensorstore refuses to read, in one message."""
    try:
        yield
    except _BROKEN as error:
        raise JaxmergeError(
            "this can't be read",
            where=where,
            expected="the checkpoint as it was saved: copy it anew, or take another step",
            found=f"{type(error).__name__}: {error}"[:300],
        ) from error
