"""The run directory: what survives, and what is refused."""

import contextlib
import errno
import io
import json
import os
import re
import socket

import numpy as np
import pytest

from jaxmerge.durable import replacing
from jaxmerge.errors import JaxmergeError
from jaxmerge.experiment.records import say_unlocked
from jaxmerge.rundir import Candidate, RunDirectory, check

CONFIG = {"seed": 0, "search": {"budget": 10, "params": {}}, "heldout": ["a", "b"]}


def _candidate(number: int, split: str = "search", row: int | None = None) -> Candidate:
    return Candidate(
        id=number,
        generation=0,
        origin="search",
        name="search",
        split=split,
        row=number if row is None else row,
        weights=(0.1, 0.9),
        scores={"sums": 0.5},
        n={"sums": 3},
        seconds=0.25,
    )


def _scores(*rows: float) -> dict[str, np.ndarray]:
    return {"sums": np.array([[row, row + 1, row + 2] for row in rows])}


@pytest.fixture
def opened(tmp_path):
    """Opens the run directory of the test, closing what was open of it before."""
    directories = []

    def open_again() -> RunDirectory:
        for directory in directories:
            directory.close()
        directories.append(RunDirectory(tmp_path, CONFIG))
        return directories[-1]

    yield open_again
    for directory in directories:
        directory.close()


def test_candidates_and_examples_come_back(opened, tmp_path):
    directory = opened()
    directory.append([_candidate(0), _candidate(1)], _scores(0.0, 10.0))
    directory.append([_candidate(2, "test", 0)], _scores(20.0))
    again = opened()
    assert again.candidates == [_candidate(0), _candidate(1), _candidate(2, "test", 0)]
    for candidate, first in zip(again.candidates, (0.0, 10.0, 20.0)):
        np.testing.assert_array_equal(again.examples(candidate)["sums"], first + np.arange(3))


def test_a_torn_line_is_forgotten(opened, tmp_path):
    """Cut anywhere in the last line, the log is that of the candidates before."""
    directory = opened()
    directory.append([_candidate(0), _candidate(1)], _scores(0.0, 10.0))
    log = tmp_path / "candidates.jsonl"
    whole = log.read_bytes()
    second_line = whole.index(b"\n") + 1
    for end in range(second_line, len(whole)):
        log.write_bytes(whole[:end])
        directory = opened()
        assert directory.candidates == [_candidate(0)]
        assert log.read_bytes() == whole[:second_line]


def test_cut_and_go_on(opened, tmp_path):
    directory = opened()
    directory.append([_candidate(n) for n in range(4)], _scores(0, 10, 20, 30))
    directory.cut(2)
    directory.append([_candidate(2)], _scores(50))
    again = opened()
    assert [candidate.id for candidate in again.candidates] == [0, 1, 2]
    assert again.examples(again.candidates[2])["sums"][0] == 50


def test_a_log_of_before_tokens_were_counted(opened, tmp_path):
    directory = opened()
    directory.append([_candidate(0)], _scores(0.0))
    log = tmp_path / "candidates.jsonl"
    old = {key: value for key, value in json.loads(log.read_text()).items() if key != "tokens"}
    log.write_text(json.dumps(old) + "\n")
    assert opened().candidates == [_candidate(0)]


def test_a_garbled_log_is_refused(opened, tmp_path):
    directory = opened()
    directory.append([_candidate(0), _candidate(1)], _scores(0.0, 10.0))
    log = tmp_path / "candidates.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    for garbled, named in (
        ("{}\n" + lines[1], "line 1"),
        (lines[0] + "no json\n" + lines[1], "line 2"),
        (lines[1] + lines[0], "out of order"),
        (lines[0].replace('"row": 0', '"row": "0"'), "line 1"),
        (lines[0] + lines[1].replace('"scores": {', '"scores": {"more": null, '), "line 2"),
        ("[" * 100_000 + "\n", "line 1"),
    ):
        log.write_text(garbled)
        with pytest.raises(JaxmergeError, match=named):
            opened()


