"""The analyses of a finished run, as markup: what each checkpoint is worth to the merge."""

from __future__ import annotations

from collections.abc import Callable

from jaxmerge.report import markup
from jaxmerge.report.markup import text
from jaxmerge.report.reading import Json, Run
from jaxmerge.scores import formatting


def sections(run: Run, results: Json) -> str:
    """The analyses that were asked for; empty where none was."""
    found = results.get("analyses", {})
    return "".join(say(run, results) for say, keys in _SECTIONS if any(map(found.get, keys)))


def _weights(run: Run, results: Json) -> str:
    nonzero, relation = (results["analyses"].get(n) for n in ("nonzero", "weight_vs_score"))
    contents = []
    if nonzero:
        contents.append(
            f"<p>{len(nonzero['checkpoints'])} of {len(run.pool)} checkpoints "
            f"({100 * nonzero['share']:.0f}%) have a weight above {nonzero['threshold']:g}, the "
            f"sign aside: {markup.names(nonzero['checkpoints'])}.</p>"
        )
    if relation:
        contents.append(markup.figure("weights", _correlation(relation), "low"))
    return markup.section("Weight against score", *contents)


def _correlation(relation: Json) -> str:
    if relation["spearman"] is None:
        return "Spearman's rank correlation is not defined here: one of the two does not vary."
    said = f"Spearman's rank correlation {markup.number(relation['spearman'])}"
    if relation["p"] is not None:
        said += f", p {markup.p_value(relation['p'])}"
    return f"{said}. With few checkpoints it says little."


def _leave_one_out(run: Run, results: Json) -> str:
    form = run.formats["objective"]
    found = sorted(results["analyses"]["leave_one_out"], key=lambda one: one["delta"])
    ends = [0.0, *(end for one in found for end in one["ci95"])]
    weights = results["best"]["weights"]
    rows = [
        (
            text(one["dropped"]),
            markup.number(weights.get(one["dropped"], 0.0)),
            markup.score(form, one["test_objective"]),
            markup.compared(form, one["delta"], one["ci95"]),
            markup.whisker(one["delta"], one["ci95"], min(ends), max(ends)),
            markup.verdict(one["ci95"], "the merge is better without", "the merge needs it"),
        )
        for one in found
    ]
    unit = form.points and f", {form.points.strip()}"
    return markup.section(
        "Leave one out",
        markup.note(
            "The winner without one checkpoint, the other weights scaled to their old sum, on the "
            "same test examples: minus the winner as it is. The most missed stands first; "
            "checkpoints of weight 0 are left out."
        ),
        markup.table(
            ("without", "weight", "test objective", f"difference{unit}", "", ""),
            rows,
            css="numbers drawn",
        ),
    )


def _pool_size(run: Run, results: Json) -> str:
    form = run.formats["objective"]
    points = sorted(results["analyses"]["pool_size"], key=lambda point: point["m"])
    rows = [
        (
            text(point["m"]),
            f"{point['evaluations']:,}",
            markup.score(form, point["search_objective"]),
            markup.scored(form, point["test_objective"], point["ci95"]),
            markup.names(point["checkpoints"]),
        )
        for point in points
    ]
    header = ("checkpoints", "evaluations", "search objective", "test objective", "which")
    return markup.section(
        "Pool size",
        markup.figure(
            "sizes",
            "A search over the best checkpoints alone, by their own search objective; the bars "
            "are 95% intervals on test. The last point is the winner.",
            "low",
        ),
        markup.details("Each search", markup.table(header, rows, css="numbers worded")),
    )


def _transfer(run: Run, results: Json) -> str:
    found = results["analyses"]["transfer"]
    tasks = [task for task in run.formats if task != "objective" and task in found[0]["test"]]
    best = results["best"]
    scores = [
        *(("best on " + markup.names(one["tasks"]), one["tasks"], one["test"]) for one in found),
        ("searched merge", results["tasks"], {**best["test"], **best["heldout"]}),
    ]
    tops = {
        task: max(of_tasks.get(task, -float("inf")) for *_, of_tasks in scores) for task in tasks
    }
    rows = []
    for name, chosen_on, of_tasks in scores:
        cells = []
        for task in tasks:
            shown = markup.DASH
            if task in of_tasks:
                value = of_tasks[task]
                shown = markup.score(run.formats[task], value, bold=value == tops[task])
            cells.append(f'<span class="on">{shown}</span>' if task in chosen_on else shown)
        rows.append((name, *cells))
    title, columns = formatting.headings("Transfer", tasks, [run.formats[task] for task in tasks])
    return markup.section(
        title,
        markup.note(
            "Of all candidates the one with the best objective over two tasks alone, scored on "
            "every task: test scores. Underlined are the tasks that it was chosen for."
        ),
        markup.table(("weights", *map(text, columns)), rows, css="numbers"),
    )


# With the keys of results.json's `analyses` of which one must be there.
_SECTIONS: tuple[tuple[Callable[[Run, Json], str], tuple[str, ...]], ...] = (
    (_weights, ("nonzero", "weight_vs_score")),
    (_leave_one_out, ("leave_one_out",)),
    (_pool_size, ("pool_size",)),
    (_transfer, ("transfer",)),
)
