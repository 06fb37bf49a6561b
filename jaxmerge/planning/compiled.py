"""Programs compiled for devices that may be absent: memory and collectives."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from jaxmerge.errors import JaxmergeError
from jaxmerge.planning.chips import Topology

_COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
_BITS = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One kind of collective in a program.

    Attributes:
        count: how often it is done in a call.
        bytes: of its results on one device, in all.
    """

    count: int
    bytes: int


class Program(NamedTuple):
    """A compiled program; bytes are those of one device.

    Attributes:
        name: for the reader.
        arguments, outputs, temporaries, code: bytes.
        moved: bytes to and from memory, the body of a loop counted once.
        collectives: by name; a loop whose end depends on data counts as long as it may be.
        refused: why the compiler refused it; "" where it did not.
    """

    name: str
    arguments: int = 0
    outputs: int = 0
    temporaries: int = 0
    code: int = 0
    moved: int = 0
    collectives: Mapping[str, Collective] = MappingProxyType({})
    refused: str = ""


def absent_devices(of: Topology) -> list[Any]:
    """The devices of a TPU slice, as libtpu describes them.

    Raises:
        JaxmergeError: libtpu is not installed, or knows no such slice.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # asks no metadata server what machine this is
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several may plan at a time
    shape = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(of.shape) == 1 else {}
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=str(of), **shape)
    except (RuntimeError, ValueError) as error:
        raise JaxmergeError(
            "there are no such devices to compile for",
            where="--topology",
            expected="a slice that libtpu knows; it comes with: pip install 'jaxmerge[plan]'",
            found=f"{of}: {str(error).splitlines()[0]}",
        ) from error
    return list(described.devices)


def compile_program(name: str, jitted: Callable[..., Any], *arguments: Any) -> Program:
    """Compiles a jitted function for abstract arguments with shardings.

    Returns:
        The program; one that is too large for the device has `refused` set.
    """
    try:
        compiled = jitted.lower(*arguments).compile()  # type: Any
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Program(name, refused=str(error).splitlines()[0].partition(": ")[2])
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    return Program(
        name,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
        int(cost.get("bytes accessed", 0)),
        collectives(compiled.as_text()),
    )


def collectives(text: str) -> dict[str, Collective]:
    """The collectives in the text of a compiled program, by name, loops included."""
    computations = _computations(text)
    found: dict[str, Collective] = {}
    waiting = [(name, 1) for name, entry in computations.items() if entry.entry]
    while waiting:
        name, times = waiting.pop()
        for line in computations[name].lines:
            for operation in re.findall(r" ([a-z-]+?)(?:-start)?\(", line)[:1]:
                if operation in _COLLECTIVES:
                    size = _bytes(line.partition(" = ")[2].partition(f" {operation}")[0])
                    count, bytes = found.get(operation, (0, 0))
                    found[operation] = Collective(count + times, bytes + times * size)
            loop = re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
            if loop:
                steps = _steps(computations, loop[1])
                waiting.append((loop[2], times * steps))
            else:
                waiting += [(called, times) for called in _called(line) if called in computations]
    return found


class _Computation(NamedTuple):
    entry: bool
    lines: list[str]


def _computations(text: str) -> dict[str, _Computation]:
    found: dict[str, _Computation] = {}
    lines: list[str] = []
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            lines = []
            found[head[2]] = _Computation(bool(head[1]), lines)
        else:
            lines.append(line)
    return found


def _called(line: str) -> list[str]:
    named = re.findall(r"\b(?:calls|to_apply|called_computation)=%?([\w.\-]+)", line)
    for group in re.findall(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}", line):
        named += re.findall(r"[\w.\-]+", group)
    return named


def _steps(computations: dict[str, _Computation], condition: str) -> int:
    """How often a loop runs: the number that its condition compares with."""
    lines = computations[condition].lines
    lines = lines + [
        line
        for each in lines
        for called in _called(each)
        if called in computations
        for line in computations[called].lines
    ]
    numbers = re.findall(r" = [su](?:32|64)\[1?\]\S* constant\(\{?(\d+)\}?\)", "\n".join(lines))
    return max(map(int, numbers), default=1)


def _bytes(shapes: str) -> int:
    """Bytes of a shape, or of all in a tuple."""
    total = 0
    for dtype, bits, sizes in _BITS.findall(shapes):
        values = math.prod(map(int, sizes.split(","))) if sizes else 1
        total += values * (1 if dtype == "pred" else max(int(bits) // 8, 1))
    return total
