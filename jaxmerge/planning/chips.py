"""The chips that a plan can be made for, and how a topology is named."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from jaxmerge.errors import JaxmergeError

THIS = "this"


class Chip(NamedTuple):
    """One accelerator.

    Attributes:
        name: of its kind.
        memory: bytes that programs may use.
        flops: matrix products in bfloat16, per second, at most.
        bandwidth: bytes per second from its memory, at most.
        links: bytes per second to its neighbours, all links together; 0: not known.
        host: bytes of the host's memory per chip; 0: no memory besides its own. As stated for the
            machine type that `source` names, divided by its chips; nobody has looked at a host.
        slices: that can be had, smallest first.
        source: where the figures are from.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    links: float
    host: int
    slices: tuple[str, ...] = ()
    source: str = ""


_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_3D = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"),
    *("8x16x16", "16x16x16", "16x16x24"),
)

# Memory: what the compiler of libtpu 0.0.42 allows when it refuses a program (15.75, 95.74, 31.25
# GiB). Rates: cloud.google.com/tpu/docs/{v5e,v5p,v6e}, 2026; links are given there in Gbit/s. Host:
# stated for the machine type, and set down from memory: look it up where a plan depends on it.
CHIPS = {
    "v5e": Chip(
        *("v5e", int(15.75 * 2**30), 197e12, 819e9, 1600e9 / 8, 192 * 10**9 // 4, _2D),
        "197 TFLOP/s bf16, 819 GB/s, 1600 Gbit/s links; host: ct5lp-hightpu-4t, stated 192 GB",
    ),
    "v5p": Chip(
        *("v5p", int(95.74 * 2**30), 459e12, 2765e9, 4800e9 / 8, 448 * 10**9 // 4, _3D),
        "459 TFLOP/s bf16, 2765 GB/s, 4800 Gbit/s links; host: ct5p-hightpu-4t, stated 448 GB",
    ),
    "v6e": Chip(
        *("v6e", int(31.25 * 2**30), 918e12, 1640e9, 3584e9 / 8, 720 * 10**9 // 4, _2D),
        "918 TFLOP/s bf16, 1640 GB/s, 3584 Gbit/s links; host: ct6e-standard-4t, stated 720 GB",
    ),
}
DEVICE_KINDS = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}  # as JAX names them


class Topology(NamedTuple):
    """The devices of a plan.

    Attributes:
        kind: a name in `CHIPS`, `cpu` or `this`.
        shape: of the slice; of `cpu` the number of devices.
    """

    kind: str
    shape: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.shape))}" if self.shape else self.kind


def topology(text: str) -> Topology:
    """The topology that a text such as `v5p:4x4x8`, `cpu:8` or `this` names.

    Raises:
        JaxmergeError: it names none.
    """
    kind, _, sizes = text.partition(":")
    shape = (
        tuple(map(int, sizes.split("x"))) if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes) else ()
    )
    if text == THIS or (kind == "cpu" and len(shape) == 1):
        return Topology(kind, shape)
    # A v5e axis above 16 ends the process of the compiler (libtpu 0.0.42).
    axes = len(CHIPS[kind].slices[0].split("x")) if kind in CHIPS else 0
    if not axes or len(shape) != axes or (axes == 2 and max(shape) > 16):
        known = [f"{name}:{chip.slices[-3]}" for name, chip in CHIPS.items()]
        raise JaxmergeError(
            "unknown topology",
            where="--topology",
            expected=f"{THIS}, cpu:N, or a slice such as {', '.join(known)}",
            found=text,
        )
    return Topology(kind, shape)


def slices(kind: str) -> list[Topology]:
    """The slices of a kind of chip, smallest first."""
    return [topology(f"{kind}:{each}") for each in CHIPS[kind].slices]


def count(of: Topology) -> int:
    """Devices of a topology with a shape."""
    return math.prod(of.shape)
