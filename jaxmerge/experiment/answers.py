"""What checkpoints answered: kept for people to see, and looked at before a search begins.

A task by which merges can't be told apart steers nothing, and mostly it is the task, the prompt or
the end of the texts that is wrong, not the models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxmerge.errors import as_written
from jaxmerge.evaluation.evaluator import Sample
from jaxmerge.rundir import Candidate, RunDirectory

FILE = "outputs.json"

_CONSTANT = 0.9  # of the examples: an answer that is given so often is called the same to all
_FEWEST = 8  # examples of which that says something
_MANY = 3  # checkpoints that are equal by more than chance, where not all of them are
_CAUSES = (
    "The usual causes: an answer that is always the same, texts that end too early or too late "
    "(until and max_new_tokens of the task), or prompts in a form that the models were not trained "
    "on (pool.chat, pool.chat_template, the task's form)."
)
_SAID = 120  # characters of a text in a warning


class Answers:
    """The file `outputs.json` of a run: the first answers of each checkpoint, by task.

    Args:
        directory: of the run.
        split: that the answers are of.

    Raises:
        JaxmergeError: the file is not as a run writes it.
    """

    def __init__(self, directory: RunDirectory, split: str):
        self._directory = directory
        known = directory.read_json(FILE) or {}
        with as_written(str(directory.path / FILE)):
            _check_kinds(known)
        self._said: dict[str, Any] = {"split": split, "warnings": [], "checkpoints": {}, **known}

    def add(self, name: str, samples: Mapping[str, Sample]) -> None:
        """Keeps what a checkpoint said; to be called before its scores are recorded."""
        self._said["checkpoints"][name] = {
            task: {
                "first": [shown._asdict() for shown in sample.first],
                "constant": sample.constant,
                "share": sample.share,
            }
            for task, sample in samples.items()
        }
        self._directory.write_json(FILE, self._said)

    def warn(
        self, scored: Sequence[Candidate], bounds: Mapping[str, Sequence[float | None]]
    ) -> list[str]:
        """What is odd about the scores of the checkpoints by themselves, a sentence or two a task.

        Args:
            scored: the checkpoints, with the scores of all examples.
            bounds: least and greatest score of each task.
        """
        rows = [self._directory.examples(one) for one in scored]
        found = []
        for task in rows[0]:
            scores_KxN = np.stack([row[task] for row in rows])
            said = equal_scores(scores_KxN, bounds[task][0]) or self._constant(task, scored)
            if said:
                found.append(f"{task}: {said}. {_CAUSES}{self._example(task, scored)}")
        self._said["warnings"] = found
        self._directory.write_json(FILE, self._said)
        return found

    def _of(self, task: str, name: str) -> Mapping[str, Any]:
        """What is kept of a checkpoint; nothing in directories of before this was kept."""
        return self._said["checkpoints"].get(name, {}).get(task, {})

    def _constant(self, task: str, scored: Sequence[Candidate]) -> str:
        names = [one.name for one in scored if one.n[task] >= _FEWEST]
        same = [n for n in names if self._of(task, n).get("share", 0.0) >= _CONSTANT]
        if 2 * len(same) <= len(scored):
            return ""
        text = self._of(task, same[0])["constant"]
        return (
            f"{len(same)} of {len(scored)} checkpoints write the same for nearly every example, "
            f"{same[0]} {_quoted(text)}"
        )

    def _example(self, task: str, scored: Sequence[Candidate]) -> str:
        for one in scored:
            for first in self._of(task, one.name).get("first", [])[:1]:
                return (
                    f" {one.name} was asked {_quoted(first['prompt'])} and answered "
                    f"{_quoted(first['output'])}; the target is {_quoted(first['target'])}."
                )
        return ""


def _check_kinds(known: Mapping[str, Any]) -> None:
    for tasks in known.get("checkpoints", {}).values():
        for of in tasks.values():
            shown = [one[part] for one in of["first"] for part in ("prompt", "target", "output")]
            numbers = [of["share"], *(one["score"] for one in of["first"])]
            texts = all(isinstance(each, str) for each in [of["constant"], *shown])
            if not texts or not all(type(each) in (int, float) for each in numbers):
                raise ValueError("answers, or numbers of them, are of another kind")


def equal_scores(scores_KxN: Float[np.ndarray, "K N"], least: float | None) -> str:
    """What is said of a task on which checkpoints are equal; "": they differ.

    All at the least score, all equal on every example, or more than half of them, at least 3.

    Args:
        scores_KxN: of K checkpoints by themselves on N examples.
        least: the least score that there can be; None: there is none.
    """
    K, N = scores_KxN.shape
    if least is not None and (scores_KxN == least).all():
        who = "the checkpoint scores" if K == 1 else f"all {K} checkpoints score"
        return f"{who} {least:g}, the least there is, on each of {N} examples"
    _, group_K, sizes = np.unique(scores_KxN, axis=0, return_inverse=True, return_counts=True)
    size, mean = int(sizes.max()), scores_KxN[np.ravel(group_K) == sizes.argmax()].mean()
    if size == K > 1 or (size >= _MANY and 2 * size > K):
        who = f"all {K}" if size == K else f"{size} of {K}"
        return (
            f"{who} checkpoints have the same score on each of {N} examples, {mean:.3f} in the "
            "mean, so that merges of them can hardly be told apart by it"
        )
    return ""


def _quoted(text: str) -> str:
    return repr(text if len(text) <= _SAID else text[: _SAID - 3] + "...")
