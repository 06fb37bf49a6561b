"""What stands for the score of a document of lm-evaluation-harness in a search along gradients.

Which choice is right, and whether a target is, says the task's own judge: it is asked about answers
that leave no doubt. So a task that computes its scores by functions of its own needs nothing more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from jaxmerge.tasks.common import Example, Soft
from jaxmerge.tasks.requests import Generate, Likelihood, Likely, Request, Response, Rolling

Judge = Callable[[Example, Sequence[Response]], float]

_NO_DOUBT = -1e6  # nats of a choice that no length makes likely


def soft(
    found: Any, metric: str, best: float, example: Example, asked: Sequence[Request], judge: Judge
) -> Soft | None:
    """A document's soft score; None where nothing stands for it.

    Multiple choice: the softmax over the choices, whose log-likelihoods are divided as the metric
    divides them (`acc_norm` by characters, `acc_bytes` by bytes; that of `acc_mutual_info` is taken
    without what it subtracts). Log-likelihoods: their own. Texts: the target, where the judge gives
    it the best score.

    Args:
        found: the task, of `lm_eval.api.task`.
        metric: its name.
        best: the greatest score that there can be.
        example: whose data are a `lm_eval.Document`.
        asked: its requests.
        judge: of the task.
    """
    first = asked[0]
    if isinstance(first, Rolling):
        return Soft("text", (first,), lengths=(math.log(2) * len(first.text.encode()),))
    if isinstance(first, Generate):
        return _answer(found, best, example, asked, first, judge)
    choices = [request for request in asked if isinstance(request, Likelihood)]
    if found.OUTPUT_TYPE != "multiple_choice":
        return Soft("answer", (choices[0],)) if len(choices) == 1 else None
    options = found.doc_to_choice(example.data.document)
    given = len(options)
    right = tuple(k for k in range(given) if judge(example, _only(k, given, len(asked))) >= best)
    if not right or len(choices) < given:
        return None
    return Soft("choice", tuple(choices[:given]), right, _lengths(metric, options))


def _only(k: int, given: int, asked: int) -> list[Likely]:
    """Answers that leave no doubt that the choice is the k-th."""
    sure, unsure = Likely(0.0, True, 1), Likely(_NO_DOUBT, False, 1)
    return [sure if i == k or i >= given else unsure for i in range(asked)]


def _lengths(metric: str, options: Sequence[str]) -> tuple[float, ...]:
    of = {"acc_norm": len, "acc_bytes": lambda text: len(text.encode())}.get(metric)
    return tuple(float(max(of(text), 1)) if of else 1.0 for text in options)


def _answer(
    found: Any,
    best: float,
    example: Example,
    asked: Sequence[Request],
    first: Generate,
    judge: Judge,
) -> Soft | None:
    """The first target that the judge takes for right, after the task's delimiter."""
    document = example.data.document
    targets = found.doc_to_target(document)
    if isinstance(targets, int) and found.get_config("doc_to_choice") is not None:
        targets = found.doc_to_choice(document)[targets]
    delimiter = str(found.get_config("target_delimiter") or "")
    if first.prompt.form == "chat":
        delimiter = ""
    for target in targets if isinstance(targets, list) else [targets]:
        text = f"{delimiter}{target}"
        stopped = any(stop in text for stop in first.until)
        if str(target) and not stopped and judge(example, [text] * len(asked)) >= best:
            ending = first.until[0] if len(first.until) == 1 else ""
            request = Likelihood(first.prompt, text + ending, ended=not first.until)
            return Soft("answer", (request,))
    return None
