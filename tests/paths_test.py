"""Paths as written: `~` is the home directory, any other is relative to the current one."""

import numpy as np
import pytest

from jaxmerge import config as configs
from jaxmerge.checkpoints.survey import find
from jaxmerge.evaluation.tokenizer import Pretrained
from jaxmerge.experiment import given
from jaxmerge.mergekit.models import locate
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
