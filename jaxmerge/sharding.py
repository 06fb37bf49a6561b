"""The mesh of named axes, and where each leaf lies on it.

Axes: `pop` (candidates), `data` (examples), `fsdp` and `tensor` (parameters). The pool is sharded
over (`fsdp`, `tensor`) and repeated over the other two.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxmerge.errors import JaxmergeError
from jaxmerge.trees import PyTree, map_named

AXES = ("pop", "data", "fsdp", "tensor")

# (regex searched in the leaf's name, the mesh axis of each dimension); the first match holds
Rules = Sequence[tuple[str, Sequence[str | None]]]


def all_devices() -> Sequence[Any]:
    """The devices of JAX, which starts with this.

    Raises:
        JaxmergeError: there is nothing of what it is told to run on.
    """
    try:
        return jax.devices()
    except RuntimeError as error:
        named = os.environ.get("JAX_PLATFORMS", "")
        raise JaxmergeError(
            "JAX finds no device to run on",
            where=f"JAX_PLATFORMS={named}" if named else "jax.devices()",
            expected="JAX_PLATFORMS of what is here: cpu, cuda or tpu; without it, JAX takes the "
            "best there is. For the CPU alone: mesh.cpu_devices = 1",
            found=" ".join(str(error).split())[:500],
        ) from error


def make_mesh(
    pop: int = 1,
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """The mesh of these axis sizes; one of them may be -1, for all devices that are left.

    Raises:
        JaxmergeError: the sizes do not multiply to at most the number of devices.
    """
    devices = all_devices() if devices is None else devices
    sizes = [pop, data, fsdp, tensor]
    shape = dict(zip(AXES, sizes))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise JaxmergeError(
            "axis sizes are at least 1, and at most one is -1",
            where="mesh",
            expected="sizes such as pop = -1 and the rest 1",
            found=str(shape),
        )
    fixed = math.prod(size for size in sizes if size != -1)
    sizes = [max(len(devices) // fixed, 1) if size == -1 else size for size in sizes]
    if math.prod(sizes) > len(devices):
        raise JaxmergeError(
            "the mesh has more places than there are devices",
            where="mesh",
            expected=f"a product of at most {len(devices)} ({devices[0].platform})",
            found=str(shape),
        )
    count = math.prod(sizes)
    # An axis of the mesh may be a part of a slice's axis: tensor=8 on 4x4x4 chips.
    try:
        grid = mesh_utils.create_device_mesh(sizes, devices[:count], allow_split_physical_axes=True)
    # How JAX says that it has no mesh: NotImplementedError for axes that no axes of the slice make
    # up, ValueError for a part of a slice.
    except (NotImplementedError, ValueError) as error:
        raise JaxmergeError(
            "a mesh of these sizes can't be laid over these devices",
            where="mesh",
            expected="sizes that make up the axes of the slice, all of it",
            found=f"{dict(zip(AXES, sizes))}: {error}",
        ) from error
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def shardings(abstract: PyTree, rules: Rules, mesh: Mesh) -> PyTree:
    """The `NamedSharding` of each leaf.

    An axis that does not divide its dimension goes to the last other dimension of the rule that it
    does divide, beside the axis there: key/value heads fewer than `tensor` lie in parts of D. Where
    there is none the leaf is repeated over the axis: every leaf can be placed on every mesh.

    Args:
        abstract: tree of arrays or `ShapeDtypeStruct`.
        rules: searched in order with the leaf's name, such as `layers/query`.
    """

    def place(name: str, leaf: jax.ShapeDtypeStruct | jax.Array) -> NamedSharding:
        axes = next((axes for regex, axes in rules if re.search(regex, name)), ())
        if len(axes) > len(leaf.shape):
            raise JaxmergeError(
                "the sharding rule names more dimensions than the leaf has",
                where=name,
                expected=f"at most {len(leaf.shape)}",
                found=f"axes {tuple(axes)}, shape {leaf.shape}",
            )
        return NamedSharding(mesh, _spec(axes, leaf.shape, mesh))

    return map_named(place, abstract)


def _spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    def divides(size: int, *over: str) -> bool:
        return size % math.prod(mesh.shape[axis] for axis in over) == 0

    placed: list[tuple[str, ...]] = [
        (axis,) if axis and divides(size, axis) else () for axis, size in zip(axes, shape)
    ]
    for here, axis in enumerate(axes):
        if axis and not placed[here]:
            others = [i for i, other in enumerate(axes) if other and i != here]
            room = [i for i in others if divides(shape[i], *placed[i], axis)]
            if room:
                placed[room[-1]] = (*placed[room[-1]], axis)
    return PartitionSpec(*(each if len(each) > 1 else (*each, None)[0] for each in placed))
