"""The wheel in an environment that has nothing else, used from an otherwise empty directory."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.command import ROOT
from tests.streaming import streaming_test as streamed

QUESTIONS = [{"prompt": f"{word}=", "target": word[0]} for word in tiny.letters(3, 60)]
CONFIG = """
from jaxmerge.config import default

def get_config():
    config = default()
    config.pool.checkpoints = ("models/*",)
    config.tasks.own = {"builder": "jsonl", "path": "questions.jsonl", "max_new_tokens": 2}
    config.objective.tasks = ("own",)
    config.search.strategy = "CMA_ES"
    config.search.population, config.search.budget = 4, 4
    return config
"""


def _installed(directory: Path) -> Path:
    """The commands of a new environment with a wheel of this checkout and all that it asks for."""
    sources = directory / "sources"
    for name in ("jaxmerge", "pyproject.toml", "README.md", "LICENSE"):
        path = ROOT / name
        (shutil.copytree if path.is_dir() else _copy)(path, sources / name)
    pip = ("-m", "pip", "--quiet", "--disable-pip-version-check")
    subprocess.run([sys.executable, "-m", "venv", directory / "venv"], check=True)
    python = directory / "venv" / "bin" / "python"
    wheel = (*pip, "wheel", "--no-deps", f"--wheel-dir={directory}", sources)
    subprocess.run([python, *wheel], check=True)
    (built,) = directory.glob("*.whl")
    pins = f"--constraint={ROOT / 'constraints.txt'}"
    subprocess.run([python, *pip, "install", "--no-compile", pins, built], check=True)
    shutil.rmtree(sources)
    return python.parent


def _copy(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, target)


@pytest.mark.slow
def test_the_jobs_of_one_line(tmp_path):
    commands, here = _installed(tmp_path / "installed"), tmp_path / "empty"
    here.mkdir()
    tiny.pool(here / "models", 2)
    directories = streamed.make(here / "directories", 2)
    (here / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (here / "config.py").write_text(CONFIG)
    environment = {"PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", "JAX_PLATFORMS": "cpu"}
    environment["HOME"] = str(tmp_path)
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # as for other runs of runs, see conftest

    def typed(command: str) -> str:
        done = subprocess.run(
            command, shell=True, cwd=here, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "jaxmerge merge" in typed("jaxmerge --help")
    typed("jaxmerge merge directories/m0 directories/m1 --weights=0.3,0.7 --out=merged")
    expected = streamed.reference(directories, (0.3, 0.7))
    streamed.assert_bits(streamed.tensors_of(here / "merged"), expected)
    task = "--task=jsonl:questions.jsonl,max_new_tokens=2"
    small = "--config.evaluate.batch_size=8"
    shown = typed(f"jaxmerge evaluate models/* {task} {small} --out=runs/scores")
    assert all(name in shown for name in ("questions", "model0", "model1"))
    shown = typed(f"jaxmerge search models/* {task} {small} --steps=2 --out=runs/mine")
    assert "The searched merge against the best single checkpoint" in shown
    assert (here / "runs/mine/merged/orbax").is_dir()
    assert typed("jaxmerge report runs/mine") == "runs/mine/report.html\n"
    assert "each device" in typed("jaxmerge plan --config=config.py")
    shown = typed("jaxmerge sweep --config=config.py --workdir=runs/sweep --sweep=seed=0,1")
    assert "comparison.html" in shown
