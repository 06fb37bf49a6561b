"""The mesh of named axes, and where each leaf lies on it.

Axes: `pop` (candidates), `data` (examples), `fsdp` and `tensor` (parameters). The pool is sharded
over (`fsdp`, `tensor`) and repeated over the other two.
"""

from __future__ import annotations

import math
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
    devices = jax.devices() if devices is None else devices
    sizes = [pop, data, fsdp, tensor]
    shape = dict(zip(AXES, sizes))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise JaxmergeError(
            "axis sizes are at least 1, and at most one is -1", where="mesh", found=str(shape)
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
    grid = mesh_utils.create_device_mesh(sizes, devices[:count], allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def shardings(abstract: PyTree, rules: Rules, mesh: Mesh) -> PyTree:
    """The `NamedSharding` of each leaf.

    A dimension that its axis does not divide is left whole: every leaf can be placed on every mesh,
    at the price of repeating what does not divide.

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
                found=f"axes {tuple(axes)}, shape {leaf.shape}",
            )
        fitting = [
            axis if axis is not None and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(axes, leaf.shape)
        ]
        return NamedSharding(mesh, PartitionSpec(*fitting))

    return map_named(place, abstract)
