"""Ways of searching at equal tokens: gradients through the merge, evolution, random draws.

    python tools/bench_strategies.py --out=DIR

Makes a run for each way and each seed of the search, one after the other, and then the tables of
docs/strategies.md. As in a sweep, the seeds of a way share the pool and the scores of checkpoints
and baselines. The same command goes on where it was stopped, and a run that is finished in DIR is
not made again; with more --seeds, only those that are new. With --tables nothing is run, and the
tables are those of what is finished.

Every run has the same pool, the same examples and the same --tokens; gradients take as many steps
as these are enough for. How tokens are counted stands in docs/searching.md, "Budgets in tokens".

A pool of SmolLM2, with fewer seeds, as each run takes long there; see docs/strategies.md:

    python tools/bench_strategies.py --out=DIR --config=configs/smollm2.py --tokens=300000 --seeds=1
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from ml_collections import config_flags
from scipy import stats as scipy_stats

from jaxmerge.experiment.held import Held
from jaxmerge.experiment.search import search
from jaxmerge.scores import pareto, stats
from jaxmerge.scores.objective import Objective, from_plain

PLAIN = "CMA-ES"  # the paper's method; its runs have the random draws too

_WARM = {"search.warm_start": "gradient", "search.steps": 24}  # leaves a good half of the tokens

# Of each way the fields of the config in which it differs. One more is one line more.
WAYS: dict[str, dict[str, Any]] = {
    PLAIN: {"search.strategy": "CMA_ES", "space.granularity": "model"},
    "gradient by model": {"search.strategy": "gradient", "space.granularity": "model"},
    "gradient by layer": {"search.strategy": "gradient", "space.granularity": "layer"},
    "gradient by kind": {"search.strategy": "gradient", "space.granularity": "kind"},
    "gradient by leaf": {"search.strategy": "gradient", "space.granularity": "leaf"},
    "gradient by leaf, softmax": {
        **{"search.strategy": "gradient", "space.granularity": "leaf"},
        **{"space.constraint": "softmax", "search.smoothing": 0.0},
    },
    "gradient by leaf, from uniform": {
        **{"search.strategy": "gradient", "space.granularity": "leaf", "search.start": "uniform"},
    },
    "Sep-CMA-ES by leaf": {"search.strategy": "Sep_CMA_ES", "space.granularity": "leaf"},
    "SNES by leaf": {"search.strategy": "SNES", "space.granularity": "leaf"},
    "CMA-ES of Optuna": {"search.strategy": "optuna:CmaEsSampler", "space.granularity": "model"},
    "CMA-ES of Optuna, adapted": {
        **{"search.strategy": "optuna:CmaEsSampler", "space.granularity": "model"},
        "search.params": {"lr_adapt": True},
    },
    "CMA-ES, signed": {
        **{"search.strategy": "CMA_ES", "space.granularity": "model"},
        "space.constraint": "signed",
    },
    "CMA-ES, eighths": {
        **{"search.strategy": "CMA_ES", "space.granularity": "model", "search.subset": 0.125},
    },
    "CMA-ES, warm": {"search.strategy": "CMA_ES", "space.granularity": "model", **_WARM},
    "SNES by leaf, warm": {"search.strategy": "SNES", "space.granularity": "leaf", **_WARM},
}
BASELINES = ("uniform", "best-per-task", "greedy", "random")  # rows too, from the runs of PLAIN

# So many that the tokens end every search.
_UNBOUNDED = {"search.budget": 1_000_000, "search.steps": 10_000}
# What does not bear on the search, or is the same for all.
_COMMON = {
    "analyses.leave_one_out": False,
    "analyses.transfer": False,
    "export.formats": ("orbax",),
    "report.every_seconds": 0.0,
}


class Found(NamedTuple):
    """What a way found with a seed; scores are means over test examples."""

    test: float
    samples: Mapping[str, np.ndarray]  # by task, of each test example
    heldout: Mapping[str, float]  # {}: it was not scored there
    tokens: int
    seconds: float | None  # of the search; None: not told apart from others
    # Of the way's own candidates and the checkpoints, on all examples of the search split: whether
    # none dominates it, and the volume below them.
    front: bool
    hypervolume: float
    nonzero: float  # share of the checkpoints


Runs = Mapping[str, Mapping[int, Found]]  # by way and seed


def arguments(args: argparse.Namespace, way: str, seed: int) -> list[str]:
    """What the command line of a run says of its config."""
    baselines = BASELINES if way == PLAIN else BASELINES[:-1]
    fields = {
        **_COMMON,
        **_UNBOUNDED,
        "seed": seed,
        "baselines": baselines,
        "search.budget_tokens": args.tokens,
        **({"pool.checkpoints": (args.pool,)} if args.pool else {}),
        **WAYS[way],
    }
    given = [f"--config.{name}={value}" for name, value in fields.items()]
    return [f"--config={args.config}", *given, *args.set]


def directory(out: Path, way: str, seed: int) -> Path:
    """Where a run is."""
    return out / f"{way.replace(',', '').replace(' ', '-')}-{seed}"


def make(workdir: Path, given: Sequence[str], held: Held) -> None:
    """Makes a run, unless it is finished.

    Args:
        workdir: its run directory.
        given: see `arguments`.
        held: what the runs before it have left.
    """
    if (workdir / "results.json").exists():
        return
    parsed = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=parsed, sys_argv=["", *given])
    parsed(["", *given])
    started, load = time.perf_counter(), os.getloadavg()[0]
    command = ["python", "-m", "jaxmerge.run", *given, f"--workdir={workdir}"]
    search(parsed["config"].value, str(workdir), shlex.join(command), held)
    seconds = time.perf_counter() - started
    (workdir / "bench.json").write_text(json.dumps({"load": load, "wall": round(seconds, 1)}))
    print(f"{workdir.name}: {seconds:.0f} s, load {load:.1f} before", flush=True)


def found(workdir: Path, name: str) -> Found:
    """What a run says of its search, or of one of its baselines by name.

    Args:
        workdir: of a finished run.
        name: `search`, or that of a baseline.
    """
    results = json.loads((workdir / "results.json").read_text())
    entries = [results["best"], *results["baselines"]]
    entry = next(one for one in entries if one["name"] == name)
    lines = [json.loads(line) for line in (workdir / "candidates.jsonl").read_text().splitlines()]
    searched = name == "search"
    origins = ("individual", *(("search", "warm-start") if searched else (f"baseline:{name}",)))
    scores_PxM = np.array(
        [
            [one["scores"][task] for task in results["tasks"]]
            for one in lines
            if (one["split"], one.get("out_of")) == ("search", None) and one["origin"] in origins
        ]
    )
    own_M = np.array([entry["search"][task] for task in results["tasks"]])
    corner_M = np.array([results["hypervolume_reference"][task] for task in results["tasks"]])
    dominated = (scores_PxM >= own_M).all(axis=1) & (scores_PxM > own_M).any(axis=1)
    weights = np.array([*entry["weights"].values()])
    threshold = results["analyses"]["nonzero"]["threshold"]
    return Found(
        test=entry["test_objective"],
        samples=_samples(workdir, name, results["tasks"], lines),
        heldout=entry["heldout"],
        tokens=entry["tokens"],
        seconds=results["seconds"]["search"] if searched else None,
        front=not dominated.any(),
        hypervolume=pareto.hypervolume(scores_PxM[pareto.front(scores_PxM)], corner_M),
        nonzero=float(np.mean(np.abs(weights) > threshold)),
    )


def _samples(
    workdir: Path, name: str, tasks: Sequence[str], lines: Sequence[Mapping[str, Any]]
) -> dict[str, np.ndarray]:
    """Scores of a method's choice on each test example, by task."""
    sought = ("final", name, "test")
    final = next(one for one in lines if (one["origin"], one["name"], one["split"]) == sought)
    rows = {}
    for task in tasks:
        count = final["n"][task]
        file = workdir / "examples" / "test" / f"{task}.f32"
        rows[task] = np.fromfile(file, "<f4", count=count, offset=4 * final["row"] * count)
    return rows


