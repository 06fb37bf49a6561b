"""What the checkpoints answered, beside the target and the verdict, as a section of the report."""

from __future__ import annotations

from typing import Any

from jaxmerge.report import markup
from jaxmerge.report.markup import text
from jaxmerge.report.reading import Json, Run

_LONGEST = 400  # characters of a text that is shown
_ABOUT = (
    "The first examples of each task, as the checkpoints by themselves answered them. Whether a "
    "model answers at all, where its texts end and what the judge makes of them is seen here "
    "first. Of multiple choices, the log-likelihood of each stands before it."
)


def section(run: Run) -> str:
    """A table for each task, of the first checkpoint; of the others they are folded away."""
    said: Json = run.outputs.get("checkpoints", {})
    if not said:
        return ""
    (name, first), *others = said.items()
    return markup.section(
        "What the checkpoints answered",
        markup.note(_ABOUT),
        f"<h3>{text(name)}</h3>{_tables(run, first)}",
        *(markup.details(other, _tables(run, tasks)) for other, tasks in others),
    )


def _tables(run: Run, tasks: Json) -> str:
    return "".join(_table(run, task, sample) for task, sample in tasks.items())


def _table(run: Run, task: str, sample: Json) -> str:
    header = (text(task), "target", "answer", "score")
    form = run.formats.get(task)
    rows = [
        (
            *(_shown(one[part]) for part in ("prompt", "target", "output")),
            markup.score(form, one["score"], unit=True) if form else markup.number(one["score"]),
        )
        for one in sample["first"]
    ]
    constant = ""
    if sample["share"] > 0.5:
        constant = markup.note(
            f"{100 * sample['share']:.0f}% of its answers to {text(task)} are "
            f"{_shown(sample['constant'])}"
        )
    return markup.table(header, rows, css="answers") + constant


def _shown(value: Any) -> str:
    """A text as it is, its line ends too; an empty one is said to be."""
    whole = str(value)
    if not whole:
        return '<i class="note">empty</i>'
    cut = whole if len(whole) <= _LONGEST else f"{whole[:_LONGEST]}…"
    return f"<code>{text(cut)}</code>"
