"""The report of a fabricated run, drawn by a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from jaxmerge import report
from tests.fabricated import CHECKPOINTS, Page, fabricate

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
def test_a_browser_draws_it(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    fabricate(directory, gain=0.05)
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
