"""The report of a fabricated run, read as text."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from jaxmerge import report
from jaxmerge.errors import JaxmergeError
from jaxmerge.report import page as pages
from tests.report.fabricated import (
    CHECKPOINTS,
    HOSTILE,
    HOSTILE_IMAGE,
    TASKS,
    Page,
    add_analyses,
    fabricate,
)

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "jaxmerge/report/results.schema.json").read_text())


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    fabricate(tmp_path / "run", gain=0.05)
    return tmp_path / "run"


def plotted(source: str) -> Any:
    """What the page's plots are drawn from."""
    return json.loads(next(text for text in Page(source).text["script"] if text.startswith("{")))


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
    ):
        assert f"{100 * number:.1f}" in lead
    rival = max(results["baselines"], key=lambda entry: entry["test_objective"])
    against = best["vs"][rival["name"]]
    for number in (versus["delta"], *versus["ci95"], against["delta"], *against["ci95"]):
        assert f"{100 * number:+.1f}" in lead
    assert f"<strong>{rival['name']}</strong> with {100 * rival['test_objective']:.1f}%" in lead
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
    data = plotted(source)
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
    data = plotted(source)
    assert data["choices"][-1] == "objective (chebyshev)"
    lines = [json.loads(line) for line in (directory / "candidates.jsonl").read_text().splitlines()]
    scores = {line["id"]: line["scores"] for line in lines}
    for point in data["points"][:20]:
        gains = [(scores[point["id"]][task] - 0.8) / 0.4 for task in TASKS]
        assert point["search"][-1] == pytest.approx(min(gains) + 0.05 * sum(gains), abs=1e-5)
        assert point["search"][0] == pytest.approx(100 * scores[point["id"]][TASKS[0]], abs=1e-5)
    assert data["units"] == ["%", "%", "%", ""]
    bars = [
        [float(number) for number in bar]
        for bar in re.findall(
            r"left:(-?[\d.]+)%;width:(-?[\d.]+)%", section(source, "What went into the merge")
        )
    ]
    assert len(bars) == 2 * len(CHECKPOINTS) + 1
    assert all(left >= 0 and left + width < 100.02 for left, width in bars)
    assert "40.0 to 80.0%" in source


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
    embedded = pages.embedded({HOSTILE: [HOSTILE_IMAGE, "<!--", "&lt;"]})
    assert not set("<>&") & set(embedded)
    assert json.loads(embedded) == {HOSTILE: [HOSTILE_IMAGE, "<!--", "&lt;"]}


def section(source: str, title: str) -> str:
    """The markup of a section, by the beginning of its title."""
    start = source.index(f"<h2>{title}")
    return source[start : source.index("</section>", start)]


def test_tables(directory: Path) -> None:
    source = report.write(directory).read_text()
    results = json.loads((directory / "results.json").read_text())
    scores = section(source, "Test scores, %")
    models = [results["best"], *results["baselines"], *results["individuals"]]
    for column in ("objective", *TASKS):
        best = max(
            model["test_objective"] if column == "objective" else model["test"][column]
            for model in models
        )
        assert f"<b>{100 * best:.1f}</b>" in scores
    assert scores.count("<b>") == 1 + len(TASKS)  # this run has no ties
    assert scores.count("<tr>") == 1 + len(models)
    paired = section(source, "Paired tests")
    assert paired.count("<tr>") == paired.count('class="whisker"') + 1 == len(models)
    heldout = section(source, "Held-out tasks, %")
    assert "<b>62.5</b>" in heldout
    assert heldout.count("<b>75.0</b>") == 3  # a tie
    weights = section(source, "What went into the merge, %")
    for entry in results["individuals"]:
        assert f"{100 * entry['test_objective']:.1f}" in weights
        assert f"{results['best']['weights'][entry['name']]:.3f}".replace("-", "&minus;") in weights
    for task in TASKS:
        assert f"<b>{100 * max(e['test'][task] for e in results['individuals']):.1f}</b>" in weights


def test_the_curve_has_the_spread_of_each_generation(directory: Path) -> None:
    data = plotted(report.write(directory).read_text())
    lines = [json.loads(line) for line in (directory / "candidates.jsonl").read_text().splitlines()]
    searched = [line for line in lines if line["origin"] == "search"]
    objective = 100 * np.array([np.mean(list(line["scores"].values())) for line in searched])
    curve = data["curves"]["search"]
    assert curve["at"] == list(range(9, 181, 9))
    np.testing.assert_allclose(curve["best"], np.maximum.accumulate(objective), atol=1e-5)
    for key, q in (("low", 0.1), ("median", 0.5), ("high", 0.9)):
        expected = np.quantile(objective.reshape(20, 9), q, axis=1)
        np.testing.assert_allclose(curve[key], expected, atol=1e-5)


def test_cost_says_evaluations_tokens_and_seconds(directory: Path) -> None:
    cost = section(report.write(directory).read_text(), "Cost")
    assert "367 of merged models" in cost
    assert "44.8 s" in cost  # 1.25 + 40.5 + 3
    assert "Tokens" not in cost
    for seconds, said in ((119.0, "119.0 s"), (600.0, "10.0 min"), (90_000.0, "25.0 h")):
        edit(directory / "results.json", seconds={"search": seconds})
        assert f"<dd>{said}</dd>" in section(report.write(directory).read_text(), "Cost")
    assert "residency" not in cost
    moved = {"kind": "disk", "bytes_read": 3 * 2**30, "seconds": 12.0}
    edit(directory / "results.json", residency=moved)
    cost = section(report.write(directory).read_text(), "Cost")
    assert "residency disk: 3.0 GiB read and merged in 12.0 s" in cost
    add_analyses(directory)
    cost = section(report.write(directory).read_text(), "Cost")
    assert "12,345,678 read, 234,567 written" in cost
    assert "and 63 for the analyses" in cost


