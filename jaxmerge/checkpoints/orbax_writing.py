"""Orbax checkpoints, written some leaves at a time: no more of a tree is in memory than those."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from jaxmerge.hosts import processes
from jaxmerge.trees import PyTree

# Of the tree, beside its leaves: that the checkpoint was written with metadata of its own.
MARK: Any = {"jaxmerge": True}
_AT_ONCE = 2**26  # bytes of leaves that are written together, so that small ones are few writes


@dataclasses.dataclass(frozen=True)
class Later:
    """A leaf that is made when its turn has come to be written.

    Attributes:
        make: the array; called once, in a thread of its own.
        shape, dtype: of it.
    """

    make: Callable[[], jax.Array]
    shape: tuple[int, ...]
    dtype: Any

    @property
    def nbytes(self) -> int:
        return jax.ShapeDtypeStruct(self.shape, self.dtype).size * self.dtype.itemsize


def write(path: epath.Path, item: str, tree: PyTree, custom: Mapping[str, Any]) -> None:
    """Writes a checkpoint; it appears whole or not at all, and nothing is left of one that fails.

    Nothing is compressed: the bytes of weights hardly shrink, and zstd makes the writing several
    times slower.

    Args:
        path: the directory to make.
        item: that the tree is in; "": it lies in the directory itself, as Orbax's older interface
            writes it. Trainers that save so read so: they look for no item.
        tree: of `Later` leaves, NumPy arrays and scalars.
        custom: metadata; read after the last leaf has been written.
    """
    import orbax.checkpoint as v0  # takes a third of a second to import

    known = v0.type_handlers
    plain = [kind for kind in known.supported_types() if kind is not jax.Array]
    arrays = known.get_type_handler(jax.Array)
    in_turn: Any = _InTurn(arrays)
    registry = known.create_type_handler_registry(
        *((kind, known.get_type_handler(kind)) for kind in plain),
        *((jax.Array, arrays), (Later, in_turn)),
    )
    handler: Any = v0.PyTreeCheckpointHandler(
        use_compression=False, use_zarr3=bool(item), type_handler_registry=registry
    )
    args: Any = v0.args.PyTreeSave(tree, custom_metadata=MARK)
    if item:
        # At once: what waits for directories that another thread makes, and can't, waits 300 s.
        before = v0.options.AsyncOptions(create_directories_asynchronously=False)
        options = v0.CompositeOptions(async_options=before)
        handler = v0.CompositeCheckpointHandler(composite_options=options, **{item: handler})
        args = v0.args.Composite(**{item: args})
    try:
        with v0.Checkpointer(handler) as checkpointer:
            checkpointer.save(path, args=args, custom_metadata=custom)
    except BaseException:
        if processes.first():
            with contextlib.suppress(OSError):
                (path.parent / f"{path.name}.orbax-checkpoint-tmp").rmtree(missing_ok=True)
        raise


class _InTurn:
    """What Orbax calls a type handler: that of arrays, given some of them after the other."""

    def __init__(self, arrays: Any):
        self._arrays = arrays
        self.typestr, self.metadata = arrays.typestr, arrays.metadata
        self.deserialize = arrays.deserialize

    async def serialize(
        self, values: Sequence[Later], infos: Sequence[Any], args: Sequence[Any]
    ) -> list[Any]:
        for part in _parts(values):
            leaves = [await asyncio.to_thread(value.make) for value in values[part]]
            for written in await self._arrays.serialize(leaves, infos[part], args[part]):
                await asyncio.to_thread(written.result)
            del leaves, written  # before the next are made
        return []


def _parts(values: Sequence[Later]) -> Iterator[slice]:
    start, size = 0, 0
    for stop, value in enumerate(values, 1):
        size += value.nbytes
        if size >= _AT_ONCE or stop == len(values):
            yield slice(start, stop)
            start, size = stop, 0
