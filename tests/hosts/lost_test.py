"""A lost process is missed, one that was told to stop says so, and any number goes on."""

import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from jaxmerge.hosts import watch
from tests import tiny
from tests.command import Command
from tests.processes import SMALL, Processes, ended, mesh, results


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return tiny.pool(tmp_path_factory.mktemp("pool"))


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
    code, _, err = ended(started[1 - which])
    seconds = time.monotonic() - killed
    ended(started[which])
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
    assert results(two.command)["best"] == results(uninterrupted)["best"]


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
    (killed, _, _), (code, _, err) = map(ended, started)
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
    (code, _, err), (told_code, _, told_err) = map(ended, started)
    assert time.monotonic() - told < 20
    assert (code, told_code) == (watch.LOST, 128 + signal.SIGTERM), err + told_err
    assert "process 1 ended: it was told to stop by SIGTERM" in err
    assert "the same command goes on" in told_err
