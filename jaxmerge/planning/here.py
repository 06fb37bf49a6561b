"""The memory of the devices of this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from jaxmerge.planning.residency import Room


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
