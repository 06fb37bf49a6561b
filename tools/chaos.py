"""Kills small runs, and lets their writes and reads fail: what comes out must be the same.

    python tools/chaos.py kills --count=100          SIGKILL at random instants
    python tools/chaos.py faults --job=merge         every write of a run fails, one after the other
    python tools/chaos.py faults --job=merge --warm  the same in one process, a third of the time
    python tools/chaos.py others                    two processes, a jumping clock, a changing pool

Each job runs once undisturbed. After a disturbance the same command is given again until it ends,
and must find what the undisturbed run found; or it says, with exit code 2, why it does not go on.
Nothing that was in the log before is lost. Runs are forked from a process that has the imports, so
that what is disturbed are runs. `faults.c` lets calls fail; cc compiles it. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

from tools.chaos_runs import IMPORTS, JOBS, PATIENCE, Ended, Job, Place, remember_programs, wait
from tools.chaos_warm import WarmPlace

SLOW = 240.0  # seconds: a run that a call failed of waits for what does not come
# Of the clock, seconds. TensorStore, which writes for Orbax, starts no thread before its clock is
# where it was: a jump back by years would be waited for.
JUMPS = (-60.0, 10 * 365.25 * 86400)
KINDS = {"ENOSPC": 1, "EIO": 2, "EINTR": 3, "short writes": 4, "short reads": 5, "EIO of reads": 6}


def found(workdir: Path) -> dict[str, Any]:
    """What a run found, without times: candidates, winner, and what it has written."""
    things: dict[str, Any] = {}
    for file in sorted(workdir.rglob("*")):
        name = str(file.relative_to(workdir))
        if file.name == "candidates.jsonl":
            things[name] = [{k: v for k, v in line.items() if k != "seconds"} for line in log(file)]
        elif file.name == "results.json":
            said = json.loads(file.read_text())
            things[name] = {key: said[key] for key in ("best", "individuals", "baselines")}
        elif file.suffix == ".safetensors":
            things[name] = file.read_bytes()
        elif file.name == "_CHECKPOINT_METADATA" and "merged" in name:
            said = json.loads(file.read_text())["custom_metadata"]["jaxmerge"]
            things[name] = said["checksums"]
        elif file.suffix == ".tmp" or ".tmp" in file.name:
            things["left behind"] = name
    return things


def log(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a log."""
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def check(before: dict[Path, bytes], workdir: Path, wanted: dict[str, Any]) -> str:
    """ "" where all is well: nothing of the logs before is lost, and what was found is the same."""
    for file, data in before.items():
        whole = data[: data.rfind(b"\n") + 1]
        if not file.exists() or not file.read_bytes().startswith(whole):
            return f"{file} has lost lines"
    now = found(workdir)
    differing = [key for key in {*now, *wanted} if now.get(key) != wanted.get(key)]
    return f"{workdir}: {', '.join(differing)} differ" if differing else ""


def logs(workdir: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in workdir.rglob("candidates.jsonl")}


def kills(place: Place, names: list[str], count: int, seed: int) -> Iterator[str]:
    """SIGKILLs, up to four in a row before a run may end; yields what is wrong."""
    draw, done = random.Random(seed), 0
    wanted, length = {}, {}
    for name in names:
        place.run(JOBS[name], place.workdir())  # compiles
        workdir, begun = place.workdir(), time.monotonic()
        ended = place.run(JOBS[name], workdir)
        assert ended.code == 0, ended.said
        wanted[name], length[name] = found(workdir), time.monotonic() - begun
        print(name, f"takes {length[name]:.1f} s", flush=True)
    while done < count:
        name = names[done % len(names)] if done % 2 else draw.choice(names)
        workdir, before = place.workdir(), {}
        for _ in range(draw.randint(1, 4)):
            ended = place.run(JOBS[name], workdir, draw.uniform(0.02, 1.0) * length[name])
            done += ended.code == -9
            before = logs(workdir)
            if ended.code != -9:
                break
        ended = place.run(JOBS[name], workdir)
        wrong = ended.said if ended.code else check(before, workdir, wanted[name])
        if wrong:
            yield f"{name}, killed: {wrong}"
        else:
            shutil.rmtree(workdir, ignore_errors=True)
        print(f"{done} kills, {name}{': ' + wrong if wrong else ''}", flush=True)


