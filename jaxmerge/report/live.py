"""What a run shows of itself while it goes on: a progress line, event files, the report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from types import TracebackType

from jaxmerge import report
from jaxmerge.errors import JaxmergeError
from jaxmerge.report.progress import Plan, Progress
from jaxmerge.report.tensorboard import Board
from jaxmerge.rundir import Candidate, RunDirectory
from jaxmerge.scores.formatting import Format
from jaxmerge.scores.objective import Objective

_REPORT_SHARE = 0.01  # of the time, at most, goes into refreshing the report


class Live:
    """Told of every candidate, it shows them wherever the config asks for it.

    Args:
        directory: of the run.
        plan: all that the run will evaluate.
        population: candidates per generation.
        report_seconds: between refreshes of report.html; 0: there are none.
        tensorboard: whether event files are written.
        silent: show nothing at all, as all processes do but one.
    """

    def __init__(
        self,
        directory: RunDirectory,
        plan: Plan,
        *,
        population: int,
        report_seconds: float,
        tensorboard: bool,
        silent: bool = False,
    ):
        self._directory, self._report_seconds = directory, 0.0 if silent else report_seconds
        self._due, self._complaint = time.monotonic() + report_seconds, ""
        with ExitStack() as stack:
            self._progress = stack.enter_context(Progress(plan, silent=silent))
            self._board = None
            if tensorboard and not silent:
                path = directory.path / "tensorboard"
                self._board = stack.enter_context(
                    closing(Board(path, population, directory.candidates))
                )
            self._stack = stack.pop_all()

    def rate(self, objective: Objective, form: Format, individuals: Sequence[Candidate]) -> None:
        """Says what candidates are rated by from now on, and which single checkpoints there are."""
        self._progress.rate(objective, form, individuals)
        if self._board:
            self._board.rate(objective, individuals)

    def candidates(self, candidates: Sequence[Candidate]) -> None:
        """Shows that these have been evaluated."""
        self._progress.candidates(candidates)
        if self._board:
            self._board.candidates(candidates)
        if self._report_seconds and time.monotonic() >= self._due:
            self._refresh()

    def _refresh(self) -> None:
        """Writes the report; a run goes on without one, and complains once."""
        started = time.monotonic()
        try:
            report.write(self._directory.path)
        except JaxmergeError as error:
            if str(error) != self._complaint:
                self._complaint = str(error)
                self._progress.say(f"jaxmerge: report.html could not be refreshed: {error}")
        now = time.monotonic()
        self._due = now + max(self._report_seconds, (now - started) / _REPORT_SHARE)

    def __enter__(self) -> Live:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, traceback)
