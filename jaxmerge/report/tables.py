"""The words and tables of a finished run's report, as markup."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from jaxmerge.report import markup
from jaxmerge.report.markup import text
from jaxmerge.report.reading import Json, Run, models
from jaxmerge.rundir import cost
from jaxmerge.scores import formatting
from jaxmerge.scores.formatting import Format
from jaxmerge.scores.objective import AGGREGATES


def headline(run: Run, results: Json) -> tuple[str, str]:
    """The result as a title and in words, against the single checkpoint that is best on test."""
    best, form = results["best"], run.formats["objective"]
    single = best_single(results)
    versus = best["vs"][single["name"]]
    low, high = versus["ci95"]
    if low > 0:
        title = "The searched merge beats the best single checkpoint"
    elif high < 0:
        title = "The searched merge is worse than the best single checkpoint"
    else:
        title = "The searched merge is not clearly different from the best single checkpoint"
    lead = (
        f"The searched merge scores <strong>{_said(form, best)}</strong> on test "
        f"{markup.interval(form, best['ci95']['objective'])}; the best single checkpoint on test, "
        f"<strong>{text(single['name'])}</strong>, scores {_said(form, single)} "
        f"{markup.interval(form, single['ci95']['objective'])}. The difference is "
        f"<strong>{markup.difference(form, versus['delta'], unit=True)}</strong> "
        f"{markup.differences(form, versus['ci95'])}, {_p_said(versus['p'])}."
    )
    return title, f"{lead} {_against_baselines(form, results)}".rstrip()


def _against_baselines(form: Format, results: Json) -> str:
    """The winner against the baseline that is best on test, as a sentence; empty without any."""
    if not results["baselines"]:
        return ""
    rival = max(results["baselines"], key=lambda entry: entry["test_objective"])
    versus = results["best"]["vs"][rival["name"]]
    return (
        f"Against the best baseline, <strong>{text(rival['name'])}</strong> with "
        f"{_said(form, rival)}, it is {markup.difference(form, versus['delta'], unit=True)} "
        f"{markup.differences(form, versus['ci95'])}, {_p_said(versus['p'])}."
    )


def best_single(results: Json) -> Json:
    """The single checkpoint that is best on test."""
    return max(results["individuals"], key=lambda entry: entry["test_objective"])


def aim(run: Run) -> str:
    """What the objective is."""
    objective = run.objective
    how = AGGREGATES[objective.aggregate]
    said = f"The objective is <b>{text(objective.aggregate)}</b>: {text(how.phrase)}"
    if how.weights != "refused":
        said += f", with weights {markup.listed(objective.weights, '.3g')}"
    if how.relative:
        ranges = ", ".join(
            f"{text(task)}&nbsp;{markup.score(run.formats[task], ends.worst)} to "
            f"{markup.score(run.formats[task], ends.best, unit=True)}"
            for task, ends in objective.reference.items()
        )
        said += f". The single checkpoints score on the search split: {ranges}"
    return f"{said}."


def weights_section(run: Run, results: Json) -> str:
    """The winner's weight of each checkpoint, beside what the checkpoint scores by itself."""
    best, form = results["best"], run.formats["objective"]
    own = {entry["name"]: entry for entry in results["individuals"]}
    weighted = results.get("method", {}).get("weighted", True)
    weights = [best["weights"].get(checkpoint["name"], 0.0) for checkpoint in run.pool]
    reached = [entry["test_objective"] for entry in (best, *own.values())]
    tops = {task: max(entry["test"][task] for entry in own.values()) for task in results["tasks"]}

    def scores(entry: Json, css: str) -> list[str]:
        value = entry["test_objective"]
        shown = markup.bar(value, reached, css, markup.score(form, value))
        return [shown, *_scores(run, entry["test"], tops)]

    rows = []
    for checkpoint, weight in zip(run.pool, weights):
        name = checkpoint["name"]
        shown = markup.bar(weight, weights, "weight", markup.number(weight)) if weighted else ""
        alone = scores(own[name], "single") if name in own else []
        rows.append((text(name), shown, *alone))
    total = f'<span class="number">sum {markup.number(sum(weights))}</span>'
    rows.append(("<b>searched merge</b>", total, *scores(best, "winner")))
    title, columns = _headings(run, "What went into the merge")
    return markup.section(
        title,
        markup.note(
            "The weight of each checkpoint, beside what it scores by itself on test. The best "
            "checkpoint of each task is bold."
        ),
        markup.table(("checkpoint", "weight", *columns), rows, css="bars"),
    )


