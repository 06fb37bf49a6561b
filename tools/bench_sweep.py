"""A sweep against separate runs of its cells: seconds, and whether both wrote the same.

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

import jax


def seconds(*arguments: str) -> float:
    """How long `python -m` with these arguments takes."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", *arguments], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


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
    together = seconds("jaxmerge.sweep", *given, *axes, f"--workdir={swept}")
    print(f"sweep {together:.1f} s", flush=True)
    separate = {}
    for name in json.loads((swept / "sweep.json").read_text())["cells"]:
        values = [f"--config.{value}" for value in name.split(",")]
        alone = args.out / name
        separate[name] = seconds("jaxmerge.run", *given, *values, f"--workdir={alone}")
        same = "the same" if log(alone) == log(swept / name) else "OTHER"
        print(f"{name} {separate[name]:.1f} s, {same} candidates", flush=True)
    total = sum(separate.values())
    print(
        f"{len(separate)} separate runs {total:.1f} s; the sweep is {together / total:.2f} of them"
    )
    print(json.dumps({"sweep": together, "separate": separate}))


if __name__ == "__main__":
    main()
