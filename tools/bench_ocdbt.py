"""The merge of a window of steps in OCDBT databases, against Orbax that reads and writes the same.

    python tools/bench_ocdbt.py [--directory=bench_ocdbt] [--leaves=15] [--shape=16,2048,4096]

Makes random checkpoints as MaxText's `CheckpointManager` writes them, in bfloat16: zarr 3 in one
OCDBT database each, a chunk for each leaf, compressed with zstd. All steps after
the first --distinct ones are links to these. What is measured, each in a process of its own:

- `jaxmerge`: `jaxmerge merge DIRECTORY/checkpoints --steps=: --out=...`, start-up included.
- `orbax`: a step restored after the other, whole, and the last saved: nothing is computed.
- `orbax-plain`: the same, saved without compression, as jaxmerge saves.

Before each all files are read once, so that all read from a warm page cache, and what was written
is synced. --cold drops the files from the cache instead. Peak memory is the high-water mark of the
process, mapped files included. Prints medians of time, and the ratios. Takes 4 GB of disk for each
distinct step of 15 leaves, and 4 GB for what is written and removed again.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_MEASURED = ("jaxmerge", "orbax", "orbax-plain")
_VERSIONS = ("jax", "orbax-checkpoint", "tensorstore")


class Taken(NamedTuple):
    """What a process took."""

    seconds: float
    peak: int  # bytes


def make_steps(run: Path, leaves: int, shape: tuple[int, ...], count: int, distinct: int) -> None:
    """A directory with steps of random parameters; steps that are there are left as they are.

    Args:
        run: the directory.
        leaves: their number.
        shape: of each leaf.
        count: of steps.
        distinct: of these that are not links.
    """
    import orbax.checkpoint as ocp

    run.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        step, linked = run / str(100 * (k + 1)), k >= distinct
        if step.exists():
            continue
        if linked:
            step.symlink_to(str(100 * (k % distinct + 1)))
            continue
        rng = np.random.default_rng(k)
        tree = {f"layers_{i}": _random(rng, shape) for i in range(leaves)}
        args = ocp.args.PyTreeSave({"params": {"params": {"decoder": tree}}})
        handlers = {"items": ocp.PyTreeCheckpointHandler(use_zarr3=True)}
        with ocp.CheckpointManager(run, item_handlers=handlers) as manager:
            items = ocp.args.Composite(items=args)
            manager.save(k * 100 + 100, args=items, custom_metadata={"scan_layers": True})


def _random(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    import jax.numpy as jnp

    values = np.empty(shape, ml_dtypes.bfloat16)
    for row in values.reshape(shape[0], -1):
        row[:] = rng.standard_normal(row.size, np.float32) / 50
    return jnp.asarray(values)


def orbax_alone(run: Path, out: Path, *, compressed: bool) -> None:
    """Restores all steps, one after the other, and saves the last."""
    import jax
    import orbax.checkpoint as ocp

    to = ocp.ArrayRestoreArgs(sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    tree = None
    with ocp.PyTreeCheckpointer() as reader:
        for step in sorted(run.iterdir(), key=lambda path: int(path.name)):
            del tree
            known = reader.metadata(step / "items").item_metadata.tree
            where = ocp.args.PyTreeRestore(restore_args=jax.tree.map(lambda _: to, known))
            tree = jax.block_until_ready(reader.restore(step / "items", args=where))
    handler = ocp.PyTreeCheckpointHandler(use_compression=compressed)
    with ocp.Checkpointer(handler) as writer:
        writer.save(out / "items", args=ocp.args.PyTreeSave(tree))


def files_of(run: Path) -> list[Path]:
    """The files of all steps, each once."""
    steps = {step.resolve() for step in run.iterdir()}
    return [file for step in sorted(steps) for file in step.rglob("*") if file.is_file()]


def prepare(files: list[Path], *, cold: bool) -> None:
    """Has the page cache hold the files, or hold them not, and the disk nothing left to write."""
    os.sync()
    for file in files:
        with open(file, "rb", 0) as stream:
            if cold:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while not cold and stream.read(2**22):
                pass


def measure(command: list[str], out: Path) -> Taken:
    """Runs a command, and removes what it wrote."""
    started = time.perf_counter()
    # A small process in between: the high-water mark of a child begins with that of its parent.
    timed = ["/usr/bin/time", "-f", "%M", *command]
    done = subprocess.run(timed, capture_output=True, text=True)
    took = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    for path in (out, out.with_name(f".{out.name}.jaxmerge")):
        shutil.rmtree(path, ignore_errors=True)
    return Taken(took, int(done.stderr.split()[-1]) * 1024)


def main() -> None:
    """Measures, and prints medians and ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--directory", type=Path, default=Path("bench_ocdbt"))
    parser.add_argument("--leaves", type=int, default=15)
    parser.add_argument("--shape", default="16,2048,4096", help="of each leaf")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--distinct", type=int, default=2, help="steps that are no links")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--cold", action="store_true", help="nothing is in the page cache")
    parser.add_argument("--only", default=",".join(_MEASURED), help="some of these")
    parser.add_argument("--alone", choices=_MEASURED[1:], help=argparse.SUPPRESS)
    args = parser.parse_args()
    directory = args.directory.absolute()
    run, out = directory / "checkpoints", directory / "merged"
    if args.alone:
        orbax_alone(run, out, compressed=args.alone == "orbax")
        return
    shape = tuple(map(int, args.shape.split(",")))
    make_steps(run, args.leaves, shape, args.steps, args.distinct)
    alone = [sys.executable, __file__, f"--directory={directory}"]
    merge = [sys.executable, "-m", "jaxmerge", "merge", str(run), "--steps=:", f"--out={out}"]
    commands = {name: [*alone, f"--alone={name}"] for name in _MEASURED[1:]} | {"jaxmerge": merge}
    files, taken = files_of(run), {name: [] for name in args.only.split(",")}
    for _ in range(args.rounds):
        for name, of in taken.items():
            prepare(files, cold=args.cold)
            of.append(measure(commands[name], out))
            print(name, of[-1], file=sys.stderr, flush=True)
    held = args.leaves * math.prod(shape) * 2
    stored = sum(file.stat().st_size for file in files) / args.distinct
    versions = [f"{name} {importlib.metadata.version(name)}" for name in _VERSIONS]
    cache = "cold" if args.cold else "warm"
    print(f"{args.steps} steps of {held / 1e9:.2f} GB, {stored / 1e9:.2f} GB on disk")
    print(f"{', '.join(versions)}; {len(os.sched_getaffinity(0))} cores, {cache} page cache")
    seconds = {name: statistics.median(each.seconds for each in of) for name, of in taken.items()}
    for name, of in taken.items():
        ratio = f"{seconds[name] / seconds['orbax']:6.2f} of orbax" if "orbax" in taken else ""
        peak = max(each.peak for each in of)
        print(f"{name:12}{seconds[name]:8.1f} s {peak / 1e6:8.0f} MB {ratio}")


if __name__ == "__main__":
    main()
