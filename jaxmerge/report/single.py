"""The page of one run, finished or not."""

from __future__ import annotations

import datetime
from pathlib import Path

from jaxmerge.report import (
    analyses,
    answers,
    front,
    markup,
    merged,
    page,
    plots,
    soft,
    tables,
    unfinished,
)
from jaxmerge.report.reading import Json, Run, as_page, models, points, read

_INTERVALS = (
    "Brackets are 95% bootstrap intervals over test examples. Models are chosen on the search "
    "split and reported on the test split, which the search never sees. "
)
_TRADEOFF = (
    "Up and to the right is better. The line bounds what any candidate reached on the two chosen "
    "axes; rings mark the Pareto front over all tasks. "
    '<span class="screen">Touch or hover for scores and weights.</span>'
)
_CURVE = (
    "Objective on the search split. Every evaluation is one merged model scored on all tasks. The "
    "line in the band is the median of a generation, the band reaches from its 10% to its 90% "
    "quantile."
)
_BY_TOKENS = (
    " A token counts once when it goes forward, read or written, and three times when it goes "
    "forward and backward. The scores of the single checkpoints are not counted: all ways of "
    "searching share them."
)


def write(directory: Path) -> Path:
    """Writes `report.html` into a run directory.

    Of a run that is not finished (without results.json) the page says so, and shows what there is.

    Returns:
        The path of the report.

    Raises:
        JaxmergeError: a file is missing, is not what a run leaves, or cannot be written.
    """
    with as_page(directory):
        run = read(directory)
        if run.results is None:
            rendered = _unfinished(run, datetime.datetime.now(datetime.UTC))
        else:
            rendered = _finished(run, run.results)
    return page.save(rendered, directory / "report.html")


def _finished(run: Run, results: Json) -> str:
    title, lead = tables.headline(run, results)
    body = [
        f'<header><h1>{title}</h1><p class="lead">{lead}</p>',
        markup.note(_INTERVALS + tables.aim(run)),
        markup.warnings(results["warnings"]),
        "</header><main>",
        _tradeoff_section(run, tested=True),
        front.section(run, results),
        _search_section(run),
        tables.weights_section(run, results),
        merged.method_section(results),
        merged.window_section(results),
        merged.groups_section(run, results),
        merged.kinship_section(run, results),
        tables.scores_section(run, results),
        answers.section(run),
        soft.section(run, results.get("soft", {})),
        tables.paired_section(run, results),
        tables.heldout_section(run, results),
        analyses.sections(run, results),
        tables.cost_section(results),
        tables.made_section(run, results),
        "</main>",
    ]
    data = {
        **plots.of_run(run, [*models(results), *points(results)], results["pareto"]),
        "analyses": plots.of_analyses(run, results),
        "front": front.plotted(run, results),
    }
    return page.assemble(f"jaxmerge: {title}", "".join(body), data, "run.js")


def _unfinished(run: Run, now: datetime.datetime) -> str:
    so_far = unfinished.models(run)
    title, lead = unfinished.headline(run)
    body = [
        f'<header class="unfinished"><h1>{title}</h1><p class="lead">{lead}</p>',
        markup.note(f"Written {now:%Y-%m-%d %H:%M:%S} UTC. {unfinished.CAUTION} {tables.aim(run)}"),
        markup.warnings(run.outputs.get("warnings", ())),
        "</header><main>",
        unfinished.progress_section(run),
    ]
    if so_far:
        body += [
            _tradeoff_section(run, tested=False),
            _search_section(run),
            unfinished.scores_section(run, so_far),
        ]
    body.append(answers.section(run))
    body += [markup.section("How it is made", tables.pool_and_config(run)), "</main>"]
    data = {**plots.of_run(run, so_far, unfinished.front(run)), "analyses": {}, "front": None}
    return page.assemble(f"jaxmerge: {title}", "".join(body), data, "run.js")


def _tradeoff_section(run: Run, *, tested: bool) -> str:
    choices = [*run.objective.tasks, f"objective ({run.objective.aggregate})"]
    splits = (
        '<label>split <select id="split"><option value="search">search: every candidate</option>'
        '<option value="test">test: reported models</option></select></label>'
    )
    return markup.section(
        "Trade-offs",
        '<div class="controls">'
        f'<label>across <select id="x">{markup.options(choices, 0)}</select></label>'
        f'<label>up <select id="y">{markup.options(choices, 1)}</select></label>'
        f"{splits * tested}</div>",
        markup.figure("tradeoff", _TRADEOFF),
    )


def _search_section(run: Run) -> str:
    """The best so far: over tokens, where the log counts them, and over evaluations."""
    counted = bool(plots.ways(run))
    said = markup.figure("curve", _CURVE + _BY_TOKENS * counted, "low")
    return markup.section("Search", markup.over(counted), said)
