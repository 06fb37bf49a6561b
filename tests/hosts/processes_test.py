"""Several processes: the same candidates as one; a lost one is missed; and any number goes on."""

import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxmerge.errors import JaxmergeError
from jaxmerge.hosts import processes, watch
from tests import tiny
from tests.command import Command

# Models on four devices each, two at a time: pools, prompts and scores are spread over processes.
MESH = 'config.mesh = {{"pop": {pop}, "data": {data}, "fsdp": {fsdp}, "tensor": {tensor}, '
MESH += '"cpu_devices": {devices}}}'


def mesh(devices: int, pop: int = 8, data: int = 1, fsdp: int = 1, tensor: int = 1) -> str:
    return MESH.format(pop=pop, data=data, fsdp=fsdp, tensor=tensor, devices=devices)


SMALL = mesh(2, pop=4)  # two processes of two devices


class Processes:
    """A command that runs as several processes."""

    def __init__(self, directory: Path, pool: Path, change: str, count: int = 2):
        directory.mkdir(exist_ok=True)
        self.command, self.count = Command(directory, pool, change), count

    def flags(self) -> list[tuple[str, ...]]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            where = f"--coordinator=127.0.0.1:{free.getsockname()[1]}"
        count = f"--processes={self.count}"
        return [(where, count, f"--process={i}") for i in range(self.count)]

    def start(self) -> list[subprocess.Popen[str]]:
        return [self.command.start(*flags) for flags in self.flags()]

    def run(self) -> list[tuple[int, str, str]]:
        return [_ended(process) for process in self.start()]


def _ended(process: subprocess.Popen[str], seconds: float = 600) -> tuple[int, str, str]:
    """Its exit code and what it said; a process that hangs is killed, and the test fails."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"it hangs:\n{out}\n{err}") from None
    return process.returncode, out, err


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return tiny.pool(tmp_path_factory.mktemp("pool"))


def _results(command: Command) -> dict:
    return json.loads((command.workdir / "results.json").read_text())


@pytest.mark.slow
def test_two_processes_find_what_one_finds(pool, tmp_path):
    shape = {"pop": 2, "data": 2, "fsdp": 2}
    one = Command(tmp_path, pool, mesh(8, **shape))
    code, out, err = one.run()
    assert code == 0, err
    two = Processes(tmp_path / "two", pool, mesh(4, **shape))
    (code, first, err), (other_code, other, other_err) = two.run()
    assert (code, other_code) == (0, 0), err + other_err
    # The same programs on the same devices: the same bits.
    assert tiny.log(two.command.workdir) == tiny.log(one.workdir)
    assert _results(two.command)["best"] == _results(one)["best"]
    assert _said(first, two.command) == _said(out, one)
    assert not _said(other, two.command)


GRADIENT = """; config.search.strategy, config.space.granularity = "gradient", "leaf"
; config.baselines = ()
; config.search.steps, config.search.score_every, config.search.minibatch = 4, 2, 4
; config.objective.tasks, config.heldout = ("choice",), ()
; config.analyses.leave_one_out = config.analyses.transfer = False
""".replace("\n", "")


# The weighted sum, and one whose coefficients a method makes.
CLIMBED = {"linear": "", "multislerp": '; config.merge.method = "multislerp"'}


@pytest.mark.slow
@pytest.mark.parametrize("method", CLIMBED.values(), ids=CLIMBED)
def test_two_processes_climb_as_one_does(pool, tmp_path, method):
    """Along the same gradients, with models that are spread over both."""
    shape = {"pop": 1, "data": 1, "fsdp": 2, "tensor": 2}
    one = Command(tmp_path, pool, mesh(4, **shape) + GRADIENT + method)
    code, _, err = one.run()
    assert code == 0, err
    two = Processes(tmp_path / "two", pool, mesh(2, **shape) + GRADIENT + method)
    for code, _, err in two.run():
        assert code == 0, err
    assert tiny.log(two.command.workdir) == tiny.log(one.workdir)


def _said(out: str, command: Command) -> str:
    """The table and what follows, without paths; Gloo prints of its connections before."""
    start = out.find("test scores")
    return out[start:].replace(str(command.workdir), "") if start >= 0 else ""


@pytest.fixture(scope="module")
def uninterrupted(pool, tmp_path_factory):
    two = Processes(tmp_path_factory.mktemp("whole") / "two", pool, SMALL)
    for code, _, err in two.run():
        assert code == 0, err
    return two.command


def _kill_somewhere(two: Processes, which: int, instants: random.Random) -> tuple[int, str, float]:
    """Kills one of the processes at work; how the other ends, what it says, and when."""
    started = two.start()
    log = two.command.workdir / "candidates.jsonl"
    before = log.read_bytes().count(b"\n") if log.exists() else 0
    while all(process.poll() is None for process in started):
        if log.exists() and log.read_bytes().count(b"\n") > before:
            break
        time.sleep(0.01)
    time.sleep(instants.uniform(0, 1))
    started[which].kill()
    killed = time.monotonic()
    code, _, err = _ended(started[1 - which])
    seconds = time.monotonic() - killed
    _ended(started[which])
    return code, err, seconds


@pytest.mark.slow
def test_killed_at_random_instants_the_other_ends_and_both_go_on(pool, uninterrupted, tmp_path):
    two = Processes(tmp_path / "killed", pool, SMALL)
    instants, missed = random.Random(1), 0
    for k in range(3):
        code, err, seconds = _kill_somewhere(two, k % 2, instants)
        if code == 0:  # it had ended before
            continue
        missed += 1
        assert code == watch.LOST, err
        assert f"process {k % 2} is gone" in err
        assert "the same command goes on" in err
        assert "Traceback" not in err
        assert seconds < 60
    assert missed >= 2
    for code, _, err in two.run():
        assert code == 0, err
    assert tiny.log(two.command.workdir) == tiny.log(uninterrupted.workdir)
    assert _results(two.command)["best"] == _results(uninterrupted)["best"]


BUSY = """
import os, signal, sys, time
from jaxmerge.hosts import processes, watch

