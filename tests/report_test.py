"""The report of a fabricated run, read as text and drawn by a real browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from jaxmerge import report, stats
from jaxmerge.errors import JaxmergeError
from jaxmerge.objective import Objective, Range, define

ROOT = Path(__file__).parent.parent
SCHEMA = json.loads((ROOT / "jaxmerge/results.schema.json").read_text())
TASKS = ["arithmetic", "instructions", "programs & <b>tests</b>"]
REFERENCE = dict.fromkeys(TASKS, Range(0.8, 0.4))
# Each would rename the page if any of it ran.
HOSTILE = "</script><script>document.title='pwned'</script>"
HOSTILE_IMAGE = "\"><img src=x onerror=document.title='pwned'>"
CHECKPOINTS = ["maths-long", "instruct-1e-3", "code", "mix-seed-2", HOSTILE, HOSTILE_IMAGE]
N = 400


def fabricate(
    directory: Path, *, heldout: bool = True, gain: float = 0.0, aggregate: str = "mean"
) -> None:
    """Writes a run directory; `gain` is added to the winner's chance on every test example."""
    objective = Objective(define(TASKS).weights, aggregate, REFERENCE)
    rng = np.random.default_rng(0)
    skill_KxT = np.array(
        [[0.75, 0.4, 0.45], [0.4, 0.8, 0.4], [0.45, 0.4, 0.8], *[[0.55, 0.55, 0.5]] * 3]
    )
    ids = iter(range(10_000))
    lines: list[dict[str, Any]] = []

    def chances(weights_K: np.ndarray) -> np.ndarray:
        concentration = float((weights_K**2).sum())
        return np.clip(weights_K @ skill_KxT + 0.25 * (1 - concentration), 0, 0.97)

    def draw(chances_T: np.ndarray) -> dict[str, np.ndarray]:
        return {t: (rng.random(N) < c).astype(float) for t, c in zip(TASKS, chances_T)}

    def evaluated(origin: str, name: str, weights_K: np.ndarray, generation: int) -> dict[str, Any]:
        samples = draw(chances(weights_K))
        line = {
            "id": next(ids),
            "generation": generation,
            "origin": origin,
            "name": name,
            "split": "search",
            "row": 0,
            "weights": weights_K.tolist(),
            "scores": {task: float(x_N.mean()) for task, x_N in samples.items()},
            "n": dict.fromkeys(TASKS, N),
            "seconds": 0.1,
        }
        lines.append(line)
        return line

    def entry(line: dict[str, Any], name: str, evaluations: int, bonus: float = 0.0) -> Any:
        samples = draw(chances(np.array(line["weights"])) + bonus)
        ends = {
            task: stats.interval({task: samples[task]}, define([task]), resamples=500)
            for task in TASKS
        }
        means = {task: float(x_N.mean()) for task, x_N in samples.items()}
        return samples, {
            "name": name,
            "id": line["id"],
            "weights": dict(zip(CHECKPOINTS, line["weights"])),
            "evaluations": evaluations,
            "search": line["scores"],
            "search_objective": objective.of(line["scores"]),
            "test": means,
            "test_objective": objective.of(means),
            "ci95": {
                **{task: list(pair) for task, pair in ends.items()},
                "objective": list(stats.interval(samples, objective, resamples=500)),
            },
            "heldout": {},
        }

    K = len(CHECKPOINTS)
    individuals = [
        entry(evaluated("individual", name, np.eye(K)[k], 0), name, 1)
        for k, name in enumerate(CHECKPOINTS)
    ]
    uniform = entry(evaluated("baseline:uniform", "uniform", np.full(K, 1 / K), 0), "uniform", 1)
    random_lines = [
        evaluated("baseline:random", f"random/{i}", rng.dirichlet(np.ones(K)), i // 9)
        for i in range(180)
    ]
    search_lines = [
        evaluated(
            "search",
            f"search/{i}",
            rng.dirichlet([1 + i / 9, 1 + i / 9, 1 + i / 9, 1, 1, 1]) * 1.06 - 0.01,
            i // 9,
        )
        for i in range(180)
    ]

    def best_of(of: list[dict[str, Any]]) -> dict[str, Any]:
        return max(of, key=lambda line: sum(line["scores"].values()))

    random = entry(best_of(random_lines), "random", 180)
    best_samples, best = entry(best_of(search_lines), "search", 180, gain)
    rivals = [*individuals, uniform, random]
    best["vs"] = {}
    for samples, rival in rivals:
        delta, low, high, p = stats.paired(best_samples, samples, objective, resamples=500)
        best["vs"][rival["name"]] = {"delta": delta, "ci95": [low, high], "p": p}
    lines.append({**lines[best["id"]], "id": next(ids), "origin": "final", "split": "test"})
    for _, model in [*individuals[:1], uniform]:
        model["heldout"] = {"sorting": 0.5, "copying": 0.75} if heldout else {}
    best["heldout"] = {"sorting": 0.625, "copying": 0.75} if heldout else {}
    scores_PxM = np.array([list(line["scores"].values()) for line in lines[:-1]])
    # The front, by the definition.
    pareto = [
        line["id"]
        for line, row in zip(lines, scores_PxM)
        if not ((scores_PxM >= row).all(1) & (scores_PxM > row).any(1)).any()
    ]
    origins = [line["origin"] for line in lines[:-1]]
    results = {
        "version": 2,
        "command": "python -m jaxmerge.run --config=configs/x.py --workdir=runs/<x>",
        "tasks": TASKS,
        "objective": objective.plain(),
        "bounds": {task: [0.0, 1.0] for task in [*TASKS, "sorting", "copying"]},
        "warnings": [f"{TASKS[2]}: judged by a program; {HOSTILE}"],
        "heldout_tasks": ["sorting", "copying"] if heldout else [],
        "individuals": [model for _, model in individuals],
        "baselines": [model for _, model in (uniform, random)],
        "best": best,
        "pareto": pareto,
        "hypervolume": 0.4321,
        "hypervolume_reference": dict.fromkeys(TASKS, 0.0),
        "evaluations": len(origins),
        "evaluations_by_origin": {origin: origins.count(origin) for origin in sorted({*origins})},
        "seconds": {"load": 1.25, "search": 40.5, "test": 3.0},
        "versions": {"jax": "0.9.0", "jaxmerge": "0.1.0", "numpy": "2.4.6"},
        "devices": {"platform": "cpu", "kind": "cpu", "count": 1, "processes": 1},
    }
    pool = [
        {
            "name": name,
            "source": f"pool/{k}",
            "format": "orbax",
            "bytes": 3_400_000,
            "parameters": 850_000,
            "dtype": "float32",
            "fingerprint": "0123456789abcdef" * 4,
        }
        for k, name in enumerate(CHECKPOINTS)
    ]
    config = {
        "seed": 0,
        "objective": {"tasks": TASKS, "weights": [], "aggregate": "mean"},
        "pool": {"checkpoints": [checkpoint["source"] for checkpoint in pool]},
        "space": {"constraint": "signed", "bounds": [-float("inf"), float("inf")]},
        "search": {"strategy": "CMA_ES", "population": 9, "budget": 180},
    }
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "pool.json").write_text(json.dumps({"checkpoints": pool}))
    (directory / "candidates.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (directory / "results.json").write_text(json.dumps(results))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    fabricate(tmp_path / "run", gain=0.05)
    return tmp_path / "run"


class Page(HTMLParser):
    """What an HTML parser sees: the elements, and the text of each kind of element."""

    def __init__(self, source: str):
        super().__init__()
        self.elements: list[str] = []
        self.attributes: list[str] = []
        self.text: dict[str, list[str]] = {}
        self._open = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [name for name, _ in attrs]
        self._open = tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self._open, []).append(data)


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


