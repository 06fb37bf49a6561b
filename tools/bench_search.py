"""The search's work against its peers and the machine's limits, in turn in one run.

    python tools/bench_search.py [--rounds=5] [--slow-rounds=1] [--examples=200] [--out=FILE]
    python tools/bench_search.py --small     # tries everything out, and measures nothing

Each measurement is a process of its own, one after the other; peers run in an environment that is
made in --directory, with as many threads as there are cores. What is measured:

1. One candidate, merge and evaluation, of four random Llamas of 11.7M parameters in float32:
   --examples multiple choices of four options and as many greedy texts of 32 tokens. jaxmerge in
   steady state, with all cores on one candidate, or a candidate on each core; mergekit's linear
   merge in memory with lm-eval at batch size 1 (as mergekit-evolve ships) and 32; and transformers
   with batches by hand. All of them answer the same questions, and the answers are compared.
2. SmolLM2-135M on questions of reasoning-gym: jaxmerge, as above, against transformers with batches
   by hand, both in float32 and bfloat16, the fastest of each compared.
3. FLOP/s of a prefill over that of one large matrix product in the same type.
4. What a run of configs/quickstart.py spends on anything but merging, evaluating and compiling;
   `search` is that between the first evaluation and the last, `around` that before and after. The
   second of two runs, which finds its programs in the cache and so is the shorter one.

Prints medians and ratios, and writes all rounds as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import bench_search_workload as workload
import numpy as np

_TOOLS = Path(__file__).parent
_CORES = len(os.sched_getaffinity(0))
_PEERS = ("torch==2.13.0", "mergekit==0.1.5", "lm-eval==0.4.13")  # torch first: see peer_python
_PARTS = ("merge", "choice", "writing")
_SMALL = workload.Size(layers=2, width=64, feed_forward=128, heads=4, vocabulary=1024)


class Ratio(NamedTuple):
    """A line of the table."""

    name: str
    value: float
    bar: str


class Bench:
    """Measurements by name, each a process that ends before the next begins.

    Args:
        directory: for models, questions, the peers' environment and what processes are told.
    """

    def __init__(self, directory: Path):
        self._directory, self.results = directory, {}

    def run(self, name: str, python: str | Path, script: str, **job: Any) -> None:
        """Runs a script on a job, and keeps what it found."""
        out, file = self._directory / f"{name}.out.json", self._directory / f"{name}.json"
        file.write_text(json.dumps({**job, "out": str(out)}))
        out.unlink(missing_ok=True)
        here = {**os.environ, "PYTHONPATH": str(_TOOLS.parent), "HF_HUB_OFFLINE": "1"}
        started = time.perf_counter()
        with open(self._directory / f"{name}.log", "w") as log:
            subprocess.run(
                [python, _TOOLS / script, file], env=here, stdout=log, stderr=log, check=True
            )
        self.results[name] = json.loads(out.read_text())
        rounds = len(self.results[name]["rounds"])
        took = time.perf_counter() - started
        print(f"{name}: {rounds} rounds, process {took:.0f} s", file=sys.stderr, flush=True)

    def ours(self, name: str, **job: Any) -> None:
        """Measures jaxmerge."""
        self.run(name, sys.executable, "bench_search_jaxmerge.py", **job)

    def median(self, name: str, *parts: str) -> float:
        """The median over the rounds of the sum of some parts."""
        rounds = self.results[name]["rounds"]
        return statistics.median(sum(each[part] for part in parts) for each in rounds)

    def candidate(self, name: str) -> float:
        """Seconds of a candidate."""
        return self.median(name, *_PARTS)

    def differ(self, one: str, other: str) -> dict[str, int]:
        """How many answers of two measurements are not the same, by kind of question."""
        here, there = self.results[one]["answers"], self.results[other]["answers"]
        return {kind: sum(a != b for a, b in zip(here[kind], there[kind])) for kind in here}


def peer_python(directory: Path) -> Path:
    """The Python of the peers' environment, which is made when it is missing."""
    environment = directory / "peers"
    if not (environment / "made").exists():
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        pip = [environment / "bin" / "pip", "install", "--quiet"]
        # By itself first: mergekit alone would take whatever build of torch is the newest.
        subprocess.run([*pip, _PEERS[0]], check=True)
        subprocess.run([*pip, *_PEERS], check=True)
        (environment / "made").touch()
    return environment / "bin" / "python"