processes.connect(sys.argv[1], 2, int(sys.argv[2]))
watch.begin(int(sys.argv[2]), 2, processes.from_first)
if sys.argv[2] == "0":
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
sys.setswitchinterval(1)  # the main thread lets no other thread speak for a second
while True:
    pass
"""


@pytest.mark.slow
def test_the_watch_speaks_before_jax_aborts_a_process_that_is_busy():
    """JAX aborts as soon as it misses process 0, without words of ours and with another code."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        where = f"127.0.0.1:{free.getsockname()[1]}"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", BUSY, where, index], stderr=subprocess.PIPE, text=True
        )
        for index in "01"
    ]
    (killed, _, _), (code, _, err) = map(_ended, started)
    assert (killed, code) == (-signal.SIGKILL, watch.LOST), err
    assert "process 0 is gone" in err


@pytest.mark.slow
def test_another_number_of_processes_goes_on(pool, uninterrupted, tmp_path):
    begun, one = 7, Command(tmp_path, pool, mesh(4, pop=2, data=2))
    kept = shutil.ignore_patterns("results.json", "report.html", "merged")
    shutil.copytree(uninterrupted.workdir, one.workdir, ignore=kept)
    log = one.workdir / "candidates.jsonl"  # as a kill leaves it
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:begun]))
    code, _, err = one.run()
    assert code == 0, err
    assert "the run goes on elsewhere (mesh.cpu_devices: 2 there, 4 now)" in err
    whole = tiny.log(uninterrupted.workdir)
    assert begun < len(whole)
    assert len(tiny.log(one.workdir)) == len(whole)
    assert tiny.log(one.workdir)[:begun] == whole[:begun]


@pytest.mark.slow
def test_preempted_it_ends_at_once_and_tells_the_others(pool, tmp_path):
    two = Processes(tmp_path / "preempted", pool, SMALL)
    started = two.start()
    log = two.command.workdir / "candidates.jsonl"
    while not (log.exists() and log.read_bytes()) and started[0].poll() is None:
        time.sleep(0.01)
    told = time.monotonic()
    started[1].terminate()
    (code, _, err), (told_code, _, told_err) = map(_ended, started)
    assert time.monotonic() - told < 20
    assert (code, told_code) == (watch.LOST, 128 + signal.SIGTERM), err + told_err
    assert "process 1 ended: it was told to stop by SIGTERM" in err
    assert "the same command goes on" in told_err


@pytest.mark.slow
def test_processes_that_were_started_differently_are_refused(pool, tmp_path):
    two = Processes(tmp_path / "differ", pool, SMALL)
    first, second = (list(flags) for flags in two.flags())
    ended = [
        _ended(process)
        for process in (
            two.command.start(*first),
            two.command.start(*second, "--config.search.budget=8"),
        )
    ]
    for code, _, err in ended:
        assert code == 2
        assert "the config must be the same in all processes" in err


def test_numbers_that_make_no_sense_are_refused():
    with pytest.raises(JaxmergeError, match="--coordinator"):
        processes.connect("", 2, 0)
    for count, index in ((None, None), (2, None), (2, 2), (2, -1)):
        with pytest.raises(JaxmergeError, match="--processes=N"):
            processes.connect("localhost:1", count, index)


def test_alone_everything_is_the_identity():
    assert not processes.several()
    assert processes.first()
    assert processes.from_first(lambda: b"said") == b"said"
    processes.agree("nothing", b"")
    assert processes.spread(lambda items: [2.0 * item for item in items], [1, 2]).tolist() == [2, 4]