def test_command_config_versions_and_devices_are_there(directory: Path) -> None:
    made = section(report.write(directory).read_text(), "How it was made")
    assert "--config=configs/x.py --workdir=runs/&lt;x&gt;" in made
    assert "jaxmerge&nbsp;0.1.0" in made
    assert "1 &times; cpu (cpu), 1 process" in made
    page = Page(made)
    assert json.loads(page.text["pre"][0]) == json.loads((directory / "config.json").read_text())
    assert "open" not in page.attributes


def test_analyses(directory: Path) -> None:
    before = report.write(directory).read_text()
    add_analyses(directory)
    source = report.write(directory).read_text()
    results = json.loads((directory / "results.json").read_text())
    for title in ("Weight against score", "Leave one out", "Pool size", "Transfer"):
        assert f"<h2>{title}" not in before
    assert "3 of 6 checkpoints (50%)" in section(source, "Weight against score")
    assert "&minus;0.600, p 0.208" in section(source, "Weight against score")
    left_out = section(source, "Leave one out")
    dropped = [Page(cell).text["th"] for cell in left_out.split("<tr>")[2:]]
    assert dropped[0] == ["code"]  # the most missed
    assert left_out.count("the merge needs it") == 3
    assert left_out.count("the merge is better without") == 1
    assert "&minus;20.0" in left_out
    transfer = section(source, "Transfer, %")
    assert transfer.count('class="on"') == 2 * 3 + len(TASKS)
    assert f"{100 * results['best']['test'][TASKS[0]]:.1f}" in transfer
    data = plotted(source)["analyses"]
    assert [point["m"] for point in data["sizes"]] == [2, 4, 6]
    assert [point["weight"] for point in data["weights"]] == [
        round(weight, 4) for weight in results["best"]["weights"].values()
    ]


def test_candidates_of_analyses_are_none_of_the_search(directory: Path) -> None:
    before = plotted(report.write(directory).read_text())
    add_analyses(directory)
    after = plotted(report.write(directory).read_text())
    assert after["points"] == before["points"]
    assert after["curves"] == before["curves"]


def test_each_analysis_can_be_absent(directory: Path) -> None:
    add_analyses(directory)
    analyses = json.loads((directory / "results.json").read_text())["analyses"]
    titles = {
        "weight_vs_score": "Weight against score",
        "nonzero": "Weight against score",
        "leave_one_out": "Leave one out",
        "pool_size": "Pool size",
        "transfer": "Transfer",
    }
    for name, title in titles.items():
        alone = {"evaluations": analyses["evaluations"], name: analyses[name]}
        edit(directory / "results.json", analyses=alone)
        page = report.write(directory).read_text()
        assert [said for said in dict.fromkeys(titles.values()) if f"<h2>{said}" in page] == [title]
    undefined = {"weight_vs_score": {"spearman": None, "p": None}}
    edit(directory / "results.json", analyses={**undefined, "leave_one_out": []})
    page = report.write(directory).read_text()
    assert "is not defined here" in page
    assert "<h2>Leave one out" not in page


def test_no_held_out_section_without_held_out_tasks(tmp_path: Path) -> None:
    fabricate(tmp_path / "run", heldout=False)
    assert "Held-out" not in report.write(tmp_path / "run").read_text()


@pytest.mark.parametrize(("share", "noted"), [(1.0, "100%"), (0.51, "51%"), (0.5, ""), (0.0, "")])
def test_what_a_checkpoint_always_answers_is_noted(directory: Path, share: float, noted: str):
    """More than half the time: the sentence is there, and the text as it was written."""
    first = [{"prompt": "a\nb", "target": "4", "output": "", "score": 0.0}]
    sample = {"first": first, "constant": HOSTILE, "share": share}
    said = {"warnings": [], "checkpoints": {CHECKPOINTS[0]: {TASKS[0]: sample}}}
    (directory / "outputs.json").write_text(json.dumps(said))
    source = report.write(directory).read_text()
    assert "What the checkpoints answered" in source
    for shown in ("<code>a\nb</code>", "<code>4</code>", '<i class="note">empty</i>'):
        assert shown in source
    assert (f"{noted} of its answers to {TASKS[0]} are <code>" in source) == bool(noted)
    assert ("of its answers to" in source) == bool(noted)
    assert HOSTILE not in source


@pytest.mark.parametrize(
    "sample",
    [3, {}, {"first": [{}], "constant": "", "share": 0}, {"first": 0, "share": "", "constant": 0}],
)
def test_answers_of_another_kind_are_refused(directory: Path, sample: Any) -> None:
    said = {"warnings": [], "checkpoints": {CHECKPOINTS[0]: {TASKS[0]: sample}}}
    (directory / "outputs.json").write_text(json.dumps(said))
    with pytest.raises(JaxmergeError, match=re.escape(str(directory))):
        report.write(directory)


def test_same_files_give_the_same_bytes_and_nothing_else_is_left(directory: Path) -> None:
    first = report.write(directory).read_bytes()
    assert report.write(directory).read_bytes() == first
    assert sorted(path.name for path in directory.iterdir()) == [
        "candidates.jsonl",
        "config.json",
        "examples",
        "pool.json",
        "report.html",
        "results.json",
        "tasks.json",
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


@pytest.mark.parametrize("name", ["config.json", "pool.json", "candidates.jsonl"])
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
