"""What a run directory says, whether the run is finished or not."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from jaxmerge import errors
from jaxmerge.errors import JaxmergeError
from jaxmerge.scores import formatting
from jaxmerge.scores.formatting import Format
from jaxmerge.scores.objective import Objective, define, from_plain

Json = dict[str, Any]

_CANDIDATE_FIELDS = ("id", "generation", "origin", "name", "split", "weights", "scores")
_UNKNOWN = (None, None)  # the bounds of scores where tasks.json does not have them
_POOL_FIELDS = ("name", "source", "format", "bytes", "parameters", "dtype", "fingerprint")


class Run(NamedTuple):
    """What a run directory says.

    Attributes:
        directory: its path, as it was given.
        config: the resolved config.
        examples: of each task and split, their number and digest; {} of a run that is too old.
        pool: the checkpoints, in pool order.
        candidates: every evaluated candidate, in the order of evaluation.
        results: see results.schema.json; None: the run is not finished.
        objective: what is maximised. As long as single checkpoints are missing, an aggregate that
            is measured by the pool is measured by those that are there.
        formats: how scores are written, by task, and for `objective`.
        outputs: the first answers of the checkpoints, and what is odd about their scores; {} of a
            run that is too old.
    """

    directory: Path
    config: Json
    examples: Json
    pool: list[Json]
    candidates: list[Json]
    results: Json | None
    objective: Objective
    formats: Mapping[str, Format]
    outputs: Json

    @property
    def searched(self) -> list[Json]:
        """The candidates that the search, the baselines and the checkpoints are, search split.

        Those of the analyses, which are made when the winner is known, are none of them.
        """
        return [
            candidate
            for candidate in self.candidates
            if candidate["split"] == "search" and not candidate["origin"].startswith("analysis:")
        ]

    def of_origin(self, origin: str) -> list[Json]:
        """The candidates of one origin, on the search split."""
        return [candidate for candidate in self.searched if candidate["origin"] == origin]


def read(directory: Path) -> Run:
    """Reads the files of a run.

    Raises:
        JaxmergeError: a file is missing or is not what a run leaves.
    """
    config, pool = (
        _parsed(_read_text(directory / name), str(directory / name), finite=name != "config.json")
        for name in ("config.json", "pool.json")
    )
    _require(pool, ("checkpoints",), str(directory / "pool.json"))
    for checkpoint in pool["checkpoints"]:
        _require(checkpoint, _POOL_FIELDS, str(directory / "pool.json"))
    results = _read_results(directory / "results.json")
    candidates = _read_candidates(directory / "candidates.jsonl", finished=results is not None)
    where = str(directory / "config.json")
    objective = from_plain(results["objective"]) if results else _defined(config, where)
    for number, candidate in enumerate(candidates, start=1):
        if candidate["split"] != "heldout":
            where = f"{directory / 'candidates.jsonl'}, line {number}"
            _require(candidate["scores"], objective.tasks, where)
    alone = [one["scores"] for one in candidates if one["origin"] == "individual"]
    if not results and alone:
        objective = objective.measured_by(alone)
    path = directory / "tasks.json"
    tasks = _parsed(_read_text(path), str(path)) if path.exists() else {}
    bounds = {task: tasks.get(task, {}).get("bounds", _UNKNOWN) for task in objective.tasks}
    return Run(
        directory,
        config,
        {
            task: {split: of[split] for split in of.keys() - {"bounds"}}
            for task, of in tasks.items()
        },
        pool["checkpoints"],
        candidates,
        results,
        objective,
        formatting.of_results(results) if results else formatting.of_bounds(objective, bounds),
        _read_outputs(directory / "outputs.json"),
    )


def as_page(directory: Path) -> contextlib.AbstractContextManager[None]:
    """Within it, values of another kind than a run writes are told as a `JaxmergeError`.

    Args:
        directory: of the run whose files a page is made of.
    """
    return errors.as_written(
        str(directory),
        "the page can't be made: a value in these files is not of the kind that a run writes",
        "the files as their run wrote them; if nobody has changed them, please report it",
    )


def models(results: Json) -> list[tuple[str, Json]]:
    """(kind, entry) of the merge that was found, the baselines and the individuals."""
    return [
        ("search", results["best"]),
        *(("baseline", entry) for entry in results["baselines"]),
        *(("individual", entry) for entry in results["individuals"]),
    ]


def points(results: Json) -> list[tuple[str, Json]]:
    """(kind, entry) of the points of the front, if the search was for one."""
    found = results.get("front", {}).get("points", [])
    return [("front", {**point, "name": f"point {point['name']}"}) for point in found]


def _read_outputs(path: Path) -> Json:
    """The first answers of each checkpoint by task; {} where there is no such file."""
    if not path.exists():
        return {}
    outputs = _parsed(_read_text(path), str(path))
    _require(outputs, ("warnings", "checkpoints"), str(path))
    for tasks in outputs["checkpoints"].values():
        for sample in tasks.values():
            _require(sample, ("first", "constant", "share"), str(path))
            for shown in sample["first"]:
                _require(shown, ("prompt", "target", "output", "score"), str(path))
    return outputs


def _read_results(path: Path) -> Json | None:
    if not path.exists():
        return None
    where = str(path)
    schema = json.loads((resources.files("jaxmerge.report") / "results.schema.json").read_text())
    results = _current(_parsed(_read_text(path), where), where)
    _require(results, schema["required"], where)
    for _, entry in models(results):
        _require(entry, schema["$defs"]["entry"]["required"], where)
    rivals = [entry["name"] for entry in results["individuals"] + results["baselines"]]
    _require(results["best"]["vs"], rivals, f"{where}, best.vs")
    if not results["individuals"]:
        raise JaxmergeError("no individuals", where=where, expected="one for each checkpoint")
    return results


def _current(results: Json, where: str) -> Json:
    """Results of version 2; those of version 1 knew a weighted mean of scores from 0 to 1 alone."""
    if results.get("version") == 1:
        _require(results, ("tasks", "heldout_tasks", "task_weights"), where)
        weights = results["task_weights"]
        alike = len(set(weights.values())) == 1
        results = {
            **results,
            "version": 2,
            "objective": {
                "aggregate": "mean" if alike else "weighted",
                "weights": weights,
                "reference": {},
            },
            "bounds": {t: [0.0, 1.0] for t in [*results["tasks"], *results["heldout_tasks"]]},
            "warnings": [],
            "hypervolume_reference": dict.fromkeys(results["tasks"], 0.0),
        }
    if results.get("version") != 2:
        raise JaxmergeError(
            "unknown version", where=where, expected="1 or 2", found=str(results.get("version"))
        )
    return results


def _read_candidates(path: Path, *, finished: bool) -> list[Json]:
    """The lines of the log; the last line of a run that goes on may be half written."""
    lines = _read_text(path).split("\n")
    if not finished or lines[-1] == "":
        lines = lines[:-1]
    candidates = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        candidate = _parsed(line, where)
        _require(candidate, _CANDIDATE_FIELDS, where)
        weights = candidate["weights"]
        if weights and isinstance(weights[0], list):  # of each group: their mean
            means = [sum(column) / len(weights) for column in zip(*weights)]
            candidate = {**candidate, "weights": means}
        candidates.append(candidate)
    return candidates


def _defined(config: Json, where: str) -> Objective:
    """What a run that is not finished maximises."""
    _require(config, ("objective", "search", "baselines"), where)
    _require(config["objective"], ("tasks",), where)
    fields = config["objective"]
    weights = tuple(map(float, fields.get("weights", [])))  # JSON keeps whole numbers whole
    # Before there were aggregates weights were all it took.
    aggregate = fields.get("aggregate", "weighted" if weights else "mean")
    return define(fields["tasks"], weights, aggregate)


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        raise JaxmergeError("no such file", where=str(path), expected="a run directory") from None
    except (OSError, UnicodeDecodeError) as error:
        raise JaxmergeError(
            "cannot be read",
            where=str(path),
            expected="a file that this user may read, as the run wrote it",
            found=str(error),
        ) from None


def _parsed(text: str, where: str, *, finite: bool = True) -> Json:
    """The JSON object; `finite` refuses NaN and infinities, which a page cannot parse."""

    def constant(name: str) -> float:
        if finite:
            raise ValueError(f"the number {name}")
        return float(name)

    try:
        parsed = json.loads(text, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise JaxmergeError(
            "not valid JSON", where=where, expected="the file as the run wrote it", found=str(error)
        ) from None
    if not isinstance(parsed, dict):
        raise JaxmergeError(
            "not a JSON object",
            where=where,
            expected="the file as the run wrote it",
            found=type(parsed).__name__,
        )
    return parsed


def _require(mapping: Json, fields: Iterable[str], where: str) -> None:
    missing = [field for field in fields if field not in mapping]
    if missing:
        raise JaxmergeError("missing fields", where=where, expected=", ".join(missing))