def collected(out: Path, seeds: Sequence[int]) -> dict[str, dict[int, Found]]:
    """All that is finished."""
    runs: dict[str, dict[int, Found]] = {}
    for way in WAYS:
        done = {seed: directory(out, way, seed) for seed in seeds}
        done = {seed: path for seed, path in done.items() if (path / "results.json").exists()}
        if done:
            runs[way] = {seed: found(path, "search") for seed, path in done.items()}
        for name in BASELINES if way == PLAIN and done else ():
            runs[name] = {seed: found(path, name) for seed, path in done.items()}
    return runs


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's 95% interval of the mean over seeds; None: there is one seed."""
    if len(values) < 2:
        return None
    wide = scipy_stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return float(np.mean(values) - wide), float(np.mean(values) + wide)


def summary(runs: Runs, objective: Objective, against: str = PLAIN) -> dict[str, Any]:
    """Of each way the means over its seeds, and how it compares with the way `against`."""
    said: dict[str, Any] = {}
    for way, by_seed in runs.items():
        each = [*by_seed.values()]
        told = {
            "seeds": [*by_seed],
            "test": float(np.mean([one.test for one in each])),
            "ci95_seeds": interval([one.test for one in each]),
            "heldout": {
                task: float(np.mean([one.heldout[task] for one in each]))
                for task in each[0].heldout
            },
            "tokens": round(float(np.mean([one.tokens for one in each]))),
            "seconds": _mean([one.seconds for one in each]),
            "front": float(np.mean([one.front for one in each])),
            "hypervolume": float(np.mean([one.hypervolume for one in each])),
            "nonzero": float(np.mean([one.nonzero for one in each])),
        }
        if way != against and against in runs:
            told["over"] = _paired(by_seed, runs[against], objective)
        said[way] = told
    return said


