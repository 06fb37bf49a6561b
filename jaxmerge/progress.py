"""The progress line of a run: generation, best score, time left. Silent without a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType

from tqdm import tqdm

from jaxmerge.rundir import Candidate
from jaxmerge.search.baselines import objective


class Progress:
    """Counts evaluated candidates on a terminal.

    Args:
        total: evaluations that the run will have made at its end.
        task_weights: of the objective.
    """

    def __init__(self, total: int, task_weights: Mapping[str, float]):
        self._bar = tqdm(total=total, unit="candidate", disable=None, smoothing=0.1)
        self._task_weights = task_weights
        self._best = {"individual": float("-inf"), "search": float("-inf")}

    def candidates(self, candidates: Sequence[Candidate]) -> None:
        """Shows that these have been evaluated."""
        for candidate in candidates:
            if candidate.origin in self._best:
                score = objective(candidate, self._task_weights)
                self._best[candidate.origin] = max(self._best[candidate.origin], score)
        last = candidates[-1]
        where = f"generation {last.generation + 1}" if last.origin == "search" else last.origin
        self._bar.set_description(where, refresh=False)
        self._bar.set_postfix(
            {
                name: f"{100 * score:.1f}"
                for name, score in zip(("best single", "best merge"), self._best.values())
                if score >= 0
            },
            refresh=False,
        )
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
