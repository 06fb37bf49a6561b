"""The progress line of a run: generation, best score, tokens, tokens per second, time left.

On a terminal it is a bar; elsewhere, as in the log of a job, a line now and then.
"""

from __future__ import annotations

import sys
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from statistics import median
from types import TracebackType
from typing import NamedTuple, TextIO

from tqdm import tqdm

from jaxmerge.rundir import Candidate
from jaxmerge.scores.formatting import Format
from jaxmerge.scores.objective import Objective

_LINE_SECONDS = 30.0  # between lines where there is no terminal
_RECENT = 64  # candidates that speeds are taken from


class Plan(NamedTuple):
    """What a run will evaluate.

    Attributes:
        evaluations: on each split, about: what tokens are enough for is known afterwards.
        examples: of one evaluation on each split.
        generations: of the search.
    """

    evaluations: Mapping[str, int]
    examples: Mapping[str, int]
    generations: int


class Progress:
    """Shows how far a run is, and the best merge once `rate` has been called.

    Speeds are those of the last candidates as the log has them, so a run that was resumed knows
    them at once. The time left counts examples: a test takes longer than a step of the search.

    Args:
        plan: all that is to come.
        stream: where it is shown.
        silent: show nothing at all.
    """

    def __init__(self, plan: Plan, stream: TextIO | None = None, *, silent: bool = False):
        self._plan, self._stream, self._silent = plan, stream or sys.stderr, silent
        self._bar = tqdm(
            total=sum(plan.evaluations.values()),
            bar_format="{desc} |{bar}| {percentage:.0f}%",
            disable=silent or None,
            dynamic_ncols=True,
            miniters=1,
            file=self._stream,
        )
        self._said = time.monotonic()
        self._done: Counter[str] = Counter()
        self._recent: deque[Candidate] = deque(maxlen=_RECENT)
        self._objective: Objective | None = None
        self._format = Format(percent=False)
        self._single = self._best = self._soft = ""
        self._best_value = float("-inf")
        self._took = 0  # tokens of the search

    def rate(self, objective: Objective, form: Format, individuals: Sequence[Candidate]) -> None:
        """Says what candidates are rated by from now on, and which single checkpoints there are."""
        self._objective, self._format = objective, form
        self._single = form.score(max(objective.of(one.scores) for one in individuals))

    def candidates(self, candidates: Sequence[Candidate]) -> None:
        """Shows that these have been evaluated."""
        for candidate in candidates:
            self._done[candidate.split] += 1
            if candidate.origin == "search":
                self._took += candidate.cost
            if self._objective and candidate.expected:
                climbed = self._objective.over([*candidate.expected])
                self._soft = self._format.score(climbed.of(candidate.expected))
            if self._objective and candidate.origin == "search":
                self._best_value = max(self._best_value, self._objective.of(candidate.scores))
                self._best = self._format.score(self._best_value)
        self._recent.extend(one for one in candidates if one.seconds)  # the others are copies
        line = self._line(candidates[-1])
        total = self._bar.total = max(sum(self._plan.evaluations.values()), self._done.total())
        self._bar.set_description_str(line, refresh=False)
        self._bar.update(len(candidates))
        now = time.monotonic()
        if self._bar.disable and not self._silent and now - self._said >= _LINE_SECONDS:
            self._said = now
            self.say(f"jaxmerge: {line}, {self._done.total()}/{total} evaluations")

    def say(self, text: str) -> None:
        """Writes a line of its own."""
        self._bar.write(text, file=self._stream)

    def _line(self, last: Candidate) -> str:
        kind = last.origin.split(":")[-1]
        where = f"gen {last.generation + 1}/{self._plan.generations}"
        parts = [where if last.origin == "search" else "test" if kind == "final" else kind]
        if self._single:
            single = f"single {self._single}"
            parts.append(f"best {self._best} ({single})" if self._best else f"best {single}")
        climbing = last.origin == "search" and bool(self._soft)
        if climbing:
            parts.append(f"soft {self._soft}, {tqdm.format_sizeof(self._took)} tokens")
        seconds = sum(one.seconds for one in self._recent)
        if seconds:
            tokens = sum(one.cost for one in self._recent)
            parts += [f"{tqdm.format_sizeof(tokens / seconds)} tok/s"] if not climbing else []
            parts.append(f"{tqdm.format_interval(self._left())} left")
        return ", ".join(parts)

    def _left(self) -> float:
        """Seconds to the end, from those that recent candidates took for an example.

        Their median: the first candidates compile, which may take longer than all that follows.
        """
        plan = self._plan
        examples = sum(
            max(0, count - self._done[split]) * plan.examples[split]
            for split, count in plan.evaluations.items()
        )
        return examples * median(one.seconds / sum(one.n.values()) for one in self._recent)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:  # analyses may have needed fewer evaluations than they might have
            self._bar.total = self._bar.n
            self._bar.refresh()
        self._bar.close()