# Chooses other axes and the test split, and leaves what it saw in the title.
PROBE = """
const before = [...document.querySelectorAll("#tradeoff .xtitle, #tradeoff .ytitle")];
const seen = [before.map((title) => title.textContent).join(" | ")];
const points = () => document.querySelectorAll("#tradeoff .points path.point").length;
const search = points();
element("x").value = "2"; element("y").value = "3"; element("split").value = "test";
element("x").dispatchEvent(new Event("change"));
const after = [...document.querySelectorAll("#tradeoff .xtitle, #tradeoff .ytitle")];
seen.push(after.map((title) => title.textContent).join(" | "), search, points());
document.title = document.title.startsWith("jaxmerge") ? "probed: " + seen.join(" # ") : "pwned";
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not on PATH")
def test_a_browser_draws_it(directory: Path, tmp_path: Path) -> None:
    page = report.write(directory)
    dom, log = browse(page, tmp_path)
    assert "CONSOLE" not in log  # no error, no policy violation, nothing fetched
    drawn = Page(dom)
    assert drawn.text["title"][0].startswith("jaxmerge: The searched merge beats")
    assert drawn.elements.count("script") == 3
    assert "img" not in drawn.elements
    # Nothing of plotly's that sends the data away, such as "Share chart...".
    buttons = set(re.findall(r'data-title="([^"]*)"', dom))
    assert buttons == {"Download plot as a PNG", "Zoom", "Pan", "Reset axes"}
    results = json.loads((directory / "results.json").read_text())

    # Without the policy nothing but escaping holds the names back; and a probe may run.
    source = page.read_text()
    start = source.index('<meta http-equiv="Content-Security-Policy"')
    source = source[:start] + source[source.index(">", start) + 1 :]
    probed = tmp_path / "probed.html"
    probed.write_text(source.replace("</body>", f"<script>{PROBE}</script></body>"))
    dom, log = browse(probed, tmp_path)
    assert "CONSOLE" not in log
    title = Page(dom).text["title"][0]
    before, after, searched, tested = title.removeprefix("probed: ").split(" # ")
    assert before == "arithmetic, search | instructions, search"
    assert after == "programs & <b>tests</b>, test | objective: mean, test"
    # Every candidate, the front's rings and the winner again on test; then one mark for each model.
    assert int(searched) == results["evaluations"] + len(results["pareto"]) + 1
    assert int(tested) == len(CHECKPOINTS) + 2 + 1


def browse(page: Path, profile: Path) -> tuple[str, str]:
    """The document as headless chromium leaves it, and its log."""
    chromium = shutil.which("chromium")
    assert chromium
    done = subprocess.run(
        [
            chromium,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
            *("--no-first-run", "--disable-component-update", "--disable-sync"),
            f"--user-data-dir={profile / 'chromium'}",
            *("--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom"),
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr
