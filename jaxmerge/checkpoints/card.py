"""The model card of an exported merge: what was merged, with which weights, and how it scored."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmerge.scores import formatting
from jaxmerge.scores.formatting import Format
from jaxmerge.scores.objective import AGGREGATES

_TOP = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- merge
- jaxmerge
---

# {title}

{made}

## Weights

| checkpoint | weight | source | fingerprint |
|---|---|---|---|
{weights}
"""

_LINEAR = """A linear combination of {count} checkpoints, made with jaxmerge: every parameter is
theta = sum_k alpha_k theta_k."""

_TOP_OF_YAML = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- merge
- mergekit
- jaxmerge
---

# A merged model

A merge of {count} checkpoints by {methods}, made with jaxmerge from a YAML in the form of mergekit.

## Checkpoints

| checkpoint | source | fingerprint of what was read |
|---|---|---|
{rows}

## Configuration

{fence}yaml
{text}
{fence}
"""

_GROUPS = """
Each of {count} groups of leaves has weights of its own; these are their means.
"""

_SCORES = """
## Scores

On the test split, which the search never saw, with 95% bootstrap intervals. What was maximised is
`{aggregate}`: {phrase}.

| {title} | this merge | best single checkpoint ({single}) |
|---|---|---|
{scores}

Over the single checkpoint: {delta}{points} {interval}.
"""

_WARNINGS = """
## Warnings

{warnings}
"""

_ADAPTER = """
## Adapter

This is {said}.
"""

_COMMAND = """
## Command