@pytest.mark.parametrize(
    "spoiled",
    [
        {"weights": [0.1, 10**400]},
        {"genes": {"density": 10**400}},
        {"genes": {"density": [0.5, 10**400]}},
        {"scores": {"sums": -(10**400)}},
        {"expected": {"sums": 10**400}},
        {"seconds": 10**400},
        {"seconds": "1"},
        {"tokens": {"read": 10**400}},
        {"tokens": {"read": 0.5}},
        {"n": {"sums": 10**400}},
    ],
    ids=str,
)
def test_numbers_of_the_log_that_are_none(opened, tmp_path, spoiled):
    """Beyond float64, or of another kind; by the line."""
    opened().append([_candidate(0)], _scores(0.0))
    log = tmp_path / "candidates.jsonl"
    log.write_text(json.dumps({**json.loads(log.read_text()), **spoiled}) + "\n")
    with pytest.raises(JaxmergeError, match="line 1 can't be read"):
        opened()


@pytest.mark.parametrize("text", ["[1]", "3", '{"search": 3}', "{"])
def test_files_of_a_run_that_it_did_not_write(opened, tmp_path, text):
    directory = opened()
    (tmp_path / "pool.json").write_text(text)
    if text.startswith('{"'):
        assert directory.read_json("pool.json") == {"search": 3}
    else:
        with pytest.raises(JaxmergeError, match=r"pool\.json"):
            directory.read_json("pool.json")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(JaxmergeError, match=re.escape(str(tmp_path))):
        check(tmp_path, CONFIG)


def test_missing_examples_are_named(opened, tmp_path):
    directory = opened()
    directory.append([_candidate(0)], _scores(0.0))
    (tmp_path / "examples/search/sums.f32").write_bytes(b"\0" * 8)
    with pytest.raises(JaxmergeError, match=r"sums\.f32"):
        directory.examples(directory.candidates[0])


def test_another_config_is_refused_by_field(tmp_path):
    RunDirectory(tmp_path, CONFIG).close()
    other = {"seed": 0, "search": {"budget": 20, "params": {}}, "heldout": ["a"], "new": 1}
    with pytest.raises(JaxmergeError) as caught:
        RunDirectory(tmp_path, other)
    message = str(caught.value)
    assert "search.budget: 10 there, 20 now" in message
    assert "heldout" in message
    assert "new" in message
    assert "seed" not in message
    assert json.loads((tmp_path / "config.json").read_text()) == CONFIG


def test_tuples_are_the_lists_they_are_written_as(tmp_path):
    RunDirectory(tmp_path, CONFIG).close()
    check(tmp_path, {**CONFIG, "heldout": ("a", "b")})


