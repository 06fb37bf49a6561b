"""The report of a fabricated run, read as text."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from jaxmerge import report
from jaxmerge.errors import JaxmergeError
from tests.fabricated import CHECKPOINTS, HOSTILE, HOSTILE_IMAGE, TASKS, Page, fabricate

ROOT = Path(__file__).parent.parent
SCHEMA = json.loads((ROOT / "jaxmerge/results.schema.json").read_text())


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    fabricate(tmp_path / "run", gain=0.05)
    return tmp_path / "run"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_fabricated_results_obey_the_schema_and_strays_do_not(directory: Path) -> None:
    results = json.loads((directory / "results.json").read_text())
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    validator = jsonschema.Draft202012Validator(SCHEMA)
    validator.validate(results)
    missing = {key: value for key, value in results.items() if key != "pareto"}
    best = results["best"]
    for wrong in (
        missing,
        {**results, "stray": 1},
        {**results, "version": 3},
        {**results, "objective": {**results["objective"], "aggregate": "median"}},
        {**results, "bounds": {"arithmetic": [0.0]}},
        {**results, "individuals": []},
        {**results, "best": {**best, "stray": 1}},
        {**results, "best": {**best, "name": "other"}},
        {**results, "best": {key: value for key, value in best.items() if key != "vs"}},
        {**results, "baselines": [best]},  # vs is the winner's alone
        {**results, "best": {**best, "ci95": {**best["ci95"], "objective": [0.1]}}},
        {**results, "best": {**best, "ci95": {**best["ci95"], "objective": [0.1, 0.2, 0.3]}}},
        {**results, "best": {**best, "test_objective": "high"}},
    ):
        assert not validator.is_valid(wrong)


def test_every_number_of_the_headline_is_that_of_results(directory: Path) -> None:
    page = report.write(directory).read_text()
    results = json.loads((directory / "results.json").read_text())
    best = results["best"]
    single = max(results["individuals"], key=lambda entry: entry["test_objective"])
    versus = best["vs"][single["name"]]
    lead = page[page.index('<p class="lead">') : page.index("</p>", page.index('class="lead"'))]
    for number in (
        best["test_objective"],
        *best["ci95"]["objective"],
        single["test_objective"],
        *single["ci95"]["objective"],
        *versus["ci95"],
    ):
        assert f"{number:.3f}".replace("-", "&minus;") in lead
    assert f"{versus['delta']:+.3f}" in lead
    assert versus["ci95"][0] > 0
    assert "<h1>The searched merge beats the best single checkpoint</h1>" in page


@pytest.mark.parametrize(
    ("ends", "title"),
    [([0.01, 0.02], "beats"), ([-0.01, 0.02], "not clearly different"), ([-0.02, -0.01], "worse")],
)
def test_the_title_follows_the_interval(directory: Path, ends: list[float], title: str) -> None:
    results = json.loads((directory / "results.json").read_text())
    for versus in results["best"]["vs"].values():
        versus["ci95"] = ends
    edit(directory / "results.json", best=results["best"])
    assert title in Page(report.write(directory).read_text()).text["h1"][0]


def test_names_stay_text(directory: Path) -> None:
    source = report.write(directory).read_text()
    page = Page(source)
    assert page.elements.count("script") == 3  # data, plotly, ours
    assert "img" not in page.elements
    assert not [name for name in page.attributes if name.startswith("on")]
    assert HOSTILE in page.text["th"]
    assert HOSTILE_IMAGE in page.text["th"]
    assert HOSTILE not in source
    # Plotly's own markup: what it shows as a name must be escaped once more.
    data = json.loads(next(text for text in page.text["script"] if text.startswith("{")))
    assert data["checkpoints"][4] == HOSTILE.replace("<", "&lt;").replace(">", "&gt;")
    assert data["choices"][2] == "programs &amp; &lt;b&gt;tests&lt;/b&gt;"


def test_warnings_and_the_aggregate_are_said(directory: Path) -> None:
    page = Page(report.write(directory).read_text())
    assert page.text["li"] == [f"{TASKS[2]}: judged by a program; {HOSTILE}"]
    assert "mean of the tasks" in "".join(page.text["b"] + page.text[""])
    edit(directory / "results.json", warnings=[])
    assert "li" not in Page(report.write(directory).read_text()).elements


def test_a_relative_aggregate_is_drawn_as_plain_numbers(tmp_path: Path) -> None:
    """Objectives are those of the scores, bars stay inside their track, and the pool is named."""
    directory = tmp_path / "run"
    fabricate(directory, aggregate="chebyshev")
    source = report.write(directory).read_text()
    page = Page(source)
    data = json.loads(next(text for text in page.text["script"] if text.startswith("{")))
    assert data["choices"][-1] == "objective: chebyshev"
    lines = [json.loads(line) for line in (directory / "candidates.jsonl").read_text().splitlines()]
    scores = {line["id"]: line["scores"] for line in lines}
    for point in data["points"][:20]:
        gains = [(scores[point["id"]][task] - 0.8) / 0.4 for task in TASKS]
        assert point["search"][-1] == pytest.approx(min(gains) + 0.05 * sum(gains))
    bars = [
        [float(number) for number in bar]
        for bar in re.findall(r"left:(-?[\d.]+)%;width:(-?[\d.]+)%", source)
    ]
    assert len(bars) == 2 * len(CHECKPOINTS) + 1
    assert all(left >= 0 and left + width < 100.02 for left, width in bars)
    assert "0.400 to 0.800" in source


def test_results_of_version_1_are_read(directory: Path, tmp_path: Path) -> None:
    """A page of a run from before there were aggregates differs in nothing but the warnings."""
    results = json.loads((directory / "results.json").read_text())
    edit(directory / "results.json", warnings=[])
    now = report.write(directory).read_text()
    weights = results.pop("objective")["weights"]
    for field in ("bounds", "warnings", "hypervolume_reference"):
        del results[field]
    (directory / "results.json").write_text(
        json.dumps({**results, "version": 1, "task_weights": weights})
    )
    assert report.write(directory).read_text() == now


def test_embedded_json_cannot_end_its_element() -> None:
    embedded = report._embedded_json({HOSTILE: [HOSTILE_IMAGE, "<!--", "&lt;"]})
    assert not set("<>&") & set(embedded)
    assert json.loads(embedded) == {HOSTILE: [HOSTILE_IMAGE, "<!--", "&lt;"]}


def test_tables(directory: Path) -> None:
    source = report.write(directory).read_text()
    results = json.loads((directory / "results.json").read_text())
    scores = source[source.index("<h2>Test scores") : source.index("<h2>Paired tests")]
    models = [results["best"], *results["baselines"], *results["individuals"]]
    for column in ("objective", *TASKS):
        best = max(
            model["test_objective"] if column == "objective" else model["test"][column]
            for model in models
        )
        assert f"<b>{best:.3f}</b>" in scores
    assert scores.count("<b>") == 1 + len(TASKS)  # this run has no ties
    assert scores.count("<tr>") == 1 + len(models)
    paired = source[source.index("<h2>Paired tests") : source.index("<h2>Held-out")]
    assert paired.count("<tr>") == len(models)
    heldout = source[source.index("<h2>Held-out") : source.index("<h2>How it was made")]
    assert "<b>0.625</b>" in heldout
    assert heldout.count("<b>0.750</b>") == 3  # a tie


def test_no_held_out_section_without_held_out_tasks(tmp_path: Path) -> None:
    fabricate(tmp_path / "run", heldout=False)
    assert "Held-out" not in report.write(tmp_path / "run").read_text()


def test_same_files_give_the_same_bytes_and_nothing_else_is_left(directory: Path) -> None:
    first = report.write(directory).read_bytes()
    assert report.write(directory).read_bytes() == first
    assert sorted(path.name for path in directory.iterdir()) == [
        "candidates.jsonl",
        "config.json",
        "pool.json",
        "report.html",
        "results.json",
    ]


def test_a_failed_write_keeps_the_old_report(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (directory / "report.html").write_text("old")

    def full(_: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(JaxmergeError, match="No space left"):
        report.write(directory)
    assert (directory / "report.html").read_text() == "old"
    assert not list(directory.glob(".report*"))


@pytest.mark.parametrize("name", ["config.json", "pool.json", "candidates.jsonl", "results.json"])
def test_a_missing_or_truncated_file_is_named(directory: Path, name: str) -> None:
    path = directory / name
    path.write_text(path.read_text()[:-20])
    with pytest.raises(JaxmergeError, match=name.replace(".", r"\.")):
        report.write(directory)
    path.unlink()
    with pytest.raises(JaxmergeError, match=f"{name}: no such file"):
        report.write(directory)
    assert not (directory / "report.html").exists()


def test_wrong_contents_are_named(directory: Path) -> None:
    results = directory / "results.json"
    original = results.read_text()
    edit(results, version=3)
    with pytest.raises(JaxmergeError, match="version"):
        report.write(directory)
    results.write_text(original)
    edit(results, best={**json.loads(original)["best"], "vs": {}})
    with pytest.raises(JaxmergeError, match=r"best\.vs.*\n.*uniform"):
        report.write(directory)
    results.write_text(original.replace("0.4321", "NaN"))
    with pytest.raises(JaxmergeError, match="NaN"):
        report.write(directory)


def command(directory: Path) -> subprocess.CompletedProcess[str]:
    """`python -m jaxmerge.report`, in a Python that has no jax."""
    program = (
        "import runpy, sys; sys.modules['jax'] = None; "
        "runpy.run_module('jaxmerge.report', run_name='__main__', alter_sys=True)"
    )
    return subprocess.run(
        [sys.executable, "-c", program, str(directory)], cwd=ROOT, capture_output=True, text=True
    )


def test_command_line_without_jax(directory: Path) -> None:
    done = command(directory)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == str(directory / "report.html")
    (directory / "pool.json").unlink()
    failed = command(directory)
    assert failed.returncode == 2
    assert "pool.json: no such file" in failed.stderr
    assert "Traceback" not in failed.stderr
