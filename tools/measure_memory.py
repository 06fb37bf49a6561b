"""Compares the memory that a plan states with what XLA's CPU allocator hands out in evaluations.

    python tools/measure_memory.py --config=configs/quickstart.py

Loads the pool of the config as a run does, evaluates two steps of candidates on every split, and
then does so once more, when all is compiled, while it looks at the allocator. XLA on the CPU has no
statistics of its own (`Device.memory_stats()` is None in jaxlib 0.10.2) and takes its memory from
malloc: so what malloc has handed out is read every millisecond (mallinfo2). From its peak is taken
what is left when all arrays are deleted: Python's objects and compiled programs, which a plan does
not count on the CPU. Linux with glibc only.
"""

from __future__ import annotations

import ctypes
import tempfile
import threading
from collections.abc import Sequence

import jax
import numpy as np
from absl import flags

from jaxmerge.experiment import command_line
from jaxmerge.experiment.prepare import prepare
from jaxmerge.plan import plan

_FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class _Mallinfo2(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_size_t) for name in _FIELDS.split())


def allocated() -> int:
    """Bytes that malloc has handed out, in arenas and as maps of their own."""
    found = _LIBC.mallinfo2()
    return found.uordblks + found.hblkhd


_LIBC = ctypes.CDLL("libc.so.6")
_LIBC.mallinfo2.restype = _Mallinfo2


class Peak(threading.Thread):
    """The most that was allocated while it ran."""

    def __init__(self):
        super().__init__(daemon=True)
        self.bytes, self._stop_now = 0, threading.Event()

    def run(self):
        while not self._stop_now.wait(0.001):
            self.bytes = max(self.bytes, allocated())

    def stop(self) -> int:
        self._stop_now.set()
        self.join()
        return self.bytes


def main(_: Sequence[str]) -> None:
    """Prints what is planned, what is measured, and their ratio."""
    config = flags.FLAGS.config
    made = plan(config).plan
    assert made is not None
    devices = made.mesh["pop"] * made.mesh["data"] * made.mesh["fsdp"] * made.mesh["tensor"]
    planned = devices * made.measured.need.on_device("device")
    with tempfile.TemporaryDirectory() as workdir:
        prepared = prepare(config, workdir)
        evaluators = [each for each in prepared.evaluators.values() if each.examples]
        two_steps = 2 * evaluators[0].candidates_per_step
        weights = np.resize(np.eye(len(prepared.pool.names)), (two_steps, len(prepared.pool.names)))
        for evaluator in evaluators:
            list(evaluator.steps(weights))
        peak = Peak()
        peak.start()
        for evaluator in evaluators:
            list(evaluator.steps(weights))
        highest = peak.stop()
        for array in jax.live_arrays():
            array.delete()
        measured = highest - allocated()
        prepared.directory.close()
    print(f"planned for each device: {made.measured.need}")
    for name, size in (("planned", planned), ("measured", measured)):
        print(f"{name}  {size / 2**20:8.1f} MiB on {devices} CPU devices")
    print(f"planned / measured  {planned / measured:.3f}")


if __name__ == "__main__":
    command_line.start(main, __doc__ or "", required=("config",))
