"""How many tokens a search needs with racing, with a subset of the examples, and with both.

    python tools/bench_racing.py --out=/tmp/bench_racing

Every seed is searched plainly and in each of the other ways, at several budgets; as a search does
not depend on its budget, a shorter one is the beginning of the longer ones. All are in one process
that remembers what it has scored, and their tokens are those of the log: what a search by itself
reads and writes, the single checkpoints included, without baselines and tests.

A way has reached the plain search when its mean test score over the seeds is at least the lower end
of the 95% interval (Student's t over the seeds) of the plain search at its whole budget. Seeds are
within when their test score is at least the lower end of the bootstrap interval of the plain search
of the same seed.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import stats as scipy_stats

from jaxmerge.config import Config
from jaxmerge.experiment import phases, results
from jaxmerge.experiment.held import Held
from jaxmerge.experiment.prepare import prepare
from jaxmerge.scores import stats
from jaxmerge.search import baselines
from jaxmerge.search.archive import Archive


class Found(NamedTuple):
    """A search at a budget."""

    test: float  # objective of the winner on test examples
    ci95: tuple[float, float]
    search: float  # on all search examples
    tokens: int  # of the single checkpoints and the search
    individuals: int  # tokens of the single checkpoints
    dropped: int  # candidates that a race dropped
    seconds: float


Runs = Mapping[str, Mapping[int, Sequence[Found]]]  # by way and budget: of each seed


def searched(config: Config, workdir: Path, held: Held) -> Found:
    """Runs the search of a config, and tests what it finds."""
    started = time.perf_counter()
    prepared = prepare(config, str(workdir), held)
    with closing(prepared.directory) as directory:
        archive = Archive(directory, prepared.evaluators)
        alone = baselines.individuals(archive, prepared.pool.names)
        objective = prepared.objective.measured_by([one.scores for one in alone])
        winner, _ = phases.search(config, prepared, archive, objective, alone, [])
        took = [sum((one.tokens or {}).values()) for one in archive.past]
        dropped = sum(one.dropped for one in archive.past)
        (tested,) = results.score_on_test(archive, [winner])
        ci95 = stats.interval(directory.examples(tested), objective)
    return Found(
        test=objective.of(tested.scores),
        ci95=ci95,
        search=objective.of(winner.candidate.scores),
        tokens=sum(took),
        individuals=sum(took[: len(alone)]),
        dropped=dropped,
        seconds=round(time.perf_counter() - started, 3),
    )


def summary(runs: Runs) -> dict[str, Any]:
    """What the ways reach, and their tokens relative to those of the plain search."""
    plain = runs["plain"][max(runs["plain"])]
    low, high = _interval([one.test for one in plain])
    said: dict[str, Any] = {"plain_ci95": [low, high], "ways": {}}
    for way, budgets in runs.items():
        rows = []
        for budget, found in sorted(budgets.items()):
            rows.append(
                {
                    "budget": budget,
                    "test": float(np.mean([one.test for one in found])),
                    "ci95": _interval([one.test for one in found]),
                    "search": float(np.mean([one.search for one in found])),
                    "minus_plain": _interval([a.test - b.test for a, b in zip(found, plain)]),
                    "tokens": _ratio(found, plain, alone=True),
                    "search_tokens": _ratio(found, plain, alone=False),
                    "seeds_within": sum(a.test >= b.ci95[0] for a, b in zip(found, plain)),
                }
            )
        reached = next((row for row in rows if row["test"] >= low), None)
        said["ways"][way] = {"budgets": rows, "reached": reached}
    return said


def table(said: Mapping[str, Any]) -> str:
    """The summary in words."""
    low, high = said["plain_ci95"]
    lines = [
        f"plain search at its whole budget: 95% interval of the mean [{low:.4f}, {high:.4f}]",
        f"{'way':13s} budget    test {'95%':>14s}  search  tokens  but checkpoints  seeds within",
    ]
    for way, of_way in said["ways"].items():
        for row in of_way["budgets"]:
            mark = " reached" if row is of_way["reached"] else ""
            lines.append(
                f"{way:13s} {row['budget']:6d}  {row['test']:.4f} [{row['ci95'][0]:.3f}, "
                f"{row['ci95'][1]:.3f}]  {row['search']:.4f}  {row['tokens']:6.3f}  "
                f"{row['search_tokens']:15.3f}  {row['seeds_within']:12d}{mark}"
            )
    return "\n".join(lines)


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95% interval of the mean."""
    wide = scipy_stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return float(np.mean(values) - wide), float(np.mean(values) + wide)


def _ratio(found: Sequence[Found], plain: Sequence[Found], *, alone: bool) -> float:
    """Tokens of all seeds to those of the plain searches, with or without the checkpoints alone."""
    ours, theirs = (
        sum(one.tokens - (0 if alone else one.individuals) for one in each)
        for each in (found, plain)
    )
    return ours / theirs


def _config(path: str) -> Config:
    spec = importlib.util.spec_from_file_location("bench_config", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def main() -> None:
    """Measures; prints a table after each seed, and writes bench_racing.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="a directory that is not there yet")
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--pool", default="", help="pattern of checkpoints, if not the config's")
    parser.add_argument("--seeds", type=int, default=10, help="at least 2")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--budgets", type=int, nargs="+", default=[40, 60, 80, 100])
    parser.add_argument("--subsets", type=float, nargs="+", default=[0.2, 0.125])
    parser.add_argument("--test", type=int, default=400, help="test examples of each task")
    parser.add_argument("--racing", type=float, default=0.95)
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    ways: dict[str, dict[str, float]] = {"plain": {}, "racing": {"racing": args.racing}}
    for subset in args.subsets:
        ways[f"subset {subset:g}"] = {"subset": subset}
        ways[f"both {subset:g}"] = {"racing": args.racing, "subset": subset}
    print(f"jax {jax.__version__}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    base, held = _config(args.config), Held()
    base.heldout, base.objective.test_examples = (), args.test
    if args.pool:
        base.pool.checkpoints = (args.pool,)
    runs: dict[str, dict[int, list[Found]]] = {
        way: {budget: [] for budget in args.budgets} for way in ways
    }
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for way, fields in ways.items():
            for budget in args.budgets:
                config = copy.deepcopy(base)
                config.seed, config.search.budget = seed, budget
                config.search.update(fields)
                workdir = args.out / f"{way}-{seed}-{budget}"
                runs[way][budget].append(searched(config, workdir, held))
            print(seed, way, *runs[way][max(args.budgets)][-1], flush=True)
        if seed > args.first_seed:
            said = {**vars(args), "out": str(args.out), **summary(runs), "runs": runs}
            (args.out / "bench_racing.json").write_text(json.dumps(said, indent=1))
            print(table(said), flush=True)


if __name__ == "__main__":
    main()
