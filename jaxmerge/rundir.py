"""The run directory: everything a run knows, written so that no instant can tear it.

Whole files are written under a temporary name and renamed; the log and the per-example scores only
grow. A candidate counts as evaluated when its line in `candidates.jsonl` is complete; its
per-example scores are on disk before that line is.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxmerge.durable import (
    LOCK,
    Lock,
    as_json,
    open_or_create,
    parsed,
    read_json,
    replacing,
    sync,
    there,
    whole_lines,
)
from jaxmerge.errors import JaxmergeError, as_written, at

TRACES = "error-*.log"  # of errors that nobody foresaw, see `jaxmerge.entry`
ANALYSIS = "analysis:"  # begins the origin of what only an analysis asked for

# Sizes of which 0 stands for what the directory has: it was chosen when that was made.
_CHOSEN = ("evaluate.candidates_per_step", "evaluate.batch_size", "evaluate.batch_tokens")
# Fields of a config that say where a run computes, not what: it can go on elsewhere.
_WHERE = ("mesh.", "pool.residency", "merge.rematerialise", "compilation_cache")
_BOTH_WAYS = 3  # tokens forward that one costs which goes forward and backward

# One merge weight per checkpoint, in pool order; of groups that have weights of their own, each's.
Weights = tuple[float, ...] | tuple[tuple[float, ...], ...]

# Numbers by name; of groups that have their own, each's.
Genes = dict[str, float | tuple[float, ...]]


def as_weights(values: Any) -> Weights:
    """Weights `[K]` or `[G, K]` as a candidate has them."""
    rows = np.asarray(values, np.float64).tolist()
    return tuple(tuple(row) if isinstance(row, list) else row for row in rows)


def as_gene(values: Any) -> float | tuple[float, ...]:
    """A number of a method, or that of each group, as a candidate has it."""
    found = np.asarray(values, np.float64).tolist()
    return tuple(found) if isinstance(found, list) else found


def cost(tokens: Mapping[str, int] | None) -> int:
    """Tokens in the one unit that all ways of searching are compared in: a token that goes forward.

    read + written + 3 differentiated: a pass backward costs two forward, and one goes before it.

    Args:
        tokens: as a candidate has them; None: they were not counted, which is 0 here.
    """
    told = tokens or {}
    forward = told.get("read", 0) + told.get("written", 0)
    return forward + _BOTH_WAYS * told.get("differentiated", 0)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One evaluated candidate: a line of `candidates.jsonl`.

    Attributes:
        id: its line number, from 0.
        generation: of the search; 0 for all others.
        origin: `individual`, `baseline:NAME`, `search`, `final` or `analysis:NAME`.
        name: of the checkpoint or the baseline; `search` for a candidate of the search; what an
            analysis calls it.
        split: the examples it was scored on: `search`, `test`, or `heldout` for the test examples
            of the held-out tasks.
        row: its row in each file of `examples/SPLIT/`.
        weights: one merge weight per checkpoint, in pool order; or such a row for each group of
            leaves that has weights of its own.
        scores: mean score of each task.
        n: number of examples of each task.
        seconds: of wall time it took, its share of the step it was part of.
        tokens: that it `read` (prompts, and what is scored; without padding) and `written` (up to
            the ones that ended its texts); None in logs of before they were counted. It took no
            time and no tokens when its scores are those of an earlier candidate of equal weights.
            The first of a generation has also those that the strategy took to ask for it: read, and
            `differentiated`, forward and backward; and its time. So the tokens that a search had
            taken when a candidate was known are the sum up to its line.
        out_of: number of examples of each task in the split, where fewer were scored: `scores` are
            estimates then. None: all were scored.
        expected: scores by task that the strategy expected of the generation, of its first
            candidate: of soft scores. None: it expected nothing.
        genes: of a merge by another method its numbers that are searched, by name; of groups that
            have their own, each's. None: a weighted sum.
        window: `length` and `exponent` of its window, see `search.space.window`. None: of none.
    """

    id: int
    generation: int
    origin: str
    name: str
    split: str
    row: int
    weights: Weights
    scores: dict[str, float]
    n: dict[str, int]
    seconds: float
    tokens: dict[str, int] | None = None
    out_of: dict[str, int] | None = None
    expected: dict[str, float] | None = None
    genes: Genes | None = None
    window: Genes | None = None

    @property
    def coefficients(self) -> Weights:
        """What it is merged from: the weights, or see `merge.searched`."""
        if self.genes is None:
            return self.weights
        weights = np.asarray(self.weights, np.float64)
        numbers = [np.asarray(number, np.float64)[..., None] for number in self.genes.values()]
        last = np.ones((*weights.shape[:-1], 1))
        return as_weights(np.concatenate([weights, *numbers, last], axis=-1))

    @property
    def cost(self) -> int:
        """Its tokens in the unit of `cost`."""
        return cost(self.tokens)

    @property
    def by_checkpoint(self) -> tuple[float, ...]:
        """One weight per checkpoint: the mean over the groups that have weights of their own."""
        rows = np.asarray(self.weights, np.float64)
        return tuple(rows.mean(axis=0).tolist() if rows.ndim == 2 else rows.tolist())


