"""Where the pool can live, and whether a run fits: arithmetic on bytes."""

from __future__ import annotations

from typing import NamedTuple

from jaxmerge.checkpoints.pool import RESIDENCIES
from jaxmerge.errors import JaxmergeError
from jaxmerge.models.model import Model

REMATERIALISE = "merge.rematerialise"  # the field of a config
AUTO = "auto"  # the first of RESIDENCIES that fits


class Need(NamedTuple):
    """Bytes that a run takes on each device.

    Attributes:
        pool: its share of all checkpoints.
        streamed: what a merge holds besides when the pool does not live on the device: its share of
            two leaves, and of the sum of one leaf of each candidate; see `merge.leafwise`.
        merged: its candidates of the steps that exist together.
        working: whatever a program holds besides: temporaries, cache, inputs and outputs.
    """

    pool: int
    streamed: int
    merged: int
    working: int

    def on_device(self, residency: str) -> int:
        """Bytes of the device's own memory."""
        return self.merged + self.working + (self.pool if residency == "device" else self.streamed)

    def on_host(self, residency: str) -> int:
        """Bytes of the host's memory, for each device."""
        return self.pool if residency == "host" else 0


class Room(NamedTuple):
    """Bytes that each device has, and those of the host's memory that come to each device."""

    device: int
    host: int  # 0: the device has no other memory than the host's


def fits(need: Need, room: Room, residency: str) -> bool:
    """Whether a run fits with the pool there."""
    if not room.host:
        return need.on_device(residency) + need.on_host(residency) <= room.device
    return need.on_device(residency) <= room.device and need.on_host(residency) <= room.host


def choose_residency(asked: str, need: Need, room: Room) -> str | None:
    """Where the pool will live: for `auto` the first of device, host and disk that fits.

    Args:
        asked: `auto`, or the one that it must be.
        need: bytes of each device.
        room: bytes that there are.

    Returns:
        None where it does not fit.
    """
    allowed = [each for each in RESIDENCIES if asked in (AUTO, each)]
    return next((each for each in allowed if fits(need, room, each)), None)


def check_layers(model: Model) -> None:
    """Raises `JaxmergeError` unless the model can be merged a layer at a time."""
    if not model.layers:
        raise JaxmergeError(
            "the model needs all its parameters at once, so its layers can't be merged late",
            where=REMATERIALISE,
            expected="False, or a Model that says what its `layers` are",
        )