def test_a_foreign_directory_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(JaxmergeError, match="no run directory"):
        RunDirectory(tmp_path, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_directory_in_use_is_refused(opened, tmp_path):
    directory = opened()
    with pytest.raises(JaxmergeError, match="another process"):
        RunDirectory(tmp_path, CONFIG)
    directory.close()
    RunDirectory(tmp_path, CONFIG).close()


def test_replacing_keeps_the_old_file_until_the_new_is_whole(tmp_path):
    file = tmp_path / "value.json"
    file.write_text("old")
    with contextlib.suppress(KeyboardInterrupt), replacing(file) as temporary:
        temporary.write_text("ne")
        raise KeyboardInterrupt
    assert file.read_text() == "old"
    with replacing(file) as temporary:
        temporary.write_text("new")
    assert file.read_text() == "new"


@pytest.mark.parametrize("left", [[".lock"], [".lock", "config.json.tmp"]])
def test_a_run_that_was_killed_at_once_can_be_started_again(tmp_path, left):
    for name in left:
        (tmp_path / name).write_text("{")
    directory = RunDirectory(tmp_path, {"seed": 1})
    assert directory.read_json("config.json") == {"seed": 1}
    directory.close()


@pytest.fixture(
    params=[errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL], ids=os.strerror
)
def no_locks(request, monkeypatch):
    """What the system says of locks, where there are none."""

    def flock(*_):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr("fcntl.flock", flock)
    return os.strerror(request.param)


@pytest.mark.parametrize(
    "holder", ["", "elsewhere 1", "half a l", f"{socket.gethostname()} 4194305"]
)
def test_without_locks_of_the_system(tmp_path, no_locks, holder, capsys):
    """It runs and says that other machines are not kept out; stale holders are no obstacle."""
    tmp_path.mkdir(exist_ok=True)
    if holder:
        (tmp_path / ".lock-holder").write_text(holder)
    directory = RunDirectory(tmp_path, {"a": 1})
    say_unlocked(directory)
    (said,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}: the file system has no locks ({no_locks})" in said
    assert "no other machine" in said
    assert (tmp_path / ".lock-holder").read_text() == f"{socket.gethostname()} {os.getpid()}"
    directory.close()
    assert not (tmp_path / ".lock-holder").exists()


def test_without_locks_a_process_of_this_machine_is_kept_out(tmp_path, no_locks):
    (tmp_path / ".lock-holder").write_text(f"{socket.gethostname()} {os.getppid()}")
    with pytest.raises(JaxmergeError, match=f"process {os.getppid()} of this machine") as raised:
        RunDirectory(tmp_path, {"a": 1})
    assert ".lock-holder" in raised.value.expected


def test_locks_that_fail_are_no_missing_locks(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(JaxmergeError, match=os.strerror(errno.EIO)) as raised:
        RunDirectory(tmp_path, {})
    assert str(tmp_path) in raised.value.where
    assert not (tmp_path / ".lock-holder").exists()


def test_with_locks_nothing_is_said(opened, capsys):
    say_unlocked(opened())
    assert capsys.readouterr().err == ""


def test_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / "file" / "a" / "b"):
        with pytest.raises(JaxmergeError, match="file") as raised:
            RunDirectory(path, {})
        assert raised.value.expected


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EPERM])
@pytest.mark.parametrize("call", ["os.mkdir", "io.open"])
def test_a_place_that_is_read_only(tmp_path, monkeypatch, code, call):
    """Where nothing is yet, and where a run was; root may write anywhere else, so it is feigned."""
    run = tmp_path / "run"
    if call == "io.open":
        RunDirectory(run, {}).close()
    before = sorted(tmp_path.rglob("*"))
    original = {"os.mkdir": os.mkdir, "io.open": io.open}[call]

    def refuse(path, mode="r", *rest, **named):
        if call == "os.mkdir" or {*mode} & {*"wax+"}:
            raise OSError(code, os.strerror(code), path)
        return original(path, mode, *rest, **named)

    with monkeypatch.context() as patched:
        patched.setattr(call, refuse)
        with pytest.raises(JaxmergeError, match=os.strerror(code)) as raised:
            RunDirectory(run, {})
    assert str(run) in raised.value.where
    assert "a place that" in raised.value.expected
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("path", ["/proc/run", "/proc/self/run/x"])
def test_a_file_system_in_which_nothing_can_be_made(path):
    with pytest.raises(JaxmergeError, match="refuses to read or write") as raised:
        RunDirectory(path, {})
    assert path.startswith(raised.value.where)
    assert raised.value.expected


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_takes_nothing_more(tmp_path, monkeypatch, code):
    """What was recorded stays, and the next start goes on from it."""
    candidate = Candidate(0, 0, "individual", "a", "search", 0, (1.0,), {"t": 1.0}, {"t": 2}, 0.0)
    directory = RunDirectory(tmp_path, {})
    directory.append([candidate], {"t": np.ones((1, 2), np.float32)})

    def fsync(_):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", fsync)
        for write in (
            lambda: directory.append([candidate], {"t": np.ones((1, 2), np.float32)}),
            lambda: directory.write_json("pool.json", {}),
            lambda: directory.cut(0),
        ):
            with pytest.raises(JaxmergeError, match=os.strerror(code)) as raised:
                write()
            assert str(tmp_path) in raised.value.where
            assert raised.value.expected
    directory.close()
    again = RunDirectory(tmp_path, {})
    assert again.candidates[0].scores == {"t": 1.0}
    again.close()


def test_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    RunDirectory("~/run", {"a": 1}).close()
    assert check("~/run", {"a": 1}) == ()
    assert (tmp_path / "run" / "config.json").exists()
    assert not (tmp_path / "~").exists()


def test_names_that_are_no_text(tmp_path):
    """A file name that is not UTF-8, and half of a surrogate pair."""
    directory = RunDirectory(tmp_path, {})
    odd = {"path": os.fsdecode(b"\xff\xfe"), "text": "\ud83d", "plain": "é"}
    directory.write_json("odd.json", odd)
    assert directory.read_json("odd.json") == odd
    directory.close()


def test_the_trace_of_a_run_that_was_not_begun_is_no_obstacle(tmp_path):
    (tmp_path / "error-20260101T000000-1.log").write_text("")
    assert check(tmp_path, {}) == ()
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(JaxmergeError, match=r"notes\.txt"):
        check(tmp_path, {})
