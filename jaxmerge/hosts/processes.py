"""Several processes that run one program: how they start, exchange what one knows, and agree.

Every process runs the same program, each on devices of its own, and process 0 alone writes. What
only one process can know (what a file says, what a judge said) goes from it to all the others here,
so that all of them decide alike. With one process everything here is the identity.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Float

from jaxmerge.errors import JaxmergeError

_PATIENCE = 300  # seconds that processes wait for each other at the start
_LEAST = 1024  # of what is exchanged; sizes are powers of two, so that few programs are compiled
_PIECE = 2**29  # bytes of an array that are gathered at a time

T = TypeVar("T")


def connect(coordinator: str, count: int | None = None, index: int | None = None) -> None:
    """Makes this process one of several; before JAX is first used.

    Args:
        coordinator: `host:port` of process 0, the port being any free one; `auto` on TPU pods,
            Slurm and MPI, which know it and the numbers; "": this process is alone.
        count: number of processes.
        index: of this process, from 0.

    Raises:
        JaxmergeError: the numbers make no sense, or the processes do not find each other.
    """
    if not coordinator:
        if count is not None or index is not None:
            raise JaxmergeError(
                "several processes need to know where process 0 is",
                where="--coordinator",
                expected="host:port of process 0, or auto",
            )
        return
    explicit = coordinator != "auto"
    if explicit and (count is None or index is None or not 0 <= index < count):
        raise JaxmergeError(
            "needs the number of processes, and which of them this is",
            where="--processes and --process",
            expected="--processes=N --process=I with I from 0 to N - 1",
            found=f"{count} and {index}",
        )
    # The preemption service would take SIGTERM for itself; jaxmerge.hosts.signals ends on it.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        if explicit:
            jax.distributed.initialize(coordinator, count, index, initialization_timeout=_PATIENCE)
        else:
            jax.distributed.initialize(initialization_timeout=_PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise JaxmergeError(
            "the processes did not find each other",
            where=f"--coordinator={coordinator}",
            expected=f"all {count or ''} of them, started within {_PATIENCE} seconds",
            found=str(error).splitlines()[0],
        ) from error


def several() -> bool:
    """Whether this process has others beside it."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
    """Whether this is process 0, which writes."""
    return not several() or jax.process_index() == 0


def from_first(make: Callable[[], bytes]) -> bytes:
    """What `make` returns in process 0, in all of them; the others do not call it."""
    if not several():
        return make()
    data = np.frombuffer(make() if first() else b"", np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.uint32(data.size)))
    padded = np.zeros(_padded(size), np.uint8)
    padded[: data.size] = data
    return np.asarray(multihost_utils.broadcast_one_to_all(padded))[:size].tobytes()


def agree(what: str, data: bytes) -> None:
    """Raises `JaxmergeError` in all processes unless `data` are the same in all of them."""
    if not several():
        return
    digest = np.frombuffer(hashlib.sha256(data).digest(), np.uint8)
    digests = multihost_utils.process_allgather(digest)
    others = [i for i, each in enumerate(digests) if not np.array_equal(each, digests[0])]
    if others:
        raise JaxmergeError(
            f"{what} must be the same in all processes",
            where=f"process {', '.join(map(str, others))}",
            expected=f"what process 0 has, {bytes(digests[0][:8]).hex()}",
            found=bytes(digests[others[0]][:8]).hex(),
        )


def place(array: np.ndarray, sharding: Sharding) -> jax.Array:
    """A host array, the same in all processes, on devices of all of them."""
    if not several():
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def fetch(tree: Any) -> Any:
    """Arrays of all processes' devices as host arrays, whole in each process.

    Host arrays stay what they are.
    """
    if several():
        leaves = jax.tree.leaves(tree)
        if leaves and isinstance(leaves[0], jax.Array):
            tree = _everywhere(cast(NamedSharding, leaves[0].sharding).mesh)(tree)
    return jax.device_get(tree)


def gather(leaf: jax.Array) -> np.ndarray:
    """An array of all processes' devices in the memory of process 0; elsewhere nothing of use.

    It goes through the devices in pieces, each of which is for a moment on all of them.
    """
    if not several():
        return np.asarray(leaf)
    if not leaf.ndim:
        return np.asarray(fetch(leaf))
    mesh = cast(NamedSharding, leaf.sharding).mesh
    whole = np.empty(leaf.shape if first() else (0, *leaf.shape[1:]), leaf.dtype)
    rows = max(_PIECE // max(leaf.nbytes // max(len(leaf), 1), 1), 1)
    for start in range(0, len(leaf), rows):
        piece = _piece(mesh, min(rows, len(leaf) - start))(leaf, start)
        if first():
            whole[start : start + rows] = jax.device_get(piece)
    return whole


def spread(
    function: Callable[[Sequence[T]], Sequence[float]], items: Sequence[T]
) -> Float[np.ndarray, " I"]:
    """A number for each item, float32, of which every process computes its share.

    Args:
        function: numbers of some items; runs on the host.
        items: the same in all processes.
    """
    if not several() or not items:
        return np.asarray(function(items), np.float32)
    count, mine = jax.process_count(), items[jax.process_index() :: jax.process_count()]
    share = np.zeros(_padded(-(-len(items) // count)), np.float32)
    share[: len(mine)] = function(mine)
    return np.asarray(multihost_utils.process_allgather(share)).T.reshape(-1)[: len(items)]


@functools.cache
def _piece(mesh: Mesh, rows: int) -> Callable[[jax.Array, int], jax.Array]:
    return jax.jit(
        lambda leaf, start: jax.lax.dynamic_slice_in_dim(leaf, start, rows),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )


def _padded(size: int) -> int:
    return max(_LEAST, 1 << max(size - 1, 0).bit_length())


@functools.cache
def _everywhere(mesh: Mesh) -> Callable[[Any], Any]:
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))
