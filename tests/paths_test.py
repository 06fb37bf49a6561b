"""Paths as written: `~` is the home directory, any other is relative to the current one."""

import os
import subprocess
import sys

import numpy as np
import pytest

from jaxmerge import config as configs
from jaxmerge.checkpoints.survey import find
from jaxmerge.evaluation.tokenizer import Pretrained
from jaxmerge.experiment import given
from jaxmerge.mergekit.models import locate
from tests.command import ROOT
from tests.streaming import streaming_test as streamed
from tools import fuzz_sound


def _table(path: str) -> object:
    config = configs.default()
    config.merge.weights_file = path
    return given.read(config, {"a": np.zeros(3)}, "", ("x", "y"))


# A field or argument, what is in the directory `here`, and what reads it.
READ = {
    "merge.weights_file": ("table.json", _table),
    "pool.tokenizer": ("model", lambda path: Pretrained(path).prompt),
    "pool.checkpoints": ("mod*", lambda path: find([path])),
    "model of a YAML": ("model", locate),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    top = tmp_path_factory.mktemp("home")
    (top / "here").mkdir()
    fuzz_sound.llama(top / "here" / "model")
    for name, content in fuzz_sound.tokenizer_files().items():
        (top / "here" / "model" / name).write_bytes(fuzz_sound.as_bytes(content))
    (top / "here" / "table.json").write_text('{"weights": [0.5, 0.5]}')
    return top


@pytest.mark.parametrize(
    ("current", "written"), [("other", "~/here/"), ("", "here/"), ("other", "../here/")]
)
@pytest.mark.parametrize("field", READ)
def test_paths(home, monkeypatch, field, current, written):
    name, read = READ[field]
    monkeypatch.setenv("HOME", str(home))
    (home / "other").mkdir(exist_ok=True)
    monkeypatch.chdir(home / current)
    assert read(written + name)
    assert not list(home.rglob("~"))


CONFIG = """
from jaxmerge import config as configs

def get_config():
    config = configs.default()
    config.pool.checkpoints = ({pool!r},)
    config.merge.weights, config.compilation_cache = (0.5, 0.5), ""
    config.export.formats = ("huggingface",)
    return config
"""


@pytest.mark.parametrize(
    ("flags", "pool", "merged"),
    [
        (["--config=~/configs/c.py", "--workdir=~/runs/a"], "~/models/*", "runs/a"),
        (["--config", "~/configs/c.py", "--workdir", "~/runs/a"], "~/models/*", "runs/a"),
        # All are relative to the current directory, none to where the config file is.
        (["--config=../configs/c.py", "--workdir=runs/a"], "../models/*", "current/runs/a"),
    ],
)
def test_config_workdir_and_current_directory_in_three_places(tmp_path, flags, pool, merged):
    streamed.make(tmp_path / "models", count=2)
    for name in ("configs", "current"):
        (tmp_path / name).mkdir()
    (tmp_path / "configs" / "c.py").write_text(CONFIG.format(pool=pool))
    done = subprocess.run(
        [sys.executable, "-m", "jaxmerge.run", "--mode=merge", *flags],
        cwd=tmp_path / "current",
        env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / merged / "merged" / "huggingface" / "model.safetensors").exists()
    assert not [*tmp_path.rglob("~")]


@pytest.mark.parametrize("out", [["--out=~/merged"], ["--out", "~/merged"]])
def test_out_at_home(tmp_path, out):
    models = streamed.make(tmp_path / "models", count=2)
    command = ["merge", str(models / "m0"), "~/models/m1", "--weights=0.5,0.5", *out]
    done = subprocess.run(
        [sys.executable, "-m", "jaxmerge", *command, "--config.compilation_cache="],
        cwd=models,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "merged" / "model.safetensors").exists()
    assert not [*tmp_path.rglob("~")]
