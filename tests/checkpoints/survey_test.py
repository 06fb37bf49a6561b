"""Where checkpoints are: patterns in any part of a path, and names that look like patterns."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxmerge.checkpoints import survey
from jaxmerge.errors import JaxmergeError

PLACES = (
    "models/a/final",
    "models/b/final",
    "models/b/step-1",
    "models/a[1]/final",
    "models/a1/final",
    "models/.hidden/final",
    "odd*/x",
    "odder/x",
)


@pytest.fixture(scope="module")
def top(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("top [2] *")  # patterns above what is asked for
    for place in PLACES:
        (directory / place).mkdir(parents=True)
        save_file({"w": np.ones(2, np.float32)}, directory / place / "model.safetensors")
    (directory / "models" / "c" / "final").mkdir(parents=True)  # no checkpoint
    (directory / "models" / "file").write_text("")
    return directory


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("models/*/final", ["a/final", "a1/final", "a[1]/final", "b/final"]),
        ("models/[ab]/final", ["a/final", "b/final"]),
        ("models/a[1]/final", ["a[1]/final"]),  # is there as it is written
        ("models/a[12]/final", ["a1/final"]),
        ("m?dels/b/*", ["b/final", "b/step-1"]),
        ("models/.h*/final", [".hidden/final"]),
        ("odd*/x", ["odd*/x"]),
        ("odd?r/x", ["odder/x"]),
    ],
)
def test_patterns_and_names(top, pattern, found):
    sources = survey.find([f"{top}/{pattern}"])
    places = [str(Path(each.path).relative_to(top)) for each in sources]
    assert places == [each if each in PLACES else f"models/{each}" for each in found]
    assert survey.count([f"{top}/{pattern}"]) == len(found)


@pytest.mark.parametrize(
    ("pattern", "said", "found"),
    [
        ("models/*/none", "no checkpoint here", ""),
        ("models/c/*", "no checkpoint here", "1 that match, none a checkpoint"),
        ("models/c", "this is no checkpoint", ""),
        ("models/file/*", "no checkpoint here", ""),
    ],
)
def test_nothing_there(top, pattern, said, found):
    with pytest.raises(JaxmergeError, match=said) as caught:
        survey.find([f"{top}/{pattern}"])
    assert caught.value.where == f"{top}/{pattern}"
    assert caught.value.found == found
