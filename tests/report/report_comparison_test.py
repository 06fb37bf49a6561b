"""The page that compares runs, read as text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxmerge import report
from jaxmerge.errors import JaxmergeError
from jaxmerge.scores import stats
from jaxmerge.scores.objective import define
from tests.report.fabricated import HOSTILE, TASKS, N, Page, add_analyses, fabricate, interrupt
from tests.report.report_test import edit, plotted, section


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two finished runs, which differ in seed and budget, and one that is not finished."""
    paths = [tmp_path / name for name in ("a", "b", "c")]
    fabricate(paths[0], gain=0.05)
    fabricate(paths[1], seed=1, budget=90)
    fabricate(paths[2], seed=2)
    interrupt(paths[2], 200)
    add_analyses(paths[1])
    report.write(paths[0])
    return paths


def compared(runs: list[Path]) -> str:
    out = runs[0].parent / "comparison.html"
    assert report.compare(runs, out) == out
    return out.read_text()


def test_each_run_has_its_numbers(runs: list[Path]) -> None:
    source = compared(runs)
    _, first, second, third = (
        section(source, "Runs").split("<tr>")[0:1] + section(source, "Runs").split("<tr>")[2:]
    )
    for row, path in ((first, runs[0]), (second, runs[1])):
        results = json.loads((path / "results.json").read_text())
        best = results["best"]
        for number in (best["test_objective"], *best["ci95"]["objective"]):
            assert f"{100 * number:.1f}" in row
        assert f"{results['evaluations']:,}" in row
        assert "44.8" in row
    assert '<a href="a/report.html">a</a>' in first
    assert "href" not in second
    assert "12,580,245" in second  # tokens read and written
    assert "not finished" in third
    assert ">200<" in third
    scores = section(source, "Test scores, %")
    for task in TASKS:
        best = max(
            json.loads((path / "results.json").read_text())["best"]["test"][task]
            for path in runs[:2]
        )
        assert f"<b>{100 * best:.1f}</b>" in scores
    assert "c" in Page(section(source, "Configs")).text["th"]


def test_paired_tests_are_on_the_same_examples(runs: list[Path]) -> None:
    paired = section(compared(runs), "Paired tests")
    samples = [
        {
            task: np.fromfile(path / "examples" / "test" / f"{task}.f32", "<f4", count=N)
            for task in TASKS
        }
        for path in runs[:2]
    ]
    expected = stats.paired(samples[1], samples[0], define(TASKS))
    assert expected.delta < 0
    for number in (expected.delta, expected.low, expected.high):
        assert f"{100 * number:+.1f}".replace("-", "&minus;") in paired
    assert paired.count("<tr>") == 2  # of b against a; c has no test scores


def test_runs_on_other_examples_are_not_paired_and_it_is_said(runs: list[Path]) -> None:
    edit(runs[1] / "tasks.json", **{TASKS[0]: {"test": {"examples": N, "digest": "0c"}}})
    source = compared(runs)
    assert "<h2>Paired tests" not in source
    assert "not scored on the same examples" in "".join(Page(source).text["li"])


def test_objectives_that_differ_are_said(runs: list[Path]) -> None:
    shutil.rmtree(runs[1])
    fabricate(runs[1], aggregate="chebyshev")
    source = compared(runs)
    assert "do not maximise the same objective" in "".join(Page(source).text["li"])
    assert "none of them is the best of all" in source
    assert "<h2>Paired tests" not in source
    data = plotted(source)
    assert data["unit"] == ""
    assert 0.5 < data["curves"][0]["best"][-1] < 1  # a share among plain numbers


def test_only_fields_that_differ_are_shown(runs: list[Path]) -> None:
    configs = section(compared(runs), "Configs")
    assert "Of 11 fields these differ" in configs
    # Three runs and two fields: a run is a row.
    assert Page(configs).text["code"] == ["search.budget", "seed", *"180 0 90 1 180 2".split()]
    edit(runs[0] / "config.json", one=1, two={"deep": [2, None]})
    configs = section(compared(runs), "Configs")
    fields = [text for text in Page(configs).text["code"] if not text[0].isdigit()]
    assert fields == ["one", "search.budget", "seed", "two.deep", "[2, null]"]
    assert configs.count("&ndash;") == 4  # b and c have neither field
    same = [runs[0], runs[0].parent / "copy"]
    shutil.copytree(same[0], same[1])
    assert "the same in every field" in section(compared(same), "Configs")


def test_weights_and_curves(runs: list[Path]) -> None:
    source = compared(runs)
    weights = section(source, "Weights of the merges")
    for path in runs[:2]:
        for weight in json.loads((path / "results.json").read_text())["best"]["weights"].values():
            assert f"{weight:.3f}".replace("-", "&minus;") in weights
    data = plotted(source)
    assert [(curve["name"], len(curve["best"])) for curve in data["curves"]] == [
        ("a", 180),
        ("b", 90),
        ("c", 200 - 6 - 1 - 180),
    ]
    assert data["unit"] == "%"
    assert all(50 < curve["best"][-1] < 100 for curve in data["curves"])


def test_names_stay_text(runs: list[Path], tmp_path: Path) -> None:
    wild = tmp_path / HOSTILE.replace("/", "") / "a"
    shutil.copytree(runs[0], wild)
    source = compared([runs[0], wild])
    page = Page(source)
    assert page.elements.count("script") == 3
    assert not [name for name in page.attributes if name.startswith("on")]
    # Named by as many parts of the path as it takes.
    assert f"{HOSTILE.replace('/', '')}/a" in page.text["a"]
    assert HOSTILE.replace("/", "") not in source
    assert (
        plotted(source)["curves"][1]["name"]
        == "&lt;script&gt;&lt;script&gt;document.title='pwned'&lt;script&gt;/a"
    )


def test_unfinished_runs_alone(runs: list[Path]) -> None:
    interrupt(runs[0], 100)
    source = compared([runs[0], runs[2]])
    assert "None of these runs is finished" in source
    for absent in ("Test scores", "Paired tests", "Weights of the merges"):
        assert f"<h2>{absent}" not in source


def test_what_is_wrong_is_named(runs: list[Path]) -> None:
    out = runs[0].parent / "comparison.html"
    with pytest.raises(JaxmergeError, match="several directories, each once"):
        report.compare([runs[0], runs[0] / ".." / "a"], out)
    with pytest.raises(JaxmergeError, match="several directories"):
        report.compare(runs[:1], out)
    samples = runs[1] / "examples" / "test" / f"{TASKS[0]}.f32"
    samples.write_bytes(samples.read_bytes()[:-4])
    with pytest.raises(JaxmergeError, match=r"arithmetic\.f32: the winner's scores"):
        report.compare(runs, out)
    samples.unlink()
    with pytest.raises(JaxmergeError, match=r"arithmetic\.f32: cannot be read"):
        report.compare(runs, out)
    (runs[2] / "config.json").unlink()
    with pytest.raises(JaxmergeError, match=r"c/config\.json: no such file"):
        report.compare(runs, out)
    assert not out.exists()
