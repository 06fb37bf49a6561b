"""The progress line: what it says, on a terminal of 80 columns and without one."""

import fcntl
import dataclasses
import os
import pty
import re
import struct
import termios
from typing import TextIO

import pytest

from jaxmerge.report import progress
from jaxmerge.report.progress import Plan, Progress
from jaxmerge.rundir import Candidate
from jaxmerge.scores.formatting import Format
from jaxmerge.scores.objective import define

PLAN = Plan(
    {"search": 10_000, "test": 25, "heldout": 0}, {"search": 100, "test": 600, "heldout": 1}, 1200
)
OBJECTIVE = define(["sums"])


def _candidate(number: int, origin: str, score: float, seconds: float = 0.5) -> Candidate:
    split = "test" if origin in ("final", "analysis:leave-one-out") else "search"
    return Candidate(
        id=number,
        generation=number // 8,
        origin=origin,
        name="",
        split=split,
        row=number,
        weights=(1.0,),
        scores={"sums": score},
        n={"sums": PLAN.examples[split]},
        seconds=seconds,
        tokens={"read": 5000, "written": 1000},
    )


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 0.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def _followed(steps: int, clock: Clock | None = None, stream: TextIO | None = None) -> Progress:
    """A run that was followed for some steps of 8 candidates, 4 seconds each."""
    shown = Progress(PLAN, stream)
    alone = [_candidate(0, "individual", 0.569), _candidate(1, "individual", 0.25)]
    shown.candidates(alone)
    shown.rate(OBJECTIVE, Format(percent=True), alone)
    for step in range(steps):
        if clock:
            clock.now += 4.0
        scores = [0.5 + 0.001 * step, *[0.3] * 7]
        shown.candidates([_candidate(8 * step + i, "search", s) for i, s in enumerate(scores)])
    return shown


def test_without_a_terminal_a_line_now_and_then(clock, capsys):
    shown = _followed(100, clock)
    lines = capsys.readouterr().err.splitlines()
    # 400 seconds, 4 of them a step: a line at 32, 64, ... seconds.
    assert len(lines) == 12
    # 59.5 at step 95 of those from 0; 6,000 tokens in half a second; 770 evaluations are done, and
    # (10,000 - 770) x 100 + 25 x 600 examples take 0.005 seconds each.
    assert lines[-1] == (
        "jaxmerge: gen 96/1200, best 59.5 (single 56.9), 12.0k tok/s, 1:18:10 left, "
        "770/10025 evaluations"
    )
    shown.candidates([_candidate(9, "analysis:leave-one-out", 0.9)])
    assert capsys.readouterr().err == ""


def test_along_gradients_the_soft_score_and_the_tokens_are_shown(clock, capsys):
    """What the iterates are expected to score stands beside the best true score."""
    shown = _followed(0, clock)
    clock.now += 31
    first, second = (_candidate(i, "search", 0.6) for i in range(2))
    shown.candidates([dataclasses.replace(first, expected={"sums": 0.645}), second])
    (line,) = capsys.readouterr().err.splitlines()
    assert "best 60.0 (single 56.9), soft 64.5, 12.0k tokens, " in line


def test_what_is_no_search_is_named(clock, capsys):
    shown = Progress(PLAN)
    for origin in ("individual", "baseline:random", "final", "analysis:leave-one-out"):
        clock.now += 31
        shown.candidates([_candidate(0, origin, 0.9)])
    lines = capsys.readouterr().err.splitlines()
    named = [line.split(",")[0] for line in lines]
    assert named == [f"jaxmerge: {x}" for x in ("individual", "random", "test", "leave-one-out")]
    assert not any("best" in line for line in lines)


def test_the_time_left_is_known_at_once_when_resumed(clock, capsys):
    """The log brings thousands of candidates in no time; each still took what it took."""
    shown = Progress(PLAN)
    clock.now = 31
    shown.candidates([_candidate(i, "search", 0.4) for i in range(8000)])
    (line,) = capsys.readouterr().err.splitlines()
    # 2,000 x 100 + 25 x 600 examples at 0.005 seconds.
    assert "17:55 left" in line


def test_what_compiles_does_not_move_the_time_left(clock, capsys):
    """The first candidate took an hour, those after it what they take."""
    shown = Progress(PLAN)
    first = _candidate(0, "search", 0.4, seconds=3600.0)
    clock.now = 31
    shown.candidates([first, *(_candidate(i, "search", 0.4) for i in range(1, 8))])
    (line,) = capsys.readouterr().err.splitlines()
    # 9,992 x 100 + 25 x 600 examples at 0.005 seconds.
    assert "1:24:31 left" in line


def test_more_than_was_planned(clock, capsys):
    """Random draws go on for as long as the search's tokens are enough."""
    shown = Progress(PLAN)
    clock.now = 31
    shown.candidates([_candidate(i, "baseline:random", 0.4) for i in range(10_050)])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("10050/10050 evaluations")
    assert "01:15 left" in line  # 25 x 600 examples of the test at 0.005 seconds


def test_analyses_do_not_count_as_the_best(clock, capsys):
    shown = _followed(1)
    clock.now = 31
    shown.candidates([_candidate(9, "analysis:pool-size", 0.99)])
    (line,) = capsys.readouterr().err.splitlines()
    assert "best 50.0 (single 56.9)" in line


def _terminal(columns: int):
    """What is written to a terminal of this width: the open end, and a function that reads it."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    stream = os.fdopen(side, "w")

    def read() -> str:
        stream.flush()
        os.set_blocking(main, False)
        seen = b""
        try:
            while chunk := os.read(main, 65536):
                seen += chunk
        except BlockingIOError:
            return seen.decode()
        return seen.decode()

    return stream, read


def test_a_terminal_of_80_columns_shows_all_of_it():
    stream, read = _terminal(80)
    with _followed(60, stream=stream) as shown:
        shown._bar.refresh()
        states = [state for state in re.split(r"[\r\n]+", read()) if "left" in state]
    stream.close()
    assert all(len(state) <= 80 for state in states)
    shown = r"gen 60/1200, best 55\.9 \(single 56\.9\), 12\.0k tok/s, 1:20:34 left \|.{8,}\| 5%"
    assert re.fullmatch(shown, states[-1])


def test_a_line_of_its_own_leaves_the_bar():
    stream, read = _terminal(80)
    with _followed(1, stream=stream) as shown:
        shown.say("jaxmerge: a warning")
        assert "jaxmerge: a warning\r\n" in read()
    stream.close()


def test_at_the_end_all_is_done():
    """Though an analysis may need fewer evaluations than it might have."""
    stream, read = _terminal(100)
    with _followed(60, stream=stream):
        pass
    assert read().rstrip().endswith("| 100%")
    stream.close()
