"""The front of a run as markup, and what its plot shows."""

from __future__ import annotations

from collections.abc import Sequence

from jaxmerge.report import markup
from jaxmerge.report.markup import text
from jaxmerge.report.reading import Json, Run
from jaxmerge.report.values import label, scaled
from jaxmerge.scores import formatting

_ONE = "1 would be the best checkpoint of each task in one merge."
_VOLUMES = (
    "Hypervolume of all that a way of searching had scored by then, single checkpoints included, "
    f"on the search split. {_ONE}"
)


def section(run: Run, results: Json) -> str:
    """The points, what they are merged from, and the choice between them; "": there is no front."""
    if "front" not in results:
        return ""
    front, tasks = results["front"], results["tasks"]
    names = [checkpoint["name"] for checkpoint in run.pool]
    reached = max(
        (abs(w) for point in front["points"] for w in point["weights"].values()), default=1
    )
    rows = [
        (
            text(point["name"]),
            *(
                markup.scored(run.formats[task], point["test"][task], point["ci95"][task])
                for task in tasks
            ),
            *(
                markup.shaded(weight, reached, markup.number(weight))
                for weight in (point["weights"].get(name, 0.0) for name in names)
            ),
        )
        for point in front["points"]
    ]
    title, columns = formatting.headings("The front", tasks, [run.formats[task] for task in tasks])
    volume = front["hypervolume"]
    said = (
        f"{len(rows)} merges that trade the tasks off, on test, and the weights they are made of: "
        "the darker, the larger. They were chosen on the search split for the largest hypervolume "
        f"together, which on test is {_volume(volume)}. {_ONE}"
    )
    header = ("point", *map(text, columns), *map(text, names))
    return markup.section(
        title,
        markup.note(said),
        _sliders(tasks),
        markup.table(header, rows, css="numbers heat points"),
        markup.figure("volumes", _VOLUMES, "low"),
    )


def _sliders(tasks: list[str]) -> str:
    """What each task is worth to the reader; the script says which point that is."""
    sliders = "".join(
        f'<label>{text(task)} <input type="range" class="worth" min="0" max="100"></label>'
        for task in tasks
    )
    return (
        f'<div class="controls screen"><span>What each task is worth to you:</span>{sliders}</div>'
        '<p id="preferred" class="screen" aria-live="polite"></p>'
    )


def plotted(run: Run, results: Json) -> Json | None:
    """The points for the script, and the volumes over tokens; None: there is no front."""
    if "front" not in results:
        return None
    front, tasks = results["front"], results["tasks"]
    forms = [run.formats[task] for task in tasks]
    return {
        "points": [
            {
                "name": label(point["name"]),
                "search": [scaled(form, point["search"][t]) for form, t in zip(forms, tasks)],
                "test": [scaled(form, point["test"][t]) for form, t in zip(forms, tasks)],
            }
            for point in front["points"]
        ],
        "volumes": [_curve(name, curve) for name, curve in front["curves"].items()],
        "export": label(f"jaxmerge export {run.directory} --point="),
    }


def compared(runs: Sequence[tuple[str, Run]]) -> str:
    """How much the fronts of several runs span; "": no run has one.

    Args:
        runs: each with its name as markup; all are finished.
    """
    found = [(name, front) for name, run in runs if (front := _front(run))]
    if not found:
        return ""
    ends = [end for _, front in found for end in front["hypervolume"]["ci95"]]
    rows = [
        (
            name,
            str(len(front["points"])),
            f"{front['hypervolume']['search']:.3f}",
            _volume(front["hypervolume"]),
            markup.whisker(
                *(front["hypervolume"]["test"], front["hypervolume"]["ci95"]),
                *(min(ends), max(ends)),
                zero=False,
            ),
        )
        for name, front in found
    ]
    return markup.section(
        "Fronts",
        markup.note(f"Hypervolume of the points of each front. {_ONE}"),
        markup.table(("run", "points", "search", "test", ""), rows, css="numbers drawn runs"),
        markup.figure("volumes", "Of all that a search had scored by then, on search.", "low"),
    )


def volumes(runs: Sequence[tuple[str, Run]]) -> list[Json]:
    """The same for the script: of each run with a front, by its name, over tokens."""
    return [
        _curve(name, front["curves"].get("search", []))
        for name, run in runs
        if (front := _front(run))
    ]


def _front(run: Run) -> Json | None:
    return (run.results or {}).get("front")


def _volume(volume: Json) -> str:
    low, high = volume["ci95"]
    return f'{volume["test"]:.3f} <span class="interval">[{low:.3f}, {high:.3f}]</span>'


def _curve(name: str, curve: Sequence[Json]) -> Json:
    return {
        "name": label(name),
        "tokens": [point["tokens"] for point in curve],
        "best": [round(point["hypervolume"], 5) for point in curve],
    }
