"""A sweep against separate runs of its cells: what both take, and whether both wrote the same.

    python tools/bench_sweep.py --out=/tmp/bench_sweep

The sweep goes first, so that the separate runs find all programs in XLA's cache on disk: what the
sweep gains is then the least that it can gain.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax


class Took(NamedTuple):
    """Seconds by the clock, and of processors, which a busy machine moves less."""

    wall: float
    cpu: float


def took(*arguments: str) -> Took:
    """What `python -m` with these arguments takes."""
    wall, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, "-m", *arguments], stdout=subprocess.DEVNULL, check=True)
    after = os.times()
    cpu = after.children_user + after.children_system
    return Took(time.perf_counter() - wall, cpu - before.children_user - before.children_system)


def log(directory: Path) -> list[dict]:
    """The candidates of a run, without what they took."""
    lines = (directory / "candidates.jsonl").read_text().splitlines()
    return [{**json.loads(line), "seconds": 0} for line in lines]


def main() -> None:
    """Measures; prints seconds, the ratio, and one line of JSON at the end."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="a directory that is not there yet")
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--sweep", nargs="+", default=["search.strategy=CMA_ES,SNES", "seed=0,1,2"])
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    swept, given = args.out / "sweep", [f"--config={args.config}"]
    axes = [f"--sweep={axis}" for axis in args.sweep]
    print(f"jax {jax.__version__}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    together = took("jaxmerge.sweep", *given, *axes, f"--workdir={swept}")
    print(f"sweep {together.wall:.1f} s, {together.cpu:.1f} s of processors", flush=True)
    separate = {}
    for name in json.loads((swept / "sweep.json").read_text())["cells"]:
        values = [f"--config.{value}" for value in name.split(",")]
        alone = args.out / name
        separate[name] = took("jaxmerge.run", *given, *values, f"--workdir={alone}")
        same = "the same" if log(alone) == log(swept / name) else "OTHER"
        print(f"{name} {separate[name].wall:.1f} s, {separate[name].cpu:.1f}, {same} candidates")
    total = Took(*map(sum, zip(*separate.values())))
    print(f"{len(separate)} separate runs {total.wall:.1f} s, {total.cpu:.1f} s of processors")
    wall, cpu = together.wall / total.wall, together.cpu / total.cpu
    print(f"the sweep takes {wall:.2f} of their time, {cpu:.2f} of their processor time")
    print(json.dumps({"sweep": together, "separate": separate, "load": os.getloadavg()}))


if __name__ == "__main__":
    main()