def scores_section(run: Run, results: Json) -> str:
    """Test scores with their intervals; the best of each column is bold."""
    choices = ["objective", *results["tasks"]]
    scores = [
        [entry["test_objective"], *(entry["test"][task] for task in results["tasks"])]
        for _, entry in models(results)
    ]
    best = [max(column) for column in zip(*scores)]
    rows = []
    counted = "tokens" in results["best"]
    for (kind, entry), row in zip(models(results), scores):
        cells = [
            markup.scored(run.formats[choice], value, entry["ci95"][choice], bold=value == top)
            for choice, value, top in zip(choices, row, best)
        ]
        tokens = [f"{entry['tokens']:,}"] if counted else []
        rows.append((label(kind, entry), *cells, f"{entry['evaluations']:,}", *tokens))
    title, columns = _headings(run, "Test scores")
    took = "Evaluations and tokens" if counted else "Evaluations"
    return markup.section(
        title,
        markup.note(f"The best of each column is bold. {took} are what it cost to find the model."),
        markup.table(
            ("model", *columns, "evaluations", *["tokens"] * counted), rows, css="numbers first"
        ),
    )


def paired_section(run: Run, results: Json) -> str:
    """The winner against every other model on the same test examples."""
    form, against = run.formats["objective"], results["best"]["vs"]
    ends = [0.0, *(end for versus in against.values() for end in versus["ci95"])]
    rows = []
    for kind, entry in models(results)[1:]:
        versus = against[entry["name"]]
        rows.append(
            (
                label(kind, entry),
                markup.compared(form, versus["delta"], versus["ci95"]),
                markup.whisker(versus["delta"], versus["ci95"], min(ends), max(ends)),
                markup.p_value(versus["p"]),
                markup.verdict(versus["ci95"], "better", "worse"),
            )
        )
    header = ("against", f"difference{form.points and ', ' + form.points.strip()}", "", "p")
    return markup.section(
        "Paired tests",
        markup.note(
            "Difference of the test objective, searched merge minus the other, on the same "
            "examples; two-sided paired permutation test. The p-values are not corrected for the "
            "number of comparisons."
        ),
        markup.table((*header, "searched merge is"), rows, css="numbers drawn"),
    )


def heldout_section(run: Run, results: Json) -> str:
    """Scores on tasks that the search never saw; empty without such tasks."""
    tasks = results["heldout_tasks"]
    shown = [(kind, entry) for kind, entry in models(results) if entry["heldout"]]
    if not tasks or not shown:
        return ""
    best = {task: max(entry["heldout"][task] for _, entry in shown) for task in tasks}
    rows = [(label(kind, one), *_scores(run, one["heldout"], best)) for kind, one in shown]
    title, columns = formatting.headings("Held-out tasks", tasks, [run.formats[t] for t in tasks])
    return markup.section(
        title,
        markup.note(
            "The search never saw these tasks: they show what the merge does to abilities that it "
            "was not tuned for."
        ),
        markup.table(("model", *map(text, columns)), rows, css="numbers first"),
        _heldout_differences(run, results["best"].get("heldout_vs", {}), tasks),
    )


def _heldout_differences(run: Run, against: Mapping[str, Json], tasks: Sequence[str]) -> str:
    """The winner minus the others that were scored on held-out tasks; empty without any."""
    if not against:
        return ""
    rows = [
        (
            text(name),
            *(
                markup.compared(run.formats[task], versus[task]["delta"], versus[task]["ci95"])
                for task in tasks
            ),
        )
        for name, versus in against.items()
    ]
    title = "searched merge minus"
    return markup.table((title, *map(text, tasks)), rows, css="numbers")


