"""What a run shows while it goes on: how often, and what happens when it can't."""

import pytest

from jaxmerge.errors import JaxmergeError
from jaxmerge.report import live
from jaxmerge.report.live import Live
from jaxmerge.report.progress import Plan
from jaxmerge.rundir import Candidate, RunDirectory
from jaxmerge.scores.formatting import Format
from jaxmerge.scores.objective import define

PLAN = Plan({"search": 100}, {"search": 1}, 25)


def _candidate(number: int) -> Candidate:
    scores = {"sums": 0.5}
    return Candidate(
        number, number // 4, "search", "", "search", 0, (1.0,), scores, {"sums": 1}, 1.0
    )


class Writer:
    """Stands where the report is written; takes its time, or refuses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now, self.takes, self.written = 0.0, 0.0, []
        self.error: JaxmergeError | None = None
        monkeypatch.setattr(live.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(live.report, "write", self.write)

    def write(self, path):
        self.now += self.takes
        self.written.append(self.now)
        if self.error:
            raise self.error


@pytest.fixture
def writer(monkeypatch) -> Writer:
    return Writer(monkeypatch)


def _follow(path, writer: Writer, seconds: float, *, steps: int = 100, board: bool = False) -> None:
    """A run whose every step of 4 takes a second."""
    directory = RunDirectory(path, {})
    shown = Live(directory, PLAN, population=4, report_seconds=seconds, tensorboard=board)
    with shown:
        shown.rate(define(["sums"]), Format(percent=True), [_candidate(0)])
        for step in range(steps):
            writer.now += 1.0
            shown.candidates([_candidate(4 * step + i) for i in range(4)])
    directory.close()


def test_the_report_is_refreshed_now_and_then(tmp_path, writer):
    _follow(tmp_path, writer, 20.0)
    assert writer.written == [20, 40, 60, 80, 100]


def test_never_when_not_asked_for(tmp_path, writer):
    _follow(tmp_path, writer, 0.0)
    assert writer.written == []


def test_refreshing_takes_a_hundredth_of_the_time_at_most(tmp_path, writer):
    writer.takes = 1.0
    _follow(tmp_path, writer, 20.0, steps=300)
    waits = [after - before for before, after in zip(writer.written, writer.written[1:])]
    assert waits
    assert min(waits) >= 100


def test_a_run_goes_on_without_a_report_and_complains_once(tmp_path, writer, capsys):
    writer.error = JaxmergeError("cannot be written", where="report.html", found="no space")
    _follow(tmp_path, writer, 20.0)
    said = capsys.readouterr().err
    assert len(writer.written) == 5
    assert said.count("report.html could not be refreshed") == 1
    assert "no space" in said


def test_event_files_are_where_they_belong(tmp_path, writer):
    _follow(tmp_path / "with", writer, 0.0, board=True)
    _follow(tmp_path / "without", writer, 0.0)
    (file,) = (tmp_path / "with/tensorboard").iterdir()
    assert file.name.startswith("events.out.tfevents")
    assert not (tmp_path / "without/tensorboard").exists()