def _paired(
    ours: Mapping[int, Found], theirs: Mapping[int, Found], objective: Objective
) -> dict[str, Any] | None:
    """The difference over the seeds of both, with its intervals over test examples and over seeds.

    The first is the bootstrap's on the same examples, of scores that are means over the seeds; the
    second is Student's.
    """
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        return None
    mine, other = (
        {task: np.mean([of[s].samples[task] for s in seeds], axis=0) for task in objective.tasks}
        for of in (ours, theirs)
    )
    compared = stats.paired(mine, other, objective)
    return {
        "delta": compared.delta,
        "ci95_examples": (compared.low, compared.high),
        "ci95_seeds": interval([ours[s].test - theirs[s].test for s in seeds]),
    }


def _cpu() -> str:
    """The model of the processor, where Linux says it."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None


def tables(said: Mapping[str, Any], single: Mapping[str, float], against: str = PLAIN) -> str:
    """The summary as Markdown.

    Args:
        said: see `summary`.
        single: held-out scores of the best single checkpoint, by task.
        against: see `summary`.
    """
    heldout = [*single]
    header = ["way", "test", f"over {against}, examples", "seeds", *heldout, "tokens", "seconds"]
    rows = []
    for way, told in said.items():
        over = told.get("over") or {}
        rows.append(
            [
                way,
                f"{100 * told['test']:.1f} {_ends(told['ci95_seeds'])}".strip(),
                f"{100 * over['delta']:+.1f} {_ends(over['ci95_examples'], '+')}" if over else "",
                _ends(over.get("ci95_seeds"), "+"),
                *(_percent(told["heldout"].get(task)) for task in heldout),
                f"{told['tokens']:,}",
                "" if told["seconds"] is None else f"{told['seconds']:.0f}",
            ]
        )
    claims = [
        [
            way,
            f"{told['front']:.0%}",
            f"{told['hypervolume']:.3f}",
            f"{told['nonzero']:.0%}",
            *(
                f"{100 * (told['heldout'][task] - single[task]):+.1f}" if told["heldout"] else ""
                for task in heldout
            ),
        ]
        for way, told in said.items()
    ]
    of_claims = ["way", "on the front", "hypervolume", "weights not 0", *heldout]
    return "\n".join([*markdown(header, rows), "", *markdown(of_claims, claims)])


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _ends(ends: Sequence[float] | None, sign: str = "") -> str:
    return "[" + ", ".join(f"{100 * end:{sign}.1f}" for end in ends) + "]" if ends else ""


def report(args: argparse.Namespace, seeds: Sequence[int]) -> None:
    """Prints machine, versions, command and tables; writes bench_strategies.json."""
    runs = collected(args.out, seeds)
    if PLAIN not in runs:
        return
    first = directory(args.out, PLAIN, next(iter(runs[PLAIN])))
    results = json.loads((first / "results.json").read_text())
    said = summary(runs, from_plain(results["objective"]), args.against)
    single = next((one["heldout"] for one in results["individuals"] if one["heldout"]), {})
    loads = [json.loads(path.read_text())["load"] for path in args.out.glob("*/bench.json")]
    machine = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "devices": results["devices"],
        "load_before_runs": [min(loads, default=None), max(loads, default=None)],
    }
    record = {"argv": sys.argv, "machine": machine, "versions": results["versions"]}
    path = args.out / "bench_strategies.json"
    path.write_text(json.dumps({**record, "single": single, "ways": said}, indent=1) + "\n")
    print(json.dumps(record))
    print(tables(said, single, args.against), flush=True)


def main() -> None:
    """Runs what is not there yet; prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--pool", default="", help="pattern of checkpoints, if not the config's")
    parser.add_argument("--tokens", type=int, default=545_000, help="of each search")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS])
    parser.add_argument(
        "--set", action="append", default=[], help="--set=--config.FIELD=VALUE, for all runs"
    )
    parser.add_argument("--against", choices=WAYS, default=PLAIN, help="what the others are over")
    parser.add_argument("--tables", action="store_true", help="run nothing")
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    held = Held()
    for way in args.ways if not args.tables else ():
        for seed in seeds:
            make(directory(args.out, way, seed), arguments(args, way, seed), held)
    report(args, seeds)


if __name__ == "__main__":
    main()