def cost_section(results: Json) -> str:
    """What the run took: evaluations, tokens, and seconds by phase."""
    seconds, evaluations = results["seconds"], dict(results["evaluations_by_origin"])
    extra = results.get("analyses", {}).get("evaluations", {})
    for split, count in extra.items():
        if count:
            evaluations[f"analyses, {split} split"] = count
    tokens = {origin: cost(of) for origin, of in results.get("tokens_by_origin", {}).items()}
    said = {
        "Evaluations": f"{results['evaluations']:,} of merged models on the search split"
        + (f", and {sum(extra.values()):,} for the analyses" if extra else "")
    }
    if "tokens" in results:
        of_run = results["tokens"]
        said["Tokens"] = f"{of_run['read']:,} read, {of_run['written']:,} written"
        if "differentiated" in of_run:
            said["Tokens"] += (
                f", {of_run['differentiated']:,} forward and backward, which count as three each"
            )
    said["Time"] = _duration(sum(seconds.values()))
    residency = results.get("residency", {"kind": "device"})
    if residency["kind"] != "device":
        said["Pool"] = (
            f"residency {text(residency['kind'])}: {residency['bytes_read'] / 2**30:,.1f} GiB "
            f"read and merged in {_duration(residency['seconds'])} since the last start"
        )
    if "storage" in results:
        said["Storage"] = _storage(results)
    return markup.section(
        "Cost",
        markup.facts(said),
        '<div class="beside">',
        _shares("evaluations of", evaluations, ",d"),
        _shares("tokens of", tokens, ",d") if tokens else "",
        _shares("seconds of", seconds, ",.1f"),
        "</div>",
    )


def _storage(results: Json) -> str:
    """How the pool was held, and what that did to the winner."""
    storage, formats = results["storage"], formatting.of_results(results)
    scores = [
        f"{text(task)} {formats[task].score(both['exact'])} instead of "
        f"{formats[task].score(both['stored'])}"
        for task, both in storage["scores"].items()
    ]
    return (
        f"differences in {text(storage['kind'])}; the searched merge, as it was scored, is off "
        f"the exported one by {storage['mean']:.1e} of its norm in the mean over leaves, by "
        f"{storage['worst']:.1e} in the worst ({text(storage['leaf'])}). The exported one scores, "
        f"on test examples: {', '.join(scores)}"
    )


def made_section(run: Run, results: Json) -> str:
    """How the result was made."""
    devices = results["devices"]
    processes = "1 process" if devices["processes"] == 1 else f"{devices['processes']:,} processes"
    front = (
        f"{len(results['pareto'])} candidates, hypervolume {results['hypervolume']:.4f} above "
        f"{markup.listed(results['hypervolume_reference'], '.4g')}"
    )
    said = {
        "Command": f"<code>{text(results['command'])}</code>",
        "Devices": (
            f"{devices['count']:,} &times; {text(devices['kind'])} "
            f"({text(devices['platform'])}), {processes}"
        ),
        "Versions": markup.listed(results["versions"]),
        "Pareto front": front,
    }
    return markup.section("How it was made", markup.facts(said), pool_and_config(run))


def pool_and_config(run: Run) -> str:
    """The checkpoints and the whole config, folded away."""
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
        for checkpoint in run.pool
    ]
    header = ("checkpoint", "source", "format", "parameters", "dtype", "MiB", "fingerprint")
    config = text(json.dumps(run.config, indent=2, ensure_ascii=False))
    return markup.details("Pool", markup.table(header, rows)) + markup.details(
        "Config", f'<pre tabindex="0">{config}</pre>'
    )


def label(kind: str, entry: Json) -> str:
    """What a model is called in a table."""
    return "searched merge" if kind == "search" else text(entry["name"])


def _headings(run: Run, title: str) -> tuple[str, list[str]]:
    """A section's title and its columns, objective first; per cent signs where they belong."""
    names = ["objective", *run.objective.tasks]
    title, columns = formatting.headings(title, names, [run.formats[name] for name in names])
    return title, [text(column) for column in columns]


def _scores(run: Run, scores: Mapping[str, float], tops: Mapping[str, float]) -> list[str]:
    """A cell for each task; bold where the score is the top one."""
    return [
        markup.score(run.formats[task], scores[task], bold=scores[task] == top)
        for task, top in tops.items()
    ]


def _shares(heading: str, values: Mapping[str, int | float], spec: str) -> str:
    """A table of parts of a whole, with bars."""
    ends = [float(value) for value in values.values()]
    rows = [
        (text(name), markup.bar(end, ends, "share", f"{value:{spec}}"))
        for (name, value), end in zip(values.items(), ends)
    ]
    return markup.table((heading, ""), rows, css="bars shares")


def _duration(seconds: float) -> str:
    """In the unit that suits it; the seconds themselves stand in the table."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.1f} s"


def _p_said(value: float) -> str:
    said = markup.p_value(value)
    return f"<i>p</i>&nbsp;{said if said.startswith('&lt;') else f'=&nbsp;{said}'}"


def _said(form: Format, entry: Json) -> str:
    return markup.score(form, entry["test_objective"], unit=True)
