"""The page of a run that goes on, or was stopped."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

from jaxmerge import report
from jaxmerge.errors import JaxmergeError
from tests.report.fabricated import CHECKPOINTS, TASKS, Page, fabricate, interrupt
from tests.report.report_test import edit, plotted, section

BEFORE_SEARCH = len(CHECKPOINTS) + 1 + 180  # checkpoints, uniform, random


def interrupted(path: Path, lines: int, aggregate: str = "mean") -> Path:
    fabricate(path, aggregate=aggregate)
    interrupt(path, lines)
    return path


def objectives(directory: Path, origin: str) -> list[float]:
    """Mean scores of the candidates of an origin; the torn line is left out."""
    lines = (directory / "candidates.jsonl").read_text().split("\n")[:-1]
    found = [json.loads(line) for line in lines]
    return [fmean(one["scores"].values()) for one in found if one["origin"] == origin]


def test_it_says_how_far_it_is_and_what_is_best(tmp_path: Path) -> None:
    directory = interrupted(tmp_path / "run", BEFORE_SEARCH + 31)
    path = report.write(directory)
    assert path == directory / "report.html"
    source = path.read_text()
    page = Page(source)
    assert page.text["h1"] == ["This run is not finished"]
    assert page.text["title"][0].startswith("jaxmerge: This run is not finished")
    lead = source[source.index('<p class="lead">') : source.index("Written ")]
    assert "Generation <strong>4</strong> of the search, 31 of at most 180 evaluations" in lead
    best, single = (max(objectives(directory, origin)) for origin in ("search", "individual"))
    assert f"<strong>{100 * best:.1f}%</strong>" in lead
    assert f"{100 * single:.1f}%" in lead
    assert f"<td>{100 * best:.1f}</td>" in section(source, "Search scores so far, %")
    assert "search split" in lead
    assert re.search(r"Written \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", source)
    assert "All scores are search scores" in source
    assert "31 of 180" in section(source, "Progress")
    assert "6 of 6" in section(source, "Progress")
    for absent in ("Paired tests", "Test scores", "Held-out", "Cost"):
        assert f"<h2>{absent}" not in source
    # Plain numbers as long as nothing says that they are shares.
    (directory / "tasks.json").unlink()
    assert f"<strong>{best:.3f}</strong>" in report.write(directory).read_text()


def test_what_there_is_is_drawn(tmp_path: Path) -> None:
    directory = interrupted(tmp_path / "run", BEFORE_SEARCH + 31)
    data = plotted(report.write(directory).read_text())
    kinds = [model["kind"] for model in data["models"]]
    assert kinds == ["search", "baseline", "baseline", *["individual"] * len(CHECKPOINTS)]
    assert not any("test" in model for model in data["models"])
    assert len(data["models"]) + len(data["points"]) == BEFORE_SEARCH + 31
    best = 100 * np.maximum.accumulate(objectives(directory, "search"))
    np.testing.assert_allclose(data["curves"]["search"]["best"], best, atol=1e-5)
    assert data["curves"]["search"]["at"] == [9, 18, 27, 31]
    lines = (directory / "candidates.jsonl").read_text().split("\n")[:-1]
    scores = np.array([list(json.loads(line)["scores"].values()) for line in lines])
    front = [
        p
        for p, row in enumerate(scores)
        if not ((scores >= row).all(1) & (scores > row).any(1)).any()
    ]
    assert data["pareto"] == front


@pytest.mark.parametrize("lines", [0, 1, len(CHECKPOINTS), BEFORE_SEARCH, BEFORE_SEARCH + 1])
@pytest.mark.parametrize("aggregate", ["mean", "chebyshev"])
def test_every_stage_has_a_page(tmp_path: Path, lines: int, aggregate: str) -> None:
    directory = interrupted(tmp_path / "run", lines, aggregate)
    source = report.write(directory).read_text()
    assert ("The search has not begun" in source) == (lines <= BEFORE_SEARCH)
    assert ('id="tradeoff"' in source) == (lines > 0)
    assert len(plotted(source)["models"]) + len(plotted(source)["points"]) == lines


def test_weights_may_be_whole_numbers(tmp_path: Path) -> None:
    directory = interrupted(tmp_path / "run", BEFORE_SEARCH + 3)
    config = json.loads((directory / "config.json").read_text())
    config["objective"] |= {"weights": [1] * len(TASKS), "aggregate": "weighted"}
    (directory / "config.json").write_text(json.dumps(config))
    assert report.write(directory).exists()


def test_a_log_that_was_not_begun(tmp_path: Path) -> None:
    directory = interrupted(tmp_path / "run", 5)
    (directory / "candidates.jsonl").write_text("")
    assert "not yet" in section(report.write(directory).read_text(), "Progress")


def test_analyses_and_tests_are_counted_apart(tmp_path: Path) -> None:
    directory = interrupted(tmp_path / "run", BEFORE_SEARCH + 180)
    before = plotted(report.write(directory).read_text())
    log = directory / "candidates.jsonl"
    whole = log.read_text().split("\n")[:-1]
    last = json.loads(whole[-1])
    more = [
        {**last, "id": len(whole), "origin": "final", "split": "test"},
        {**last, "id": len(whole) + 1, "origin": "analysis:pool-size"},
        {**last, "id": len(whole) + 2, "origin": "final", "split": "heldout", "scores": {}},
    ]
    log.write_text("\n".join([*whole, *map(json.dumps, more), ""]))
    source = report.write(directory).read_text()
    assert plotted(source) == before
    progress = section(source, "Progress")
    assert '<th scope="row">final test</th><td>1</td>' in progress
    assert '<th scope="row">analyses</th><td>1</td>' in progress


def test_what_is_broken_is_named(tmp_path: Path) -> None:
    directory = interrupted(tmp_path / "run", 20)
    log = directory / "candidates.jsonl"
    text = log.read_text()
    log.write_text(text.replace("\n", "\n{\n", 1))
    with pytest.raises(JaxmergeError, match=r"candidates\.jsonl, line 2: not valid JSON"):
        report.write(directory)
    log.write_text(text.replace(TASKS[0], "other", 1))
    with pytest.raises(JaxmergeError, match=r"line 1: missing fields"):
        report.write(directory)
    log.write_text(text)
    edit(directory / "config.json", objective={"weights": []})
    with pytest.raises(JaxmergeError, match=r"config\.json: missing fields"):
        report.write(directory)


def test_names_stay_text(tmp_path: Path) -> None:
    page = Page(report.write(interrupted(tmp_path / "run", BEFORE_SEARCH + 9)).read_text())
    assert page.elements.count("script") == 3
    assert "img" not in page.elements
    assert not [name for name in page.attributes if name.startswith("on")]
