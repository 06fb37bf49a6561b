"""A fabricated run: the files of a finished one, with names that would break a careless page."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from jaxmerge.scores import stats
from jaxmerge.scores.objective import Objective, Range, define

TASKS = ["arithmetic", "instructions", "programs & <b>tests</b>"]
REFERENCE = dict.fromkeys(TASKS, Range(0.8, 0.4))
# Each would rename the page if any of it ran.
HOSTILE = "</script><script>document.title='pwned'</script>"
HOSTILE_IMAGE = "\"><img src=x onerror=document.title='pwned'>"
CHECKPOINTS = ["maths-long", "instruct-1e-3", "code", "mix-seed-2", HOSTILE, HOSTILE_IMAGE]
N = 400


# Longer than a screen: all files of a run, written out.
def fabricate(
    directory: Path,
    *,
    heldout: bool = True,
    gain: float = 0.0,
    aggregate: str = "mean",
    budget: int = 180,
    seed: int = 0,
) -> None:
    """Writes a run directory; `gain` is added to the winner's chance on every test example.

    The search and the random baseline have `budget` evaluations each.
    """
    objective = Objective(define(TASKS).weights, aggregate, REFERENCE)
    rng = np.random.default_rng(seed)
    skill_KxT = np.array(
        [[0.75, 0.4, 0.45], [0.4, 0.8, 0.4], [0.45, 0.4, 0.8], *[[0.55, 0.55, 0.5]] * 3]
    )
    ids = iter(range(10_000))
    lines: list[dict[str, Any]] = []

    def chances(weights_K: np.ndarray) -> np.ndarray:
        concentration = float((weights_K**2).sum())
        return np.clip(weights_K @ skill_KxT + 0.25 * (1 - concentration), 0, 0.97)

    def draw(chances_T: np.ndarray) -> dict[str, np.ndarray]:
        return {t: (rng.random(N) < c).astype(float) for t, c in zip(TASKS, chances_T)}

    def evaluated(origin: str, name: str, weights_K: np.ndarray, generation: int) -> dict[str, Any]:
        samples = draw(chances(weights_K))
        line = {
            "id": next(ids),
            "generation": generation,
            "origin": origin,
            "name": name,
            "split": "search",
            "row": 0,
            "weights": weights_K.tolist(),
            "scores": {task: float(x_N.mean()) for task, x_N in samples.items()},
            "n": dict.fromkeys(TASKS, N),
            "seconds": 0.1,
            "tokens": {"read": 5000, "written": 40 + len(lines) % 7},
        }
        lines.append(line)
        return line

    def entry(line: dict[str, Any], name: str, evaluations: int, bonus: float = 0.0) -> Any:
        samples = draw(chances(np.array(line["weights"])) + bonus)
        ends = {
            task: stats.interval({task: samples[task]}, define([task]), resamples=500)
            for task in TASKS
        }
        means = {task: float(x_N.mean()) for task, x_N in samples.items()}
        return samples, {
            "name": name,
            "id": line["id"],
            "weights": dict(zip(CHECKPOINTS, line["weights"])),
            "evaluations": evaluations,
            "tokens": 5000 * evaluations,
            "search": line["scores"],
            "search_objective": objective.of(line["scores"]),
            "test": means,
            "test_objective": objective.of(means),
            "ci95": {
                **{task: list(pair) for task, pair in ends.items()},
                "objective": list(stats.interval(samples, objective, resamples=500)),
            },
            "heldout": {},
        }

    K = len(CHECKPOINTS)
    individuals = [
        entry(evaluated("individual", name, np.eye(K)[k], 0), name, 1)
        for k, name in enumerate(CHECKPOINTS)
    ]
    uniform = entry(evaluated("baseline:uniform", "uniform", np.full(K, 1 / K), 0), "uniform", 1)
    random_lines = [
        evaluated("baseline:random", "random", rng.dirichlet(np.ones(K)), 0) for _ in range(budget)
    ]
    search_lines = [
        evaluated(
            "search",
            "search",
            rng.dirichlet([1 + 20 * i / budget] * 3 + [1] * (K - 3)) * 1.06 - 0.01,
            i // 9,
        )
        for i in range(budget)
    ]

    def best_of(of: list[dict[str, Any]]) -> dict[str, Any]:
        return max(of, key=lambda line: sum(line["scores"].values()))

    random = entry(best_of(random_lines), "random", budget)
    best_samples, best = entry(best_of(search_lines), "search", budget, gain)
    rivals = [*individuals, uniform, random]
    best["vs"] = {}
    for samples, rival in rivals:
        delta, low, high, p = stats.paired(best_samples, samples, objective, resamples=500)
        best["vs"][rival["name"]] = {"delta": delta, "ci95": [low, high], "p": p}
    final = {"id": next(ids), "origin": "final", "split": "test", "scores": best["test"]}
    lines.append({**lines[best["id"]], **final})
    for _, model in [*individuals[:1], uniform]:
        model["heldout"] = {"sorting": 0.5, "copying": 0.75} if heldout else {}
    best["heldout"] = {"sorting": 0.625, "copying": 0.75} if heldout else {}
    scores_PxM = np.array([list(line["scores"].values()) for line in lines[:-1]])
    # The front, by the definition.
    pareto = [
        line["id"]
        for line, row in zip(lines, scores_PxM)
        if not ((scores_PxM >= row).all(1) & (scores_PxM > row).any(1)).any()
    ]
    origins = [line["origin"] for line in lines[:-1]]
    results = {
        "version": 2,
        "command": "python -m jaxmerge.run --config=configs/x.py --workdir=runs/<x>",
        "tasks": TASKS,
        "objective": objective.plain(),
        "bounds": {task: [0.0, 1.0] for task in [*TASKS, "sorting", "copying"]},
        "warnings": [f"{TASKS[2]}: judged by a program; {HOSTILE}"],
        "heldout_tasks": ["sorting", "copying"] if heldout else [],
        "individuals": [model for _, model in individuals],
        "baselines": [model for _, model in (uniform, random)],
        "best": best,
        "pareto": pareto,
        "hypervolume": 0.4321,
        "hypervolume_reference": dict.fromkeys(TASKS, 0.0),
        "evaluations": len(origins),
        "evaluations_by_origin": {origin: origins.count(origin) for origin in sorted({*origins})},
        "tokens_by_origin": {
            origin: {"read": 5000 * origins.count(origin), "written": 7}
            for origin in sorted({*origins})
        },
        "curves": {"search": [{"tokens": 5043, "id": 0, "search_objective": 0.5}], "random": []},
        "seconds": {"load": 1.25, "search": 40.5, "test": 3.0},
        "versions": {"jax": "0.9.0", "jaxmerge": "0.1.0", "numpy": "2.4.6"},
        "devices": {"platform": "cpu", "kind": "cpu", "count": 1, "processes": 1},
    }
    pool = [
        {
            "name": name,
            "source": f"pool/{k}",
            "format": "orbax",
            "bytes": 3_400_000,
            "parameters": 850_000,
            "dtype": "float32",
            "fingerprint": "0123456789abcdef" * 4,
        }
        for k, name in enumerate(CHECKPOINTS)
    ]
    config = {
        "seed": seed,
        "objective": {"tasks": TASKS, "weights": [], "aggregate": aggregate},
        "pool": {"checkpoints": [checkpoint["source"] for checkpoint in pool]},
        "space": {"constraint": "signed", "bounds": [-float("inf"), float("inf")]},
        "search": {"strategy": "CMA_ES", "population": 9, "budget": budget},
        "baselines": ["uniform", "random"],
    }
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "pool.json").write_text(json.dumps({"checkpoints": pool}))
    (directory / "candidates.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (directory / "results.json").write_text(json.dumps(results))
    digests = {"search": {"examples": N, "digest": "0a"}, "test": {"examples": N, "digest": "0b"}}
    of_task = {"bounds": [0.0, 1.0], **digests}
    (directory / "tasks.json").write_text(json.dumps(dict.fromkeys(TASKS, of_task)))
    for task, scores_N in best_samples.items():
        file = directory / "examples" / "test" / f"{task}.f32"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(scores_N.astype("<f4").tobytes())


def add_analyses(directory: Path) -> None:
    """Adds every analysis, the candidates that it took, and tokens."""
    results = json.loads((directory / "results.json").read_text())
    best = results["best"]
    lines: list[dict[str, Any]] = []
    first = len((directory / "candidates.jsonl").read_text().splitlines())

    def evaluated(origin: str, split: str, scores: dict[str, float]) -> int:
        lines.append(
            {
                "id": first + len(lines),
                "generation": 0,
                "origin": f"analysis:{origin}",
                "name": origin,
                "split": split,
                "row": 0,
                "weights": list(best["weights"].values()),
                "scores": scores,
            }
        )
        return lines[-1]["id"]

    def tested(origin: str, loss: float) -> dict[str, Any]:
        scores = {task: score - loss for task, score in best["test"].items()}
        number = evaluated(origin, "test", scores)
        return {"id": number, "test": scores, "weights": best["weights"]}

    half = 0.02
    results["tokens"] = {"read": 12_345_678, "written": 234_567}
    results["analyses"] = {
        "evaluations": {"search": 54, "test": 9, "heldout": 0},
        "nonzero": {"threshold": 0.01, "share": 0.5, "checkpoints": CHECKPOINTS[2:5]},
        "weight_vs_score": {"spearman": -0.6, "p": 0.208},
        "leave_one_out": [
            {
                "dropped": name,
                **tested("leave-one-out", loss),
                "test_objective": best["test_objective"] - loss,
                "delta": -loss,
                "ci95": [-loss - half, half - loss],
            }
            for name, loss in zip(CHECKPOINTS, (0.12, 0.08, 0.2, 0.01, 0.0, -0.03))
        ],
        "pool_size": [
            {
                "m": m,
                "checkpoints": CHECKPOINTS[:m],
                "evaluations": 9 * m,
                **tested("pool-size", 0.1 / m),
                "search_objective": best["search_objective"] - 0.12 / m,
                "test_objective": best["test_objective"] - 0.1 / m,
                "ci95": [best["test_objective"] - 0.1 / m + end for end in (-half, half)],
            }
            for m in (2, 4, 6)
        ],
        "transfer": [
            {"tasks": [a, b], **tested("transfer", 0.05 * i)}
            for i, (a, b) in enumerate((TASKS[:2], TASKS[1:], TASKS[::2]), start=1)
        ],
    }
    # Better than all: a page that counted it as searched would show it.
    evaluated("pool-size", "search", dict.fromkeys(TASKS, 0.99))
    with (directory / "candidates.jsonl").open("a") as log:
        log.writelines(json.dumps(line) + "\n" for line in lines)
    (directory / "results.json").write_text(json.dumps(results))


def interrupt(directory: Path, lines: int) -> None:
    """Makes it the directory of a run that has evaluated so many candidates, and half of one."""
    log = directory / "candidates.jsonl"
    kept = log.read_text().splitlines(keepends=True)[: lines + 1]
    log.write_text("".join(kept[:-1]) + kept[-1][:40])
    (directory / "results.json").unlink()


class Page(HTMLParser):
    """What an HTML parser sees: the elements, and the text of each kind of element."""

    def __init__(self, source: str):
        super().__init__()
        self.elements: list[str] = []
        self.attributes: list[str] = []
        self.text: dict[str, list[str]] = {}
        self._open = ""
        # A place where a line may break is none in a text.
        self.feed(source.replace("<wbr>", ""))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [name for name, _ in attrs]
        self._open = tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self._open, []).append(data)
