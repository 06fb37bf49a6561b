"""The model card of an exported merge: what was merged, with which weights, and how it scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_TOP = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- merge
- jaxmerge
---

# {title}

A linear combination of {count} checkpoints, made with jaxmerge: every parameter is
theta = sum_k alpha_k theta_k.

## Weights

| checkpoint | weight | source | fingerprint |
|---|---|---|---|
{weights}
"""

_SCORES = """
## Scores

In percent, on the test split, which the search never saw, with 95% bootstrap intervals.

| task | this merge | best single checkpoint ({single}) |
|---|---|---|
{scores}

Over the single checkpoint: {delta:+.1f} points [{low:+.1f}, {high:+.1f}].
"""

_COMMAND = """
## Command

```
{command}
```
"""


def of_weights(records: Sequence[Mapping[str, Any]], weights: Sequence[float], command: str) -> str:
    """The card of a merge with given weights.

    Args:
        records: of the checkpoints, as in pool.json.
        weights: alpha_k, in the same order.
        command: what made it; "" where it was made from Python.
    """
    rows = [
        f"| {record['name']} | {weight:.6g} | {_source(record)} | {record['fingerprint']} |"
        for record, weight in zip(records, weights)
    ]
    top = _TOP.format(title="A merged model", count=len(records), weights="\n".join(rows))
    return top + (_COMMAND.format(command=command) if command else "")


def of_search(records: Sequence[Mapping[str, Any]], findings: Mapping[str, Any]) -> str:
    """The card of a search's winner.

    Args:
        records: of the checkpoints, as in pool.json.
        findings: what results.json says.
    """
    best = findings["best"]
    single = max(findings["individuals"], key=lambda entry: entry["test_objective"])
    versus = best["vs"][single["name"]]
    rows = [
        _row(task, best["test"][task], best["ci95"][task], single["test"][task])
        for task in findings["tasks"]
    ]
    rows.append(
        _row("mean", best["test_objective"], best["ci95"]["objective"], single["test_objective"])
    )
    scores = _SCORES.format(
        single=single["name"],
        scores="\n".join(rows),
        delta=100 * versus["delta"],
        low=100 * versus["ci95"][0],
        high=100 * versus["ci95"][1],
    )
    head, command = of_weights(records, list(best["weights"].values()), ""), findings["command"]
    return head + scores + (_COMMAND.format(command=command) if command else "")


def _source(record: Mapping[str, Any]) -> str:
    """The last parts of the path: where a model lay on someone's disk is no one else's concern."""
    return "/".join(str(record["source"]).rstrip("/").split("/")[-2:])


def _row(name: str, score: float, ends: Sequence[float], single: float) -> str:
    low, high = ends
    return (
        f"| {name} | {100 * score:.1f} [{100 * low:.1f}, {100 * high:.1f}] | {100 * single:.1f} |"
    )
