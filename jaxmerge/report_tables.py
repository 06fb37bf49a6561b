"""The words and tables of a run's report, as HTML.

Functions take `results` and `pool`, the contents of results.json and of pool.json, and return
markup. Every name goes through `text`.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxmerge.objective import AGGREGATES

Json = dict[str, Any]


def models(results: Json) -> list[tuple[str, Json]]:
    """(kind, entry) of the merge that was found, the baselines and the individuals."""
    return [
        ("search", results["best"]),
        *(("baseline", entry) for entry in results["baselines"]),
        *(("individual", entry) for entry in results["individuals"]),
    ]


def headline(results: Json) -> tuple[str, str]:
    """The result as a title and as a sentence, against the single checkpoint best on test."""
    best = results["best"]
    single = max(results["individuals"], key=lambda entry: entry["test_objective"])
    versus = best["vs"][single["name"]]
    low, high = versus["ci95"]
    if low > 0:
        title = "The searched merge beats the best single checkpoint"
    elif high < 0:
        title = "The searched merge is worse than the best single checkpoint"
    else:
        title = "The searched merge is not clearly different from the best single checkpoint"
    lead = (
        f"The searched merge scores <strong>{_score(best['test_objective'])}</strong> on test "
        f"{_interval(best['ci95']['objective'])}; the best single checkpoint on test, "
        f"<strong>{text(single['name'])}</strong>, scores {_score(single['test_objective'])} "
        f"{_interval(single['ci95']['objective'])}. The difference is "
        f"<strong>{_signed(versus['delta'])}</strong> {_interval(versus['ci95'])}, "
        f"<i>p</i>&nbsp;{_p(versus['p'])}."
    )
    return title, lead


def aim(results: Json) -> str:
    """What the objective is."""
    objective = results["objective"]
    how = AGGREGATES[objective["aggregate"]]
    said = f"The objective is <b>{text(objective['aggregate'])}</b>: {text(how.phrase)}"
    if how.weights != "refused":
        said += f", with weights {_listed(objective['weights'], '.3g')}"
    if how.relative:
        ranges = ", ".join(
            f"{text(task)}&nbsp;{_score(ends['worst'])} to {_score(ends['best'])}"
            for task, ends in objective["reference"].items()
        )
        said += f". The single checkpoints score on the search split: {ranges}"
    return f"{said}."


def warnings(results: Json) -> str:
    """What whoever reads the scores should know of the tasks; empty where there is nothing."""
    items = "".join(f"<li>{text(warning)}</li>" for warning in results["warnings"])
    return f'<ul class="warnings">{items}</ul>' if items else ""


def weights_table(results: Json, pool: Sequence[Json]) -> str:
    """The winner's weight of each checkpoint, beside what the checkpoint scores by itself."""
    best = results["best"]
    own = {entry["name"]: entry["test_objective"] for entry in results["individuals"]}
    weights = [best["weights"].get(checkpoint["name"], 0.0) for checkpoint in pool]
    low, high = min(0.0, *weights), max(0.0, *weights)
    of_models = [best["test_objective"], *own.values()]
    least, most = min(0.0, *of_models), max(0.0, *of_models)
    rows = [
        (
            text(checkpoint["name"]),
            _bar(weight, low, high, "weight"),
            _bar(own[checkpoint["name"]], least, most, "single")
            if checkpoint["name"] in own
            else "",
        )
        for checkpoint, weight in zip(pool, weights)
    ]
    rows.append(
        (
            "<b>searched merge</b>",
            f'<span class="number">sum {_score(sum(weights))}</span>',
            _bar(best["test_objective"], least, most, "winner"),
        )
    )
    return _table(("checkpoint", "weight in the merge", "test objective"), rows, css="bars")


def scores_table(results: Json) -> str:
    """Test scores with their intervals; the best of each column is bold."""
    columns = ["objective", *results["tasks"]]
    scores = [
        [entry["test_objective"], *(entry["test"][task] for task in results["tasks"])]
        for _, entry in models(results)
    ]
    best = [max(column) for column in zip(*scores)]
    rows = []
    for (kind, entry), row in zip(models(results), scores):
        cells = [
            f"{_score(score, bold=score == top)}<small>{_interval(entry['ci95'][column])}</small>"
            for column, score, top in zip(columns, row, best)
        ]
        rows.append((_label(kind, entry), *cells, f"{entry['evaluations']:,}"))
    return _table(("model", *map(text, columns), "evaluations"), rows, css="numbers first")


def paired_table(results: Json) -> str:
    """The winner against every other model on the same test examples."""
    rows = []
    for kind, entry in models(results)[1:]:
        versus = results["best"]["vs"][entry["name"]]
        low, high = versus["ci95"]
        verdict = "better" if low > 0 else "worse" if high < 0 else "no clear difference"
        rows.append(
            (
                _label(kind, entry),
                f"{_signed(versus['delta'])}<small>{_interval(versus['ci95'])}</small>",
                _p(versus["p"]).removeprefix("= "),
                f'<span class="{verdict.split()[0]}">{verdict}</span>',
            )
        )
    return _table(("against", "difference", "p", "searched merge is"), rows, css="numbers")


