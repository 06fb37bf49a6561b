"""The command line of the report."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.report.fabricated import (
    fabricate,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    fabricate(tmp_path / "run", gain=0.05)
    return tmp_path / "run"


def command(*arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`python -m jaxmerge.report`, in a Python that has no jax."""
    program = (
        "import runpy, sys; sys.modules['jax'] = None; "
        "runpy.run_module('jaxmerge.report', run_name='__main__', alter_sys=True)"
    )
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_command_line_without_jax(directory: Path, tmp_path: Path) -> None:
    done = command(directory)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == str(directory / "report.html")
    fabricate(tmp_path / "other", seed=1)
    both = command("run", "other", cwd=tmp_path)
    assert (both.returncode, both.stderr, both.stdout.strip()) == (0, "", "comparison.html")
    assert "<h1>2 runs compared</h1>" in (tmp_path / "comparison.html").read_text()
    out = tmp_path / "out.html"
    assert command("run", "other", "--out", out, cwd=tmp_path).stdout.strip() == str(out)
    assert out.read_bytes() == (tmp_path / "comparison.html").read_bytes()


def test_command_line_says_what_is_wrong(directory: Path) -> None:
    (directory / "pool.json").unlink()
    failed = command(directory)
    assert failed.returncode == 2
    assert "pool.json: no such file" in failed.stderr
    assert "Traceback" not in failed.stderr
    useless = command(directory, "--out", "x.html")
    assert useless.returncode == 2
    assert "several directories" in useless.stderr
