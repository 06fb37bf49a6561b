"""Loading a pool against the machine's limits, all measured in turn in one run.

    python tools/bench_load.py --checkpoints='models/*' [--rounds=5] [--dtype=float32]

`cat`: the same files through `cat` to /dev/null. `fresh`: the same files read by two threads into
memory that the process has just been given, and nothing else: what any loader must do. All from a
warm page cache, and each after a `fresh` that is not counted, because a virtual machine hands out
memory more slowly when its host has to find it first. Prints medians and ratios; the first load of
a process, which also compiles, is shown by itself.
"""

from __future__ import annotations

import argparse
import glob
import json
import mmap
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax

from jaxmerge.checkpoints import pool
from jaxmerge.checkpoints.survey import survey
from jaxmerge.models.decoder import SHARDING_RULES
from jaxmerge.sharding import make_mesh

_CHUNK = 2**23


def cat(files: list[str]) -> None:
    """Reads files into nothing."""
    subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)


def fresh(files: list[str]) -> None:
    """Reads files into new memory, two threads at a time."""
    held = []
    with ThreadPoolExecutor(2) as threads:
        for file in files:
            size = os.path.getsize(file)
            held.append(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
            view, descriptor = memoryview(held[-1]), os.open(file, os.O_RDONLY)

            def read(start: int, view=view, descriptor=descriptor) -> None:
                os.preadv(descriptor, [view[start : start + _CHUNK]], start)

            list(threads.map(read, range(0, size, _CHUNK)))
            os.close(descriptor)


def after_fresh(files: list[str], run: Callable[[], object]) -> float:
    """How long a call takes where memory was in use a moment ago."""
    fresh(files)
    return seconds(run)


def seconds(run: Callable[[], object]) -> float:
    """How long a call takes; its result is given up."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """Measures, and prints one line of JSON at the end."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--checkpoints", required=True, help="pattern of Hugging Face directories")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="", help="see pool.dtype")
    args = parser.parse_args()
    files = sorted(glob.glob(os.path.join(args.checkpoints, "*.safetensors")))
    surveying = seconds(lambda: survey([args.checkpoints], dtype=args.dtype))
    sources, mesh = survey([args.checkpoints], dtype=args.dtype), make_mesh()
    timed = {
        "cat": lambda: cat(files),
        "fresh": lambda: fresh(files),
        "load": lambda: pool.load(sources, mesh, SHARDING_RULES, dtype=args.dtype),
    }
    cat(files)
    first = seconds(timed["load"])
    rounds = [
        {name: after_fresh(files, run) for name, run in timed.items()} for _ in range(args.rounds)
    ]
    found = {name: statistics.median(each[name] for each in rounds) for name in timed}
    size = sum(map(os.path.getsize, files))
    print(f"{len(sources)} checkpoints, {size / 1e9:.2f} GB, medians of {args.rounds}")
    print(f"jax {jax.__version__}, {os.cpu_count()} cores")
    for name, took in found.items():
        against = ", ".join(f"{found[other] / took:.2f} of {other}" for other in ("cat", "fresh"))
        print(f"{name:6}{took:7.2f} s {size / took / 1e9:6.2f} GB/s   {against}")
    print(f"first load of the process {first:.2f} s, headers and configs {surveying:.2f} s")
    print(json.dumps({"bytes": size, "survey": surveying, "first": first, "rounds": rounds}))


if __name__ == "__main__":
    main()
