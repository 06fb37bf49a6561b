"""The curve of the report: the best so far, over tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jaxmerge import report
from tests.report.fabricated import TASKS, fabricate
from tests.report.report_test import plotted


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    fabricate(tmp_path / "run")
    return tmp_path / "run"


def test_each_way_of_searching_has_its_curve_over_tokens(directory: Path) -> None:
    """The best so far of what was scored in full, where it rises, and where it ends."""
    log = directory / "candidates.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    searched = [line for line in lines if line["origin"] == "search"]
    for line in searched[::9]:  # asking for a generation takes tokens too
        line["tokens"]["differentiated"] = 1000
    searched[100]["scores"] = dict.fromkeys(TASKS, 0.99)  # an estimate
    searched[100] |= {"out_of": dict.fromkeys(TASKS, 800)}
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = report.write(directory).read_text()
    data = plotted(source)
    assert '<select id="over">' in source
    ways = {way["name"]: way for way in data["curves"]["ways"]}
    assert list(ways) == ["uniform", "random", "search"]
    (uniform,) = [line for line in lines if line["origin"] == "baseline:uniform"]
    assert ways["uniform"]["tokens"] == [sum(uniform["tokens"].values())]
    took = np.cumsum(
        [
            sum(line["tokens"].values()) + 2 * line["tokens"].get("differentiated", 0)
            for line in searched
        ]
    )
    assert data["curves"]["search"]["tokens"] == took[8::9].tolist()
    del searched[100]
    value = 100 * np.array([np.mean(list(line["scores"].values())) for line in searched])
    best, took = np.maximum.accumulate(value), np.delete(took, 100)
    drawn = ways["search"]
    for tokens, so_far in zip(drawn["tokens"], drawn["best"], strict=True):
        assert so_far == pytest.approx(best[np.searchsorted(took, tokens)], abs=1e-5)
    assert drawn["tokens"][-1] == took[-1]
    assert len(set(drawn["best"])) == len(set(best))


def test_a_log_without_tokens_is_drawn_over_evaluations(directory: Path) -> None:
    log = directory / "candidates.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps({**line, "tokens": None}) + "\n" for line in lines))
    source = report.write(directory).read_text()
    assert plotted(source)["curves"]["ways"] == []
    assert 'id="over"' not in source
