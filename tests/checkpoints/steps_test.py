"""Steps of a run: which of a directory's checkpoints a window takes."""

import numpy as np
import pytest

from jaxmerge.checkpoints import orbax, steps
from jaxmerge.errors import JaxmergeError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Steps whose numbers are not in the order of their names; beside them what is none."""
    path = tmp_path_factory.mktemp("run") / "checkpoints"
    for step in (500, 1000, 1500, 2000, 2750):
        orbax.save(path / f"{step}", {"norm": np.ones(2, np.float32)})
    (path / "3000.orbax-checkpoint-tmp-7").mkdir()
    (path / "3500").mkdir()  # not finished
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("500:1500:500", [500, 1000, 1500]),
        ("500:1900:500", [500, 1000, 1500]),
        ("1000:", [1000, 1500, 2000, 2750]),
        (":1000", [500, 1000]),
        (":", [500, 1000, 1500, 2000, 2750]),
        ("::1000", [500, 1500, 2500]),
        ("600:2000", [1000, 1500, 2000]),
    ],
)
def test_both_ends_are_included(text, expected):
    assert steps.window(text).of([500, 1000, 1500, 2000, 2750]) == expected


@pytest.mark.parametrize("text", ["1000", "a:b", "5:1", "1:5:0", "1:2:3:4", "-3:", "1:5:1.5"])
def test_no_window(text):
    with pytest.raises(JaxmergeError, match=r"pool\.steps"):
        steps.window(text)


def test_steps_come_in_the_order_of_their_numbers(run):
    assert steps.members(str(run), "500:2000:500") == tuple(
        str(run / step) for step in ("500", "1000", "1500", "2000")
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("500:3500:500", r"no step 2500, 3000, 3500[\s\S]*steps 500, 1000, 1500, 2000, 2750"),
        ("3000:", "no such steps"),
    ],
)
def test_what_is_missing_is_said_with_what_is_there(run, text, said):
    with pytest.raises(JaxmergeError, match=said):
        steps.members(str(run), text)


def test_no_run(run, tmp_path):
    with pytest.raises(JaxmergeError, match="no steps of a run lie in here"):
        steps.members(str(tmp_path / "nothing"), ":")
    with pytest.raises(JaxmergeError, match=r"one directory[\s\S]*a, b"):
        steps.check(":", ("a", "b"))
    (tmp_path / "step-0500").symlink_to(run / "500")
    (tmp_path / "500").symlink_to(run / "500")
    with pytest.raises(JaxmergeError, match="two checkpoints are of step 500"):
        steps.members(str(tmp_path), ":")
