"""A pool that is larger than the memory it may take, searched from disk: how much that takes.

    python tools/large_pool.py --base=pools/smollm2-instruct --directory=/tmp/large --count=45

Makes `count` models out of one, each with a little noise of its own, searches over all of them from
disk and says how much memory the process had at most by the kernel's accounting (VmHWM: mapped
pages included, but not the cache of files, which is the kernel's to give back), and what it read.
Then searches over the first six of them, from disk and from
memory, and compares the candidates of the two.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.checkpoints import huggingface
from jaxmerge.checkpoints.pool import load
from jaxmerge.checkpoints.survey import find
from jaxmerge.sharding import make_mesh
from jaxmerge.trees import named_leaves

_FEW = 6  # checkpoints of the pool that fits into memory
_NOISE = 0.05  # standard deviation, in units of each leaf's own


def make_pool(base: Path, directory: Path, count: int) -> int:
    """Writes the models that are not there yet; returns the bytes of all."""
    (source,) = find([str(base)])
    pool = load([source], make_mesh(), ((".*", ()),))
    leaves = named_leaves(pool.trees[0])
    for k in range(count):
        path = directory / f"model{k:02}"
        if path.exists():
            continue

        def noisy(name: str, k: int = k) -> jax.Array:
            leaf = np.asarray(leaves[name]).astype(np.float32)
            rng = np.random.default_rng((k, sorted(leaves).index(name)))
            leaf += rng.standard_normal(leaf.shape, np.float32) * (_NOISE * leaf.std())
            return jnp.asarray(leaf, leaves[name].dtype)

        huggingface.save(
            path,
            huggingface.layout(str(base)),
            noisy,
            abstract=pool.trees[0],
            like=str(base),
        )
    return count * pool.records[0].bytes


# Runs the command line of jaxmerge in this process, then says what the kernel counted.
_CHILD = """
import atexit, pathlib, re, sys
atexit.register(lambda: print(re.findall(
    "VmHWM:.*", pathlib.Path("/proc/self/status").read_text())[0], file=sys.stderr))
from jaxmerge.run import console
console()
"""


def search(pool: str, base: Path, workdir: Path, residency: str) -> tuple[int, dict, list[dict]]:
    """Searches; the most memory that it had in bytes, its results, and its candidates."""
    flags = {
        "pool.checkpoints": f"('{pool}',)",
        "pool.base": base,
        "pool.residency": residency,
        "pool.dtype": "float32",  # stored in half of that, and far slower to evaluate on a CPU
        "evaluate.candidates_per_step": 2,  # 0 would take as many as the memory here allows
        "objective.tasks": "('sums',)",
        "objective.search_examples": 4,
        "objective.test_examples": 4,
        "baselines": "('uniform',)",
        "heldout": "()",
        "search.budget": 8,
        "search.population": 8,
        "search.init": "()",
        "analyses.leave_one_out": False,
        "analyses.transfer": False,
        "export.formats": "()",
    }
    command = [sys.executable, "-c", _CHILD, "--config=configs/smollm2.py", f"--workdir={workdir}"]
    command += [f"--config.{name}={value}" for name, value in flags.items()]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    (kilobytes,) = re.findall(r"VmHWM:\s*(\d+) kB", done.stderr)
    lines = (workdir / "candidates.jsonl").read_text().splitlines()
    candidates = [{**json.loads(line), "seconds": 0} for line in lines]
    return int(kilobytes) * 1024, json.loads((workdir / "results.json").read_text()), candidates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--directory", type=Path, required=True, help="for the pool and the runs")
    parser.add_argument("--count", type=int, default=45)
    arguments = parser.parse_args()
    models, runs = arguments.directory / "pool", arguments.directory / "runs"
    size = make_pool(arguments.base, models, arguments.count)
    peak, results, candidates = search(f"{models}/*", arguments.base, runs / "large", "disk")
    read = results["residency"]
    print(f"{arguments.count} checkpoints, {size / 1e9:.2f} GB, {len(candidates)} evaluations")
    print(f"at most {peak / 1e9:.2f} GB of memory, {peak / size:.2f} of the pool")
    print(f"read {read['bytes_read'] / 1e9:.1f} GB in {read['seconds']:.0f} s with the merges")
    print("seconds:", json.dumps(results["seconds"]))
    few = f"{models}/model0[0-{_FEW - 1}]"
    logs = [search(few, arguments.base, runs / each, each)[2] for each in ("disk", "device")]
    if logs[0] != logs[1]:
        raise SystemExit(f"{_FEW} checkpoints score otherwise from disk than from memory")
    print(f"{_FEW} checkpoints score the same from disk and from memory")


if __name__ == "__main__":
    main()