def measure_candidates(bench: Bench, args: argparse.Namespace, directory: Path) -> list[Ratio]:
    """Row 1: the workload of mergekit-evolve."""
    counts = workload.Counts(args.examples, args.examples, args.new_tokens)
    size = _SMALL if args.small else workload.Size()
    pool = workload.make_pool(directory / f"pool-{size.width}", size)
    questions = str(directory / f"questions-{args.examples}")
    workload.make_questions(Path(questions), counts)
    weights = np.random.default_rng(0).dirichlet(np.ones(len(pool)), args.rounds * _CORES)
    job = {
        "pool": pool,
        "weights": weights.tolist(),
        "questions": questions,
        "new_tokens": args.new_tokens,
        "dtype": "float32",
    }
    several = f"jaxmerge, {_CORES} at a time"
    bench.ours("jaxmerge", what="candidates", rounds=args.rounds, devices=1, **job)
    bench.ours(several, what="candidates", rounds=args.rounds, devices=_CORES, **job)
    if args.no_peers:
        return []
    peer, script = peer_python(directory), "bench_search_peers.py"
    batch, slow = {"batch": 32, "warm": True, "rounds": args.rounds}, args.slow_rounds
    bench.run("transformers", peer, script, peer="transformers", **job, **batch)
    bench.run("lm-eval 32", peer, script, peer="lm_eval", **job, **batch)
    bench.run("lm-eval 1", peer, script, peer="lm_eval", **job, batch=1, warm=False, rounds=slow)
    best = min(("jaxmerge", several), key=bench.candidate)
    bars = {"lm-eval 1": 10, "lm-eval 32": 3, "transformers": 3}
    return [
        Ratio(f"{other} / {best}", bench.candidate(other) / bench.candidate(best), f">= {bar}")
        for other, bar in bars.items()
    ]


def measure_smollm2(bench: Bench, args: argparse.Namespace, directory: Path) -> list[Ratio]:
    """Row 2: a real model, merged with itself."""
    questions = directory / f"gym-{args.real_examples}"
    counts = workload.Counts(args.real_examples, args.real_examples, args.new_tokens)
    workload.make_gym_questions(questions, counts)
    for dtype in ("float32", "bfloat16"):
        job = {
            "pool": workload.twice(args.smollm2, directory),
            "weights": [[0.5, 0.5]] * args.rounds * _CORES,
            "questions": str(questions),
            "new_tokens": args.new_tokens,
            "dtype": dtype,
            "rounds": args.rounds,
        }
        name = f"SmolLM2 {dtype}"
        bench.ours(f"jaxmerge {name}", what="candidates", devices=1, **job)
        several = f"jaxmerge {name}, {_CORES} at a time"
        bench.ours(several, what="candidates", devices=_CORES, **job)
        if not args.no_peers:
            peer, script = peer_python(directory), "bench_search_peers.py"
            batch = {"batch": 32, "warm": True}
            bench.run(f"transformers {name}", peer, script, peer="transformers", **batch, **job)
    if args.no_peers:
        return []
    best = {
        who: min((name for name in bench.results if f"{who} Smol" in name), key=bench.candidate)
        for who in ("jaxmerge", "transformers")
    }
    one, other = best["transformers"], best["jaxmerge"]
    return [Ratio(f"{one} / {other}", bench.candidate(one) / bench.candidate(other), ">= 1.5")]


def measure_prefill(bench: Bench, args: argparse.Namespace, directory: Path) -> list[Ratio]:
    """Row 3: a prefill against a matrix product."""
    size = _SMALL if args.small else workload.Size()
    found = []
    random = ("random Llama", workload.make_pool(directory / f"pool-{size.width}", size)[:2])
    real = (args.smollm2.name, workload.twice(args.smollm2, directory))
    asked = [(*random, "float32"), (*real, "float32"), (*real, "bfloat16")]
    for what, pool, dtype in asked[:1] if args.small else asked:
        name = f"prefill, {what}, {dtype}"
        bench.ours(name, what="prefill", pool=pool, dtype=dtype, rounds=args.rounds)
        share = bench.median(name, "prefill") / bench.median(name, "product")
        found.append(Ratio(f"{name} / product", share, ">= 0.6"))
    return found


