"""What a search along gradients climbed, beside the true scores, as a section of the report."""

from __future__ import annotations

from jaxmerge.report import markup
from jaxmerge.report.markup import text
from jaxmerge.report.reading import Json, Run

_FORMS = {
    "probability": "probability of a right answer",
    "per_token": "mean probability of a token",
    "log": "log-likelihood per token",
}
_ABOUT = (
    "Gradients go along soft scores, which stand for the true ones. The rank correlation says how "
    "well they do, over checkpoints, baselines and candidates of the search."
)
_APART = (
    "After each generation: the true score that was to be expected of its steps, and that of the "
    "candidate after them. They part where the search learns the examples by heart."
)


def section(run: Run, soft: Json) -> str:
    """Which soft score each task had, and what came of it; empty where nothing was climbed.

    Args:
        run: the run.
        soft: of results.json.
    """
    if not soft:
        return ""
    rows = [
        (
            text(task),
            _FORMS[told["form"]],
            "" if told["spearman"] is None else f"{told['spearman']:.2f}",
            f"{told['left_out']:,}",
            f"{told['by_texts']:,}",
        )
        for task, told in soft.items()
    ]
    header = ("task", "soft score", "rank correlation", "examples left out", "by accepted texts")
    return markup.section(
        "What was climbed",
        markup.note(_ABOUT),
        markup.table(header, rows, css="numbers"),
        markup.note(_APART),
        _generations(run, [*soft]),
    )


def _generations(run: Run, tasks: list[str]) -> str:
    told = [one for one in run.searched if one.get("expected")]
    rows = [
        (
            f"{one['generation'] + 1}",
            *(
                f"{run.formats[task].score(one['expected'][task])} → "
                f"{run.formats[task].score(one['scores'][task])}"
                for task in tasks
            ),
        )
        for one in told
    ]
    return markup.table(("generation", *map(text, tasks)), rows, css="numbers")
