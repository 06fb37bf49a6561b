"""The progress line of a run: generation, best score, time left. Silent without a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from tqdm import tqdm

from jaxmerge.formatting import Format
from jaxmerge.objective import Objective
from jaxmerge.rundir import Candidate


class Progress:
    """Counts evaluated candidates on a terminal, and shows the best once `rate` has been called.

    Args:
        total: evaluations that the run will have made at its end.
        silent: show nothing, on a terminal either.
    """

    def __init__(self, total: int, *, silent: bool = False):
        self._bar = tqdm(total=total, unit="candidate", disable=silent or None, smoothing=0.1)
        self._objective: Objective | None = None
        self._format = Format(percent=False)
        self._best: dict[str, float] = {}

    def rate(self, objective: Objective, form: Format, individuals: Sequence[Candidate]) -> None:
        """Says what candidates are rated by from now on, and which single checkpoints there are."""
        self._objective, self._format = objective, form
        self._best["best single"] = max(objective.of(one.scores) for one in individuals)

    def candidates(self, candidates: Sequence[Candidate]) -> None:
        """Shows that these have been evaluated."""
        for candidate in candidates:
            if self._objective and candidate.origin == "search":
                score = self._objective.of(candidate.scores)
                self._best["best merge"] = max(self._best.get("best merge", score), score)
        last = candidates[-1]
        where = f"generation {last.generation + 1}" if last.origin == "search" else last.origin
        self._bar.set_description(where, refresh=False)
        shown = {name: self._format.score(score) for name, score in self._best.items()}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(len(candidates))

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()