def measure_overhead(bench: Bench, args: argparse.Namespace, directory: Path) -> list[Ratio]:
    """Row 4: what a run does besides."""
    changes: dict[str, Any] = {"pool.checkpoints": [str(args.quickstart / "*")]}
    if args.small:
        changes |= {"search.budget": 10, "baselines": ["uniform"], "heldout": []}
        changes |= {"objective.search_examples": 8, "objective.test_examples": 8}
    config = str(_TOOLS.parent / "configs" / "quickstart.py")
    with tempfile.TemporaryDirectory() as cache:
        changes["compilation_cache"] = cache
        for name in ("overhead, cold", "overhead"):
            bench.ours(name, what="overhead", rounds=1, config=config, changes=changes)
    whole = bench.median("overhead", "run")
    return [
        Ratio(f"{part} / run", bench.median("overhead", part) / whole, bar)
        for part, bar in {"search": "< 0.02", "around": "", "compiling": ""}.items()
    ]


ROWS = {
    "candidates": measure_candidates,
    "smollm2": measure_smollm2,
    "prefill": measure_prefill,
    "overhead": measure_overhead,
}


def report(bench: Bench, ratios: Sequence[Ratio]) -> dict[str, Any]:
    """Prints the table; returns what is not in the rounds."""
    versions = {}
    for name, result in bench.results.items():
        versions |= result["versions"]
        seconds = {part: bench.median(name, part) for part in result["rounds"][0]}
        print(f"{name:32} medians of {len(result['rounds'])}: {_shown(seconds)}")
        if "compiling" in result:
            once = {part: result[part] for part in ("encoding", "compiling")}
            print(f"{'':32} once: {_shown(once)}")
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    print(f"{_CORES} cores, load {os.getloadavg()[0]:.1f}; python {' '.join(sys.argv)}")
    differences = {}
    for name, result in bench.results.items():
        ours = _same_questions(bench, name)
        if "answers" in result and name != ours:
            differences[name] = bench.differ(ours, name)
            asked = {kind: len(given) for kind, given in result["answers"].items()}
            print(f"{name}: answers unlike those of {ours} {differences[name]} of {asked}")
    for name, value, bar in ratios:
        print(f"{name:64}{value:8.3f}  {bar}")
    return {"versions": versions, "differences": differences}


def _same_questions(bench: Bench, name: str) -> str:
    """The measurement of jaxmerge that was asked the same in the same type."""
    kind = name.partition(",")[0].partition("SmolLM2")
    return f"jaxmerge {''.join(kind[1:])}" if kind[1] else "jaxmerge"


def _shown(found: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in found.items())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--directory", type=Path, default=Path("bench"), help="for models and all")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slow-rounds", type=int, default=1, help="of lm-eval at batch size 1")
    parser.add_argument("--examples", type=int, default=200, help="of each kind")
    parser.add_argument("--real-examples", type=int, default=16, help="the same for SmolLM2")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--smollm2", type=Path, default=Path("pools/smollm2-instruct"))
    parser.add_argument("--quickstart", type=Path, default=Path("pools/quickstart"))
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--small", action="store_true", help="everything, as little as possible")
    parser.add_argument("--out", type=Path, default=Path("bench_search.json"))
    args = parser.parse_args()
    if args.small:
        args.rounds, args.examples, args.real_examples, args.new_tokens = 1, 4, 1, 4
    args.directory = args.directory.absolute()
    args.smollm2, args.quickstart = args.smollm2.absolute(), args.quickstart.absolute()
    return args


def main() -> None:
    """Measures, prints a table, and writes what was measured as JSON."""
    args = _arguments()
    args.directory.mkdir(parents=True, exist_ok=True)
    bench, ratios = Bench(args.directory), []
    for row in args.rows:
        ratios += ROWS[row](bench, args, args.directory)
    said = report(bench, ratios)
    record = {"argv": sys.argv, "cores": _CORES, **said, "ratios": ratios}
    args.out.write_text(json.dumps({**record, "measured": bench.results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