class Fault(NamedTuple):
    """What a run has before it: calls below a directory that are counted, and which one fails.

    Attributes:
        below: the directory; "": the run's own.
        at: the number of the call; 0: none fails.
    """

    below: str
    at: int
    kind: str

    def __call__(self, workdir: Path) -> None:
        directory = (self.below or str(workdir)).encode()
        ctypes.CDLL(None).fault_arm(directory, ctypes.c_long(self.at), KINDS[self.kind])


def faults(
    place: Place, name: str, kinds: list[str], every: int, first: int = 1, *, warm: bool = False
) -> Iterator[tuple[str, int, str]]:
    """Each call of a run fails, one after the other; yields kind, call and what is wrong."""
    job, workdir = JOBS[name], place.workdir()
    place.run(job, place.workdir())  # compiles
    assert place.run(job, workdir).code == 0
    wanted, shared = found(workdir), WarmPlace(place) if warm else None
    for kind in kinds:
        reads = KINDS[kind] >= KINDS["short reads"]
        below = str(place.top / job.pool) if reads else ""
        calls = place.run(job, place.workdir(), prepare=Fault(below, 0, kind)).calls
        print(f"{name}, {kind}: {calls} calls", flush=True)
        if shared:
            shared.run(job, place.workdir())  # compiles
            calls = max(calls, shared.run(job, place.workdir(), Fault(below, 0, kind)).calls)
            print(f"{name}, {kind}: {calls} calls, warm", flush=True)
        for at in range(first, calls + 1, every):
            fault = Fault(below, at, kind)
            wrong = _tried(shared or place, job, fault, wanted)
            if wrong and shared:
                print(f"{name}, {kind}, call {at}, warm: {wrong}", flush=True)
                wrong = _tried(place, job, fault, wanted)
            yield kind, at, wrong


def _tried(place: Place | WarmPlace, job: Job, fault: Fault, wanted: dict[str, Any]) -> str:
    """What is wrong with how a run ended that a call failed of, and with the run after it."""
    workdir, begun = place.workdir(), time.monotonic()
    try:
        hit = place.run(job, workdir, prepare=fault)
        took = time.monotonic() - begun
        wrong = _judged(place, job, workdir, hit, wanted)
        if took > SLOW:
            wrong += f" took {took:.0f} s: {hit.said}"
        traces = [log.read_text()[-3000:] for log in workdir.rglob("error-*.log") if wrong]
        return "\n".join([wrong, *traces])
    finally:
        shutil.rmtree(workdir, ignore_errors=True)


def _judged(
    place: Place | WarmPlace, job: Job, workdir: Path, hit: Ended, wanted: dict[str, Any]
) -> str:
    if hit.code not in (0, 2) or "Traceback" in hit.said:
        return f"exit code {hit.code}: {hit.said}"
    before = logs(workdir)
    again = place.run(job, workdir)
    if again.code == 0:
        return check(before, workdir, wanted)
    if again.code == 2 and "expected" in again.said:  # it says why, and the way out
        return "" if "different" in again.said else f"does not go on: {again.said}"
    return f"then exit code {again.code}: {again.said}"


def two(place: Place, name: str) -> str:
    """Two processes in one directory: one goes on, the other says why it does not."""
    job, alone, workdir = JOBS[name], place.workdir(), place.workdir()
    place.run(job, alone)
    started = [place.start(job, workdir) for _ in range(2)]
    codes = [wait(pid, PATIENCE) for pid, _ in started]
    texts = [said.read_text() for _, said in started]
    if sorted(codes) not in ([0, 0], [0, 2]):
        return f"exit codes {codes}: {texts}"
    return check({}, workdir, found(alone))


