"""The search in TensorBoard: event files that hold a point per generation."""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from jaxmerge.errors import JaxmergeError
from jaxmerge.rundir import Candidate
from jaxmerge.scores.objective import Objective

_FLUSH_SECONDS = 10  # until a point is in the file


def package() -> ModuleType:
    """The package that writes event files.

    Raises:
        JaxmergeError: it is not installed.
    """
    try:
        return importlib.import_module("tensorboardX")
    except ImportError as error:
        raise JaxmergeError(
            "a package is missing",
            expected="pip install 'jaxmerge[tensorboard]'",
            where="tensorboard",
            found=str(error),
        ) from error


class Board:
    """Writes the generations of the search as they end.

    The step of a point is the number of evaluations that the search has made, so that searches of
    different populations can be laid over each other. Times are those that candidates took: a run
    that was stopped in between has no gap there. The files are written anew whenever a run is
    started, from the log on: a run that was resumed has every point once.

    Args:
        directory: for the event files; those that are there are deleted.
        population: candidates per generation.
        recorded: candidates that the log holds already.
    """

    def __init__(self, directory: Path, population: int, recorded: Sequence[Candidate]):
        writer = package().SummaryWriter
        for old in directory.glob("events.out.tfevents.*"):
            old.unlink()
        self._writer = writer(str(directory), flush_secs=_FLUSH_SECONDS)
        self._population = population
        self._time = time.time() - sum(candidate.seconds for candidate in recorded)
        self._objective: Objective | None = None
        self._single, self._tokens = 0.0, 0
        self._generation: list[Candidate] = []
        self._best: dict[str, float] = {}

    def rate(self, objective: Objective, individuals: Sequence[Candidate]) -> None:
        """Says what candidates are rated by, and which single checkpoints there are."""
        self._objective = objective
        self._single = max(objective.of(one.scores) for one in individuals)

    def candidates(self, candidates: Sequence[Candidate]) -> None:
        """Takes note of evaluated candidates; writes the generations that end with them."""
        for candidate in candidates:
            self._time += candidate.seconds
            if candidate.origin == "search":
                self._generation.append(candidate)
                if len(self._generation) == self._population:
                    self._write(candidate.generation)
                    self._generation.clear()

    def close(self) -> None:
        """Ends the files."""
        self._writer.close()

    def _write(self, generation: int) -> None:
        assert self._objective is not None
        values_P = [self._objective.of(one.scores) for one in self._generation]
        reached = {"objective/best": max(values_P)}
        for task in self._objective.tasks:
            reached[f"best/{task}"] = max(one.scores[task] for one in self._generation)
        for name, value in reached.items():
            self._best[name] = max(self._best.get(name, value), value)
        points = {
            **self._best,
            "objective/mean": float(np.mean(values_P)),
            "objective/best_single": self._single,
        }
        self._tokens += sum(one.cost for one in self._generation)
        points["tokens"] = self._tokens
        seconds = sum(one.seconds for one in self._generation)
        if seconds:
            points["tokens_per_second"] = sum(one.cost for one in self._generation) / seconds
        step = (generation + 1) * self._population
        for name, value in points.items():
            self._writer.add_scalar(name, value, step, walltime=self._time)