class RunDirectory:
    """An open run directory; made if it is missing.

    Args:
        path: the directory.
        config: the resolved config; must equal that of the run that made the directory.
        writer: whether this process writes; the others of a run on several processes know what it
            knows, and touch no file.
        from_writer: gives all processes the bytes that a function returns in the one that writes.

    Attributes:
        moved: the fields that say where a run computes and differ from those that it was begun
            with, a line each: such a run goes on, but sums may be added up in another order.
        unlocked: why nothing keeps other machines out of the directory; "": something does.

    Raises:
        JaxmergeError: the directory belongs to a run with another config (every field that differs
            is named), or is used by a running process, or its log is garbled.
    """

    def __init__(
        self,
        path: str | Path,
        config: Mapping[str, Any],
        *,
        writer: bool = True,
        from_writer: Callable[[Callable[[], bytes]], bytes] = lambda make: make(),
    ):
        self.path = Path(path).expanduser()
        self._writer, self._from_writer = writer, from_writer
        self._log = self.path / "candidates.jsonl"
        self.moved: tuple[str, ...] = ()
        self.unlocked = ""
        if writer:
            self.moved = check(path, config)
            with at(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock = Lock(self.path / LOCK)
            self.unlocked = self._lock.missing
        try:
            if writer:
                self.write_json("config.json", config)
                with at(self._log):
                    self._log.touch()
            log = from_writer(lambda: whole_lines(self._log))
            self.candidates = _candidates(log, str(self._log))
        except JaxmergeError:
            self.close()
            raise

    def close(self) -> None:
        """Lets another process use the directory."""
        if self._writer:
            self._lock.close()

    def read_json(self, name: str) -> Any:
        """What a file of a JSON object says; None where there is none."""
        path = self.path / name

        def read() -> bytes:
            with at(path):
                return path.read_bytes() if path.exists() else b"null"

        found = parsed(self._from_writer(read), str(path))
        with as_written(str(path)):
            return None if found is None else {**found}

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file whole."""
        if not self._writer:
            return
        with replacing(self.path / name) as temporary:
            temporary.write_bytes(as_json(value, indent=2) + b"\n")

    def append(self, candidates: Sequence[Candidate], scores: Mapping[str, np.ndarray]) -> None:
        """Records evaluated candidates, durably: first their examples, then their lines.

        Args:
            candidates: with consecutive ids and rows, of one split.
            scores: per task `[C, N]`.
        """
        self.candidates.extend(candidates)
        if not self._writer:
            return
        first = candidates[0]
        for task, scores_CxN in scores.items():
            data = np.ascontiguousarray(scores_CxN, "<f4")
            file = self._examples(first.split, task)
            with at(file), open_or_create(file) as stream:
                stream.seek(first.row * data.shape[1] * 4)
                stream.write(data.tobytes())
                sync(stream)
        lines = "".join(json.dumps(dataclasses.asdict(line)) + "\n" for line in candidates)
        with at(self._log), open(self._log, "ab") as stream:
            stream.write(lines.encode())
            sync(stream)

    def cut(self, count: int) -> None:
        """Forgets all candidates but the first `count`."""
        del self.candidates[count:]
        if not self._writer:
            return
        lines = self._log.read_bytes().splitlines(keepends=True)[:count]
        with replacing(self._log) as temporary:
            temporary.write_bytes(b"".join(lines))

    def examples(self, candidate: Candidate) -> dict[str, Float[np.ndarray, " N"]]:
        """The per-example scores of a candidate, by task; NaN where it was not scored."""
        rows = {}
        for task, count in (candidate.out_of or candidate.n).items():
            file = self._examples(candidate.split, task)
            read = functools.partial(_read_values, file, count, candidate.row * count * 4)
            data = self._from_writer(read)
            rows[task] = np.frombuffer(data, "<f4")
            if len(rows[task]) != count:
                raise JaxmergeError(
                    f"the scores of candidate {candidate.id} are missing",
                    where=str(file),
                    expected="the file as the run wrote it; or another directory, for a new run",
                    found=f"{len(rows[task])} of {count} scores",
                )
        return rows

    def _examples(self, split: str, task: str) -> Path:
        return self.path / "examples" / split / f"{task}.f32"


def check(path: str | Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Raises `JaxmergeError` unless a run of this config can use the directory; writes nothing.

    Returns:
        See `RunDirectory.moved`.
    """
    path = Path(path).expanduser()
    if there(path / "config.json"):
        return check_same_config(path, read_json(path / "config.json"), config)
    check_new(path, "config.json")
    return ()


def check_new(path: Path, first: str) -> None:
    """Raises `JaxmergeError` when something is here.

    Args:
        path: of a directory.
        first: the file that is written first: one that was not finished is no obstacle.
    """
    if not there(path):
        return
    if not path.is_dir():
        raise JaxmergeError(
            "there is a file here, and no directory", where=str(path), expected="another path"
        )
    # What a run that was not begun leaves: its locks, the trace of an error, a file half written.
    with at(path):
        others = [
            entry.name
            for entry in sorted(path.iterdir())
            if not any(entry.match(known) for known in (f"{LOCK}*", TRACES, f"{first}*.tmp"))
        ]
    if others:
        raise JaxmergeError(
            "there is something here, and it is no run directory",
            where=str(path),
            expected="a new or an empty directory, or one that a run has made",
            found=", ".join(others[:5]),
        )


def check_same_config(path: Path, recorded: Any, now: Mapping[str, Any]) -> tuple[str, ...]:
    """Raises `JaxmergeError`, naming each field that is not as it was recorded in a directory.

    Args:
        path: of the directory.
        recorded: what its file of the config says, whatever that is.
        now: the config.

    Returns:
        The fields that may differ and do; see `RunDirectory.moved`.
    """
    with as_written(str(path)):
        before = flat(recorded)
    after = flat(json.loads(json.dumps(now)))
    absent = "(absent)"
    lines = [
        f"{field}: {before.get(field, absent)!r} there, {after.get(field, absent)!r} now"
        for field in sorted({*before, *after})
        if before.get(field, absent) != after.get(field, absent)
        and not (field in _CHOSEN and after.get(field) == 0)
    ]
    moved = tuple(line for line in lines if line.startswith(_WHERE))
    if len(lines) > len(moved):
        raise JaxmergeError(
            "the directory was made with another config:\n  "
            + "\n  ".join(line for line in lines if line not in moved),
            where=str(path),
            expected="the same config, or another --workdir",
        )
    return moved


def _read_values(file: Path, count: int, offset: int) -> bytes:
    """Float32 of a file, as many of them as there are."""
    with at(file):
        return np.fromfile(file, "<f4", count=count, offset=offset).tobytes()


def _candidates(lines: bytes, where: str) -> list[Candidate]:
    candidates = []
    for number, line in enumerate(lines.splitlines()):
        way_out = "a candidate; a run goes on from the lines before this one"
        with as_written(where, f"line {number + 1} can't be read", way_out):
            fields = json.loads(line)
            named = {name: _genes(fields.get(name)) for name in ("genes", "window")}
            candidate = Candidate(**fields | named | {"weights": as_weights(fields["weights"])})
            _check_kinds(candidate)
        if candidate.id != number:
            raise JaxmergeError(
                f"line {number + 1} is out of order",
                where=where,
                expected=f"id {number}",
                found=f"id {candidate.id}",
            )
        candidates.append(candidate)
    return candidates


def _genes(found: Mapping[str, Any] | None) -> Genes | None:
    return None if found is None else {name: as_gene(number) for name, number in found.items()}


def _check_kinds(one: Candidate) -> None:
    whole = [one.id, one.generation, one.row]
    whole += [n for of in (one.n, one.out_of, one.tokens) for n in (of or {}).values()]
    numbers = [one.seconds, *one.scores.values(), *(one.expected or {}).values()]
    if (
        {*map(type, whole)} != {int}
        or {*map(type, (one.origin, one.name, one.split))} != {str}
        or {*map(type, numbers)} - {int, float}
        or min(whole) < 0
    ):
        raise ValueError("numbers, names or scores are of another kind")
    np.asarray([*whole, *numbers], np.float64)  # OverflowError of a number beyond it


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of a config by their full names, such as `search.budget`."""
    fields = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            fields |= flat(value, f"{prefix}{key}.")
        else:
            fields[prefix + key] = value
    return fields