def clock(place: Place, name: str, seconds: float) -> str:
    """The clock jumps in the middle of a run, and back for the next start."""
    job, alone, workdir = JOBS[name], place.workdir(), place.workdir()
    place.run(job, alone)

    def jump(_: Path) -> None:
        ctypes.CDLL(None).fault_clock(ctypes.c_long(200), ctypes.c_long(int(seconds)))

    for prepare in (jump, lambda _: None):
        ended = place.run(job, workdir, prepare=prepare)
        if ended.code:
            return f"exit code {ended.code}: {ended.said}"
    return check({}, workdir, found(alone))


def changing(place: Place, name: str, seed: int) -> str:
    """A file of the pool is written anew while a run reads; it tells, or has read all before."""
    job, draw = JOBS[name], random.Random(seed)
    alone, workdir, pool = place.workdir(), place.workdir(), place.top / job.pool
    begun = time.monotonic()
    place.run(job, alone)
    length = time.monotonic() - begun
    files = [each for each in pool.rglob("*") if each.is_file() and each.stat().st_size > 4000]
    file = draw.choice(sorted(files))
    data = file.read_bytes()
    pid, said = place.start(job, workdir)
    time.sleep(draw.uniform(0.02, 0.9) * length)
    middle = len(data) // 2
    file.write_bytes(data[:middle] + data[middle:][::-1])
    code = wait(pid, PATIENCE)
    file.write_bytes(data)
    if code == 0:
        return check({}, workdir, found(alone))
    return "" if code == 2 else f"exit code {code}: {said.read_text()[-2000:]}"


def _with_faults(arguments: list[str]) -> None:
    """Compiles `faults.c`, and goes on as a process that has it."""
    library = Path(tempfile.mkdtemp(prefix="faults-")) / "faults.so"
    source = Path(__file__).with_name("faults.c")
    flags = ["-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
    subprocess.run([os.environ.get("CC", "cc"), *flags], check=True)
    os.environ["LD_PRELOAD"] = str(library)
    os.execv(sys.executable, [sys.executable, __file__, *arguments])


def _others(place: Place, names: list[str], count: int) -> Iterator[str]:
    for i in range(count):
        for name in names:
            yield f"two processes, {name}: {two(place, name) or 'well'}"
            yield f"clock, {name}: {clock(place, name, JUMPS[i % 2]) or 'well'}"
            yield f"changing pool, {name}: {changing(place, name, i) or 'well'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("kills", "faults", "others"))
    parser.add_argument("--count", type=int, default=100, help="of kills, or rounds of others")
    parser.add_argument("--job", default=",".join(JOBS))
    parser.add_argument("--kind", default=",".join(KINDS), help="of faults")
    parser.add_argument("--every", type=int, default=1, help="a fault at each so manieth call")
    parser.add_argument("--first", type=int, default=1, help="the first of them")
    parser.add_argument("--warm", action="store_true", help="faults of runs in one process")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.what != "kills" and "faults.so" not in os.environ.get("LD_PRELOAD", ""):
        _with_faults(sys.argv[1:])
    names, wrong, tried = given.job.split(","), 0, 0
    with tempfile.TemporaryDirectory(prefix="chaos-") as top:
        remember_programs(Path(top) / "cache")
        for module in IMPORTS:
            importlib.import_module(module)
        place = Place(Path(top))
        if given.what == "kills":
            for said in kills(place, names, given.count, given.seed):
                wrong += 1
                print("WRONG", said, flush=True)
        elif given.what == "others":
            for said in _others(place, names, given.count):
                tried, wrong = tried + 1, wrong + (not said.endswith("well"))
                print(said, flush=True)
        else:
            for name in names:
                kinds, calls = given.kind.split(","), (given.every, given.first)
                tries = faults(place, name, kinds, *calls, warm=given.warm)
                for kind, at, said in tries:
                    tried, wrong = tried + 1, wrong + bool(said)
                    print(f"{name}, {kind}, call {at}: {said or 'well'}", flush=True)
    print(f"{tried or given.count} tried, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