```
{command}
```
"""


def of_weights(
    records: Sequence[Mapping[str, Any]],
    weights: Sequence[float],
    command: str,
    groups: int = 1,
    window: str = "",
) -> str:
    """The card of a merge with given weights.

    Args:
        records: of the checkpoints, as in pool.json.
        weights: alpha_k, in the same order.
        command: what made it; "" where it was made from Python.
        groups: G; of several, the weights are their means.
        window: a sentence on the steps of a run and their schedule; "": they are none.
    """
    said = [f"{weight:.6g}" for weight in weights]
    made = _LINEAR.format(count=len(records))
    made += _GROUPS.format(count=groups).rstrip() if groups > 1 else ""
    made += f"\n\n{window}" if window else ""
    return _of(records, said, made, command)


def of_adapter(card: str, base: str, said: str) -> str:
    """The card of a merge that is written as an adapter.

    Args:
        card: of the merge.
        base: of the adapters, as they name it.
        said: the rank, and how far from the merge it is.
    """
    head = f"library_name: peft\nbase_model: {json.dumps(base)}"
    return card.replace("library_name: transformers", head, 1) + _ADAPTER.format(said=said)


def of_method(
    records: Sequence[Mapping[str, Any]], said: Sequence[str], method: str, command: str
) -> str:
    """The card of a merge by another method.

    Args:
        records: of the checkpoints, and of the base where there is one, as in pool.json.
        said: what stands for the weight of each.
        method: its name and its numbers.
        command: see `of_weights`.
    """
    return _of(
        records, said, f"A merge of {len(records)} checkpoints with jaxmerge, {method}.", command
    )


def _of(records: Sequence[Mapping[str, Any]], said: Sequence[str], made: str, command: str) -> str:
    rows = [
        f"| {record['name']} | {weight} | {_source(record)} | {record['fingerprint']} |"
        for record, weight in zip(records, said)
    ]
    top = _TOP.format(title="A merged model", made=made, weights="\n".join(rows))
    return top + (_COMMAND.format(command=command) if command else "")


def of_yaml(
    records: Sequence[Mapping[str, Any]],
    methods: Sequence[str],
    text: str,
    warnings: Sequence[str],
    command: str,
) -> str:
    """The card of a merge that mergekit's YAML asks for.

    Args:
        records: of the checkpoints, as in pool.json.
        methods: of the merge, by name.
        text: the YAML.
        warnings: what should be known of the merge.
        command: what made it; "" where it was made from Python.
    """
    rows = [f"| {each['name']} | {_source(each)} | {each['fingerprint']} |" for each in records]
    fence = "````" if "```" in text else "```"
    parts = [
        _TOP_OF_YAML.format(
            count=len(records),
            methods=" and ".join(methods),
            rows="\n".join(rows),
            fence=fence,
            text=text.strip("\n"),
        )
    ]
    if warnings:
        parts.append(_WARNINGS.format(warnings="\n".join(f"- {each}" for each in warnings)))
    if command:
        parts.append(_COMMAND.format(command=command))
    return "".join(parts)


def of_search(records: Sequence[Mapping[str, Any]], findings: Mapping[str, Any]) -> str:
    """The card of a search's winner.

    Args:
        records: of the checkpoints, as in pool.json.
        findings: what results.json says.
    """
    best, method = findings["best"], findings.get("method")
    weights = list(best["weights"].values())
    if method and "genes" in best:
        said = [f"{weight:.6g}" if method["weighted"] else "-" for weight in weights]
        said += ["base"] * (len(records) - len(weights))
        parts = [of_method(records, said, by_method(method, best["genes"]), "")]
    else:
        said = formatting.window(best["window"], len(weights)) if "window" in best else ""
        window = f"These are steps of one run, merged with {said}." if said else ""
        parts = [of_weights(records[: len(weights)], weights, "", window=window)]
    if "groups" in findings["best"]:
        parts.append(_GROUPS.format(count=len(findings["groups"])))
    parts.append(_scores(findings))
    if findings["warnings"]:
        warnings = "\n".join(f"- {warning}" for warning in findings["warnings"])
        parts.append(_WARNINGS.format(warnings=warnings))
    if findings["command"]:
        parts.append(_COMMAND.format(command=findings["command"]))
    return "".join(parts)


def by_method(method: Mapping[str, Any], genes: Mapping[str, Any]) -> str:
    """A method and its numbers in words; of numbers by group their mean.

    Args:
        method: see results.json.
        genes: of a candidate.
    """
    means = {
        name: sum(gene) / len(gene) if isinstance(gene, list | tuple) else gene
        for name, gene in genes.items()
    }
    said = [f"{name} {gene:.4g}" for name, gene in means.items()]
    said += [f"{name} {gene}" for name, gene in method["fixed"].items()]
    variant = ", in mergekit's variant" if method["variant"] == "mergekit" else ""
    numbers = f", with {', '.join(said)}" if said else ""
    return f"by `{method['name']}` ({method['paper']}){variant}{numbers}"


def _scores(findings: Mapping[str, Any]) -> str:
    """The winner beside the single checkpoint that is best on test."""
    best, aggregate = findings["best"], findings["objective"]["aggregate"]
    single = max(findings["individuals"], key=lambda entry: entry["test_objective"])
    versus = best["vs"][single["name"]]
    formats = formatting.of_results(findings)
    form = formats["objective"]
    tasks = findings["tasks"]
    title, names = formatting.headings(
        "task", [*tasks, aggregate], [*(formats[task] for task in tasks), form]
    )
    rows = [
        _row(name, formats[task], best["test"][task], best["ci95"][task], single["test"][task])
        for name, task in zip(names, tasks)
    ]
    objectives = best["test_objective"], best["ci95"]["objective"], single["test_objective"]
    return _SCORES.format(
        aggregate=aggregate,
        phrase=AGGREGATES[aggregate].phrase,
        title=title,
        single=single["name"],
        scores="\n".join([*rows, _row(names[-1], form, *objectives)]),
        delta=form.difference(versus["delta"]),
        points=form.points,
        interval=form.differences(versus["ci95"]),
    )


def _source(record: Mapping[str, Any]) -> str:
    """The last parts of the path: where a model lay on someone's disk is no one else's concern."""
    return "/".join(str(record["source"]).rstrip("/").split("/")[-2:])


def _row(name: str, form: Format, score: float, ends: Sequence[float], single: float) -> str:
    return f"| {name} | {form.score(score)} {form.interval(ends)} | {form.score(single)} |"
