"""One page that compares runs: what they reached, at which cost, and where their configs differ."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np

from jaxmerge import rundir
from jaxmerge.errors import JaxmergeError, way_out
from jaxmerge.report import front, markup, page, plots
from jaxmerge.report.markup import DASH, text
from jaxmerge.report.reading import Json, Run, as_page, read
from jaxmerge.report.tables import best_single
from jaxmerge.report.values import label
from jaxmerge.scores import formatting, stats


class Cell(NamedTuple):
    """A run of the comparison.

    Attributes:
        name: what tells it from the others.
        link: to its report, from the page; "": it has none.
        run: what its directory says.
    """

    name: str
    link: str
    run: Run


def compare(directories: Sequence[Path], out: Path) -> Path:
    """Writes a page that compares the runs.

    Args:
        directories: of runs, finished or not; the paired tests are against the first that is.
        out: where the page is written.

    Returns:
        `out`.

    Raises:
        JaxmergeError: fewer than two directories or one of them twice; a file is missing, is not
            what a run leaves, or the page cannot be written.
    """
    resolved = [directory.resolve() for directory in directories]
    if len(set(resolved)) < max(2, len(resolved)):
        raise JaxmergeError(
            "a comparison needs several directories, each once",
            expected="the directories of two runs or more",
            found=", ".join(map(str, resolved)),
        )
    cells = []
    for name, directory in zip(_names(resolved), directories):
        with as_page(directory):
            cells.append(Cell(name, _link(directory, out), read(directory)))
    with as_page(out):
        rendered = _page(cells)
    return page.save(rendered, out)


def _page(cells: Sequence[Cell]) -> str:
    finished = [cell for cell in cells if cell.run.results]
    title = f"{len(cells)} runs compared"
    body = [
        f'<header><h1>{title}</h1><p class="lead">{_lead(finished)}</p>',
        markup.note(
            "Brackets are 95% bootstrap intervals over test examples; what is compared are the "
            "searched merges of the runs."
        ),
        markup.warnings(_warnings(cells)),
        "</header><main>",
        _runs_section(cells),
        markup.section(
            "Search",
            markup.over(all(plots.ways(cell.run) for cell in cells)),
            markup.figure(
                "curves", "Best objective so far, on each run's own search split.", "low"
            ),
        ),
        front.compared([(_name(cell), cell.run) for cell in finished]),
        _tasks_section(finished),
        _paired_section(finished),
        _weights_section(finished),
        _config_section(cells),
        "</main>",
    ]
    # Runs that are not finished do not know yet whether their scores are shares; the others do.
    alike = len({_aim(cell.run) for cell in cells}) == 1
    percent = alike and bool(finished) and finished[0].run.formats["objective"].percent
    data = {
        "unit": "%" if percent else "",
        "curves": [{"name": label(cell.name), **_curve(cell.run, percent)} for cell in cells],
        "volumes": front.volumes([(cell.name, cell.run) for cell in finished]),
    }
    return page.assemble(f"jaxmerge: {title}", "".join(body), data, "comparison.js")


def _curve(run: Run, percent: bool) -> Json:
    """Best objective so far, in percent or as plain numbers whatever the run's own tables have.

    By evaluations, and where it rises by tokens.
    """
    unit = (100 if percent else 1) / (100 if run.formats["objective"].percent else 1)
    by_tokens = [way for way in plots.ways(run) if way["name"] == "search"]
    (way,) = by_tokens or [{"tokens": [], "best": []}]
    return {
        "best": [round(value * unit, 5) for value in plots.curve(run, "search")["best"]],
        "tokens": way["tokens"],
        "risen": [round(value * unit, 5) for value in way["best"]],
    }


def _lead(finished: Sequence[Cell]) -> str:
    if not finished:
        return "None of these runs is finished."
    if len({_aim(cell.run) for cell in finished}) > 1:
        return "These runs maximise different objectives, so none of them is the best of all."
    best = max(finished, key=lambda cell: _best(cell)["test_objective"])
    form, entry = best.run.formats["objective"], _best(best)
    value = markup.score(form, entry["test_objective"], unit=True)
    return (
        f"The best test objective is <strong>{value}</strong> "
        f"{markup.interval(form, entry['ci95']['objective'])}, of "
        f"<strong>{text(best.name)}</strong>, among {len(finished)} finished "
        f"run{'s' if len(finished) > 1 else ''}. It is the best of several on test, so it is "
        "flattered."
    )


def _warnings(cells: Sequence[Cell]) -> list[str]:
    """What makes the numbers of these runs other things than they seem."""
    said = []
    if len({_aim(cell.run) for cell in cells}) > 1:
        said.append(
            "These runs do not maximise the same objective: their objectives are other numbers, "
            "and are not comparable."
        )
    if len({_said(cell.run.examples) for cell in cells}) > 1:
        said.append("These runs were not scored on the same examples.")
    if len({_said([one["fingerprint"] for one in cell.run.pool]) for cell in cells}) > 1:
        said.append("These runs do not merge the same checkpoints.")
    unfinished = [cell.name for cell in cells if not cell.run.results]
    if unfinished:
        said.append("Not finished, and without test scores: " + ", ".join(unfinished))
    return said


def _runs_section(cells: Sequence[Cell]) -> str:
    ends = [x for cell in cells if cell.run.results for x in _best(cell)["ci95"]["objective"]]
    rows = [_run_row(cell, min(ends, default=0.0), max(ends, default=1.0)) for cell in cells]
    header = (
        "run",
        "test objective",
        "",
        "over the best single",
        "evaluations",
        "tokens",
        "seconds",
    )
    return markup.section("Runs", markup.table(header, rows, css="numbers drawn runs"))


def _run_row(cell: Cell, low: float, high: float) -> Sequence[str]:
    run, results = cell.run, cell.run.results
    form = run.formats["objective"]
    if not results:
        return (_name(cell), "not finished", "", DASH, f"{len(run.searched):,}", DASH, DASH)
    best = results["best"]
    ends = best["ci95"]["objective"]
    single = best_single(results)
    versus = best["vs"][single["name"]]
    tokens = sum(results["tokens"].values()) if "tokens" in results else None
    return (
        _name(cell),
        markup.scored(form, best["test_objective"], ends, unit=True),
        markup.whisker(best["test_objective"], ends, low, high, zero=False),
        markup.compared(form, versus["delta"], versus["ci95"], unit=True)
        + f"<small>{text(single['name'])}</small>",
        f"{results['evaluations']:,}",
        DASH if tokens is None else f"{tokens:,}",
        f"{sum(results['seconds'].values()):,.1f}",
    )


def _tasks_section(finished: Sequence[Cell]) -> str:
    """Test scores of the winners on every task that any of them was scored on."""
    tasks = dict.fromkeys(task for cell in finished for task in _test_scores(cell))
    if not tasks:
        return ""
    tops = {task: max(_test_scores(cell).get(task, -np.inf) for cell in finished) for task in tasks}
    rows = []
    for cell in finished:
        scores, forms = _test_scores(cell), cell.run.formats
        cells = [
            markup.score(forms[task], scores[task], bold=scores[task] == top)
            if task in scores
            else DASH
            for task, top in tops.items()
        ]
        rows.append((_name(cell), *cells))
    of_task = {task: form for cell in finished for task, form in cell.run.formats.items()}
    title, columns = formatting.headings("Test scores", list(tasks), [of_task[t] for t in tasks])
    return markup.section(
        title,
        markup.note("Held-out tasks too. The best of each column is bold."),
        markup.table(("run", *map(text, columns)), rows, css="numbers runs"),
    )


def _paired_section(finished: Sequence[Cell]) -> str:
    """Every winner against that of the first run, on the same examples; empty where there are none.

    Only of runs with the objective and the examples of the first.
    """
    if not finished:
        return ""
    first = finished[0]
    alike = [
        cell
        for cell in finished[1:]
        if cell.run.examples
        and cell.run.examples == first.run.examples
        and _aim(cell.run) == _aim(first.run)
    ]
    if not alike:
        return ""
    of_first = _samples(first.run)
    compared = [stats.paired(_samples(cell.run), of_first, cell.run.objective) for cell in alike]
    form = first.run.formats["objective"]
    ends = [0.0, *(end for one in compared for end in (one.low, one.high))]
    rows = [
        (
            _name(cell),
            markup.compared(form, one.delta, (one.low, one.high)),
            markup.whisker(one.delta, (one.low, one.high), min(ends), max(ends)),
            markup.p_value(one.p),
            markup.verdict((one.low, one.high), "better", "worse"),
        )
        for cell, one in zip(alike, compared)
    ]
    unit = form.points and f", {form.points.strip()}"
    return markup.section(
        "Paired tests",
        markup.note(
            f"Difference of the test objective to that of <b>{text(first.name)}</b>, on the same "
            "examples; two-sided paired permutation test. The p-values are not corrected for the "
            "number of comparisons."
        ),
        markup.table(
            ("run", f"difference{unit}", "", "p", "it is"), rows, css="numbers drawn runs"
        ),
    )


def _weights_section(finished: Sequence[Cell]) -> str:
    if not finished:
        return ""
    weights = [_best(cell)["weights"] for cell in finished]
    reached = [weight for of_run in weights for weight in of_run.values()]
    names = dict.fromkeys(name for of_run in weights for name in of_run)
    cells = [
        [
            markup.bar(of_run[name], reached, "weight", markup.number(of_run[name]))
            if name in of_run
            else DASH
            for name in names
        ]
        for of_run in weights
    ]
    return markup.section(
        "Weights of the merges",
        _grid("checkpoint", finished, [text(name) for name in names], cells),
    )


def _config_section(cells: Sequence[Cell]) -> str:
    flat = [
        {field: json.dumps(value) for field, value in rundir.flat(cell.run.config).items()}
        for cell in cells
    ]
    fields = sorted({field for config in flat for field in config})
    differing = [field for field in fields if len({config.get(field) for config in flat}) > 1]
    if not differing:
        return markup.section("Configs", markup.note("The configs are the same in every field."))
    values = [
        [f"<code>{text(config[field])}</code>" if field in config else DASH for field in differing]
        for config in flat
    ]
    columns = [f"<code>{text(field)}</code>" for field in differing]
    return markup.section(
        "Configs",
        markup.note(f"Of {len(fields)} fields these differ."),
        _grid("field", cells, columns, values),
    )


def _grid(
    corner: str, cells: Sequence[Cell], columns: Sequence[str], values: Sequence[Sequence[str]]
) -> str:
    """Something of every run, by run and column: as it is, or turned to be higher than wide."""
    names = [_name(cell) for cell in cells]
    if len(names) >= len(columns):
        rows = [(name, *row) for name, row in zip(names, values)]
        return markup.table(("run", *columns), rows, css="many")
    rows = [(column, *row) for column, row in zip(columns, zip(*values))]
    return markup.table((corner, *names), rows, css="many")


def _samples(run: Run) -> dict[str, np.ndarray]:
    """Scores of the winner on each test example, by task, from `examples/`."""
    sought = ("final", "search", "test")
    finals = [one for one in run.candidates if (one["origin"], one["name"], one["split"]) == sought]
    if not finals:
        raise JaxmergeError(
            "the winner's scores on test are missing",
            where=str(run.directory / "candidates.jsonl"),
            expected="the directory as its run left it, examples/ too",
        )
    final = finals[0]
    samples = {}
    for task in run.objective.tasks:
        file, count = run.directory / "examples" / "test" / f"{task}.f32", final["n"][task]
        try:
            samples[task] = np.fromfile(file, "<f4", count=count, offset=4 * final["row"] * count)
        except OSError as error:
            raise JaxmergeError(
                "cannot be read",
                where=str(file),
                expected=way_out(error) or "the file as the run wrote it",
                found=str(error),
            ) from None
        if len(samples[task]) != count:
            raise JaxmergeError(
                "the winner's scores on test are missing",
                where=str(file),
                expected="the directory as its run left it, examples/ too",
            )
    return samples


def _names(resolved: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as it takes to tell them apart."""
    for depth in range(1, max(len(path.parts) for path in resolved) + 1):
        names = ["/".join(path.parts[-depth:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("the paths differ")


def _link(directory: Path, out: Path) -> str:
    target = directory / "report.html"
    return quote(os.path.relpath(target, out.parent)) if target.exists() else ""


def _name(cell: Cell) -> str:
    """The name of a run, with its link; lines break between the fields that a sweep names it by,
    and before their values.
    """
    name = text(cell.name).replace(",", ",<wbr>").replace("=", "=<wbr>")
    return f'<a href="{text(cell.link)}">{name}</a>' if cell.link else name


def _best(cell: Cell) -> Json:
    assert cell.run.results
    return cell.run.results["best"]


def _test_scores(cell: Cell) -> dict[str, float]:
    best = _best(cell)
    return {**best["test"], **best["heldout"]}


def _aim(run: Run) -> str:
    """What a run maximises; the pool's scores are part of it where tasks are measured by them."""
    plain = run.objective.plain()
    return _said(plain if run.objective.how.relative else {**plain, "reference": {}})


def _said(value: object) -> str:
    return json.dumps(value, sort_keys=True)
