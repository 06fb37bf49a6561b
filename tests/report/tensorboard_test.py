"""Event files, read back as they are on disk."""

import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.message_factory import GetMessageClass
from tensorboardX.proto import event_pb2

from jaxmerge import config as configs
from jaxmerge.errors import JaxmergeError
from jaxmerge.report import tensorboard
from jaxmerge.rundir import Candidate
from jaxmerge.scores.objective import define

Event = GetMessageClass(event_pb2.DESCRIPTOR.message_types_by_name["Event"])
OBJECTIVE = define(["sums", "words"])
SCORES = np.random.default_rng(0).uniform(size=(12, 2))


def _candidate(number: int, origin: str = "search") -> Candidate:
    return Candidate(
        id=number,
        generation=number // 4,
        origin=origin,
        name="",
        split="search",
        row=number,
        weights=(1.0,),
        scores=dict(zip(OBJECTIVE.tasks, SCORES[number].tolist())),
        n={"sums": 1, "words": 1},
        seconds=0.5,
        tokens={"read": 30, "written": number},
    )


SEARCHED = [_candidate(number) for number in range(12)]
ALONE = [_candidate(number, "individual") for number in range(3)]


def _points(directory: Path) -> dict[str, list[tuple[int, float, float]]]:
    """Step, value and time of all points, by tag, in the order of the file."""
    (path,) = directory.iterdir()
    data, points, at = path.read_bytes(), {}, 0
    while at < len(data):  # records: length, its checksum, the event, its checksum
        (length,) = struct.unpack_from("<Q", data, at)
        event: Any = Event.FromString(data[at + 12 : at + 12 + length])
        at += 12 + length + 4
        for value in event.summary.value:
            point = (event.step, value.simple_value, event.wall_time)
            points.setdefault(value.tag, []).append(point)
    return points


def _written(directory: Path, recorded: int, groups: list[list[Candidate]]):
    board = tensorboard.Board(directory, 4, [*ALONE, *SEARCHED[:recorded]])
    board.candidates(ALONE)
    board.rate(OBJECTIVE, ALONE)
    for group in groups:
        board.candidates(group)
    board.close()
    return _points(directory)


def test_a_point_for_each_generation(tmp_path):
    points = _written(tmp_path, 0, [SEARCHED[:3], SEARCHED[3:6], SEARCHED[6:]])
    values = SCORES.mean(axis=1).reshape(3, 4)
    expected = {
        "objective/best": np.maximum.accumulate(values.max(axis=1)),
        "objective/mean": values.mean(axis=1),
        "objective/best_single": np.full(3, SCORES[:3].mean(axis=1).max()),
        "best/sums": np.maximum.accumulate(SCORES[:, 0].reshape(3, 4).max(axis=1)),
        "best/words": np.maximum.accumulate(SCORES[:, 1].reshape(3, 4).max(axis=1)),
        "tokens": np.cumsum([120 + 6, 120 + 22, 120 + 38]),
        "tokens_per_second": [(120 + 6) / 2, (120 + 22) / 2, (120 + 38) / 2],
    }
    assert points.keys() == expected.keys()
    for tag, values_G in expected.items():
        assert [step for step, *_ in points[tag]] == [4, 8, 12]
        np.testing.assert_allclose([value for _, value, _ in points[tag]], values_G, rtol=1e-6)


@pytest.mark.parametrize("passed", [[SEARCHED[:8]], [SEARCHED[:4], SEARCHED[4:8]]])
def test_a_resumed_run_has_each_point_once(tmp_path, passed):
    """Killed after 7 candidates; the log brings them back, in one group or several."""
    first = tensorboard.Board(tmp_path, 4, [])
    first.candidates(ALONE)
    first.rate(OBJECTIVE, ALONE)
    first.candidates(SEARCHED[:7])
    first.close()
    assert [step for step, *_ in _points(tmp_path)["objective/best"]] == [4]
    resumed = _written(tmp_path, 8, [*passed, SEARCHED[8:]])
    (tmp_path / "whole").mkdir()
    whole = _written(tmp_path / "whole", 0, [SEARCHED])
    for tag in whole:
        assert [point[:2] for point in resumed[tag]] == [point[:2] for point in whole[tag]]


def test_times_are_those_that_candidates_took(tmp_path):
    """2 seconds a generation, however fast the log brings them back."""
    times = [time for *_, time in _written(tmp_path, 12, [SEARCHED])["objective/best"]]
    np.testing.assert_allclose(np.diff(times), 2.0, atol=1e-3)


def test_what_is_no_search_is_no_point(tmp_path):
    others = [_candidate(number, "analysis:pool-size") for number in range(8)]
    assert _written(tmp_path, 0, [others]) == {}


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    config = configs.default()
    config.pool.checkpoints, config.objective.tasks = ("a",), ("sorting",)
    configs.check(config)
    config.tensorboard = True
    with pytest.raises(JaxmergeError, match=r"jaxmerge\[tensorboard\]"):
        configs.check(config)
