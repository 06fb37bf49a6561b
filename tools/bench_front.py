"""Fronts at equal tokens: climbs along preferences, evolution, a surrogate, and plain searches.

    python -m tools.bench_front --out=DIR

Makes a run for each way and each seed of the search, one after the other, and then the table of
docs/front.md. The same command goes on where it was stopped; a run that is finished in
DIR is not made again. With --tables nothing is run.

What is compared is the hypervolume on test of the points of each front: they are chosen by the same
rule on the search split, from all that a way has scored. Two ways look for no front: what a plain
search happens to score stands for itself.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxmerge.experiment.held import Held
from tools.bench_strategies import directory, interval, make, markdown

PLAIN = ("CMA-ES, no front", "gradient, no front")  # what the others are compared with

# Of each way the fields of the config in which it differs.
WAYS: dict[str, dict[str, Any]] = {
    "gradient": {"search.strategy": "gradient"},
    "gradient, Chebyshev": {"search.strategy": "gradient", "front.scalarisation": "chebyshev"},
    "NSGA-II": {"search.strategy": "optuna:NSGAIISampler"},
    "NSGA-III": {"search.strategy": "optuna:NSGAIIISampler"},
    "surrogate": {"search.strategy": "surrogate"},
    "CMA-ES, no front": {"search.strategy": "CMA_ES"},
    "gradient, no front": {"search.strategy": "gradient", "front.steps": 0},
}
# So many that the tokens end every search.
_COMMON = {
    "search.budget": 1_000_000,
    "search.steps": 10_000,
    "front.steps": 10_000,
    "baselines": ("uniform", "best-per-task", "greedy"),
    "heldout": (),
    "analyses.leave_one_out": False,
    "analyses.transfer": False,
    "export.formats": ("orbax",),
    "report.every_seconds": 0.0,
}


def arguments(args: argparse.Namespace, way: str, seed: int) -> list[str]:
    """What the command line of a run says of its config."""
    fields = {
        **_COMMON,
        **{"seed": seed, "search.budget_tokens": args.tokens, "front.points": args.points},
        **WAYS[way],
    }
    given = [f"--config.{name}={value}" for name, value in fields.items()]
    return [f"--config={args.config}", *given, *args.set]


def found(workdir: Path) -> dict[str, float]:
    """What a run says of its front."""
    results = json.loads((workdir / "results.json").read_text())
    front = results["front"]
    return {
        "search": front["hypervolume"]["search"],
        "test": front["hypervolume"]["test"],
        "points": len(front["points"]),
        "tokens": results["best"]["tokens"],
        "seconds": sum(results["seconds"].values()),
    }


def table(runs: dict[str, dict[int, dict[str, float]]]) -> str:
    """Of each way the means over its seeds, and its gain over the plain searches, as Markdown."""
    rows = []
    for way, by_seed in runs.items():
        gains = []
        for plain in PLAIN:
            seeds = [seed for seed in by_seed if seed in runs.get(plain, {}) and way != plain]
            gain = [by_seed[seed]["test"] - runs[plain][seed]["test"] for seed in seeds]
            gains.append(f"{np.mean(gain):+.3f} {_ends(gain, '+')}" if gain else "")
        each = [*by_seed.values()]
        mean = {key: float(np.mean([one[key] for one in each])) for key in each[0]}
        rows.append(
            [
                way,
                f"{mean['test']:.3f} {_ends([one['test'] for one in each])}",
                *gains,
                *(f"{mean['search']:.3f}", f"{mean['points']:.1f}"),
                *(f"{mean['tokens']:,.0f}", f"{mean['seconds']:.0f}"),
            ]
        )
    header = ["way", "on test", *(f"over {plain}" for plain in PLAIN)]
    return "\n".join(markdown([*header, "on search", "points", "tokens", "seconds"], rows))


def _ends(values: list[float], sign: str = "") -> str:
    ends = interval(values)
    return "[" + ", ".join(f"{end:{sign}.3f}" for end in ends) + "]" if ends else ""


def main() -> None:
    """Runs what is not there yet; prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--tokens", type=int, default=1_650_000, help="of each run")
    parser.add_argument("--points", type=int, default=8, help="of each front")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS])
    parser.add_argument(
        "--set", action="append", default=[], help="--set=--config.FIELD=VALUE, for all runs"
    )
    parser.add_argument("--tables", action="store_true", help="run nothing")
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    held = Held()
    for way in () if args.tables else args.ways:
        for seed in range(args.seeds):
            make(directory(args.out, way, seed), arguments(args, way, seed), held)
    runs: dict[str, dict[int, dict[str, float]]] = {}
    for way in WAYS:
        for seed in range(args.seeds):
            if (directory(args.out, way, seed) / "results.json").exists():
                runs.setdefault(way, {})[seed] = found(directory(args.out, way, seed))
    print(table(runs))


if __name__ == "__main__":
    main()
