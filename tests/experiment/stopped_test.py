"""Ctrl-C and SIGTERM while a command is at work: one line, and what was done stays."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import tiny
from tests.command import Command

Process = subprocess.Popen[str]
LINE = "jaxmerge: stopped; the same command goes on from here"


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return tiny.pool(tmp_path_factory.mktemp("pool"))


def scored(_: Process, workdir: Path) -> bool:
    """A candidate is in the log of the run, or of a run of the sweep."""
    return any(log.stat().st_size for log in workdir.rglob("candidates.jsonl"))


def begun(_: Process, workdir: Path) -> bool:
    """The run directory is there: checkpoints are read, and then the merge is written."""
    return (workdir / "config.json").exists()


def writing(_: Process, workdir: Path) -> bool:
    """Orbax writes the merge, in a directory whose name says that it is not whole."""
    return (workdir / "merged" / HALF).exists()


def compiling(process: Process, _: Path) -> bool:
    """The process that compiles is at work: what it complains of goes to a file."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return any(Path(f"/proc/{child}/fd/2").resolve().is_file() for child in children)


HALF = "orbax.orbax-checkpoint-tmp"
GRADIENT = ["--config.search.strategy=gradient", "--config.space.granularity=leaf"]
WEIGHTS = "--config.merge.weights=(0.5,0.25,0.25)"
MERGE = ["--mode=merge", WEIGHTS, "--config.export.formats=('orbax',)"]
# The module, its flags, the signal, and when it comes.
STOPPED = {
    "search": ("jaxmerge.run", [], "SIGINT", scored),
    "gradients": ("jaxmerge.run", GRADIENT, "SIGTERM", scored),
    "evaluate": ("jaxmerge.run", ["--mode=evaluate"], "SIGINT", scored),
    "merge": ("jaxmerge.run", MERGE, "SIGTERM", begun),
    "merge, writing": ("jaxmerge.run", MERGE, "SIGTERM", writing),
    "sweep": ("jaxmerge.sweep", ["--sweep=seed=0,1"], "SIGTERM", scored),
    "plan": ("jaxmerge.plan", [], "SIGINT", compiling),
}


def _wait(process: Process, there: Callable[[], bool]) -> None:
    while process.poll() is None and not there():
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize(("module", "flags", "name", "when"), STOPPED.values(), ids=STOPPED)
def test_stopped_while_it_works(pool, tmp_path, module, flags, name, when):
    command = Command(tmp_path, pool)
    command.module, number = module, signal.Signals[name]
    process = command.start(*flags)
    _wait(process, lambda: when(process, command.workdir))
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert err.strip().splitlines()[-1] == LINE
    assert "Traceback" not in err
    assert out == ""
    logs = [*command.workdir.rglob("candidates.jsonl")]
    kept = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    assert bool(kept) == (when is scored)
    if flags is MERGE:
        merged = command.workdir / "merged"
        assert {path.name for path in merged.glob("*")} <= {HALF}
        code, out, err = command.run(*flags)
        assert code == 0, err
        assert "merged/orbax" in out
        assert [path.name for path in merged.glob("*")] == ["orbax"]
