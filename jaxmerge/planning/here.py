"""The memory of the devices of this machine, and whether a run can fit into it at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import jax

from jaxmerge.errors import JaxmergeError
from jaxmerge.planning.estimate import arithmetic
from jaxmerge.planning.residency import AUTO, RESIDENCIES, Room, choose_residency
from jaxmerge.planning.work import Step


def residency_here(step: Step, room: Room, asked: str) -> str:
    """Where the pool of a run will live; refuses one that is more than the devices have left.

    Pool and merged models alone are looked at. What the programs take besides is known once they
    are compiled, and what is compiled in advance is compiled again when it is called; a bound by
    arithmetic would refuse runs that fit. `jaxmerge.plan` counts it.

    Args:
        step: of as few candidates as the config allows, on devices that are there.
        room: that each of them has.
        asked: device, host, disk, or auto.

    Raises:
        JaxmergeError: it can't fit; the message says what would.
    """
    need, mesh = arithmetic(step), step.mesh
    chosen = choose_residency(asked, need, room)
    if chosen:
        return chosen
    found = [each for each in RESIDENCIES if asked in (AUTO, each)]
    other = choose_residency(AUTO, need, room)
    would = f'pool.residency = "{other}"; or ' if other else ""
    raise JaxmergeError(
        "the pool and the merged models do not fit into the memory of the devices",
        where="this machine",
        expected=f"{would}more devices for a model (mesh.fsdp, mesh.tensor), or larger ones: "
        "python -m jaxmerge.plan says which",
        found=", ".join(f"{_gib(need.on_device(each))} with the pool on {each}" for each in found)
        + f"; each of {mesh.size} devices ({jax.default_backend()}) has {_gib(room.device)} left",
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def room_of(devices: Sequence[Any]) -> Room:
    """What each of these devices can still take; CPU devices share what the host has."""
    host = available_memory()
    stats = devices[0].memory_stats()
    if not stats or "bytes_limit" not in stats:
        return Room(host // len(devices), 0)
    return Room(stats["bytes_limit"] - stats.get("bytes_in_use", 0), host // len(devices))


def available_memory() -> int:
    """Bytes of the host's memory that can be had without swapping."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":") for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except FileNotFoundError:  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