def heldout_section(results: Json) -> str:
    """Scores on tasks that the search never saw; empty without such tasks."""
    tasks = results["heldout_tasks"]
    shown = [(kind, entry) for kind, entry in models(results) if entry["heldout"]]
    if not tasks or not shown:
        return ""
    best = {task: max(entry["heldout"][task] for _, entry in shown) for task in tasks}
    rows = [
        (
            _label(kind, entry),
            *(
                _score(entry["heldout"][task], bold=entry["heldout"][task] == best[task])
                for task in tasks
            ),
        )
        for kind, entry in shown
    ]
    return (
        "<section><h2>Held-out tasks</h2><p>The search never saw these tasks: they show what the "
        "merge does to abilities that it was not tuned for.</p>"
        f"{_table(('model', *map(text, tasks)), rows, css='numbers first')}</section>"
    )


def made_section(results: Json, pool: Sequence[Json], config: Json) -> str:
    """How the result was made."""
    devices, seconds = results["devices"], results["seconds"]
    facts = {
        "Command": f"<code>{text(results['command'])}</code>",
        "Devices": (
            f"{devices['count']} &times; {text(devices['kind'])} ({text(devices['platform'])}), "
            f"{devices['processes']} process{'es' if devices['processes'] > 1 else ''}"
        ),
        "Evaluations": _total(results["evaluations_by_origin"], ","),
        "Seconds": _total(seconds, ",.1f"),
        "Pareto front": (
            f"{len(results['pareto'])} candidates, hypervolume {results['hypervolume']:.4f} "
            f"above {_listed(results['hypervolume_reference'], '.4g')}"
        ),
        "Versions": _listed(results["versions"]),
    }
    rows = [
        (
            text(checkpoint["name"]),
            text(checkpoint["source"]),
            text(checkpoint["format"]),
            f"{checkpoint['parameters']:,}",
            text(checkpoint["dtype"]),
            f"{checkpoint['bytes'] / 2**20:,.1f}",
            f"<code>{text(checkpoint['fingerprint'][:16])}</code>",
        )
        for checkpoint in pool
    ]
    header = ("checkpoint", "source", "format", "parameters", "dtype", "MiB", "fingerprint")
    return (
        f"<dl>{''.join(f'<dt>{name}</dt><dd>{value}</dd>' for name, value in facts.items())}</dl>"
        f"<details><summary>Pool</summary>{_table(header, rows)}</details>"
        "<details><summary>Config</summary><pre>"
        f"{text(json.dumps(config, indent=2, ensure_ascii=False))}</pre></details>"
    )


def options(names: Sequence[str], selected: int) -> str:
    """The options of a select element, whose values are the positions."""
    return "".join(
        f'<option value="{position}"{" selected" * (position == selected)}>{text(name)}</option>'
        for position, name in enumerate(names)
    )


def text(value: object) -> str:
    """Escaped for HTML."""
    return html.escape(str(value))


def _label(kind: str, entry: Json) -> str:
    return "searched merge" if kind == "search" else text(entry["name"])


def _table(header: Iterable[str], rows: Iterable[Sequence[str]], css: str = "") -> str:
    """A table of cells that are markup already; the first cell of a row is its heading."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return (
        f'<div class="scroll"><table class="{css}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _bar(value: float, low: float, high: float, css: str) -> str:
    """A bar from zero to `value` on the range [low, high], and the value."""
    span = (high - low) or 1.0
    left, width = 100 * (min(value, 0.0) - low) / span, 100 * abs(value) / span
    return (
        f'<span class="track"><span class="bar {css}" style="left:{left:.2f}%;width:{width:.2f}%">'
        f'</span></span><span class="number">{_score(value)}</span>'
    )


def _total(values: Mapping[str, int | float], spec: str) -> str:
    return f"{sum(values.values()):{spec}} in all: {_listed(values, spec)}"


def _listed(values: Mapping[str, Any], spec: str = "") -> str:
    return ", ".join(
        f"{text(name)}&nbsp;{text(f'{value:{spec}}')}" for name, value in values.items()
    )


def _score(value: float, bold: bool = False) -> str:
    shown = f"{value:.3f}".replace("-", "&minus;")
    return f"<b>{shown}</b>" if bold else shown


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "&minus;")


def _interval(ends: Sequence[float]) -> str:
    return f'<span class="interval">[{_score(ends[0])}, {_score(ends[1])}]</span>'


def _p(value: float) -> str:
    return "&lt; 0.001" if value < 0.001 else f"= {value:.3f}"
