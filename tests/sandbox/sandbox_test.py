"""The sandbox: what is right passes, nothing else does, and nothing gets out or stays."""

import concurrent.futures
import contextlib
import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from jaxmerge.errors import JaxmergeError
from jaxmerge.sandbox import Limits, check, check_program, container, require, seccomp
from tests.sandbox.hostile_escapes import ESCAPES
from tests.sandbox.hostile_fakes import FAKES

CHECKOUT = Path(__file__).parents[2]
LIMITS = Limits(wall_seconds=5.0, cpu_seconds=1, memory_bytes=2**27)
# Attacks that do no harm where nothing contains them.
HARMLESS = (
    "thread bomb",
    "memory bomb",
    "file in memory",
    "read the checkout",
    "read /etc",
    "read the environment",
    "read /proc",
    "tcp",
    "abstract socket",
)
# An argument, the body of `def f(x)`, and the value that it should return; all as text.
BENIGN = {
    "nothing": ("0", "pass", "None"),
    "integers": ("2**70", "return -x * 10**30", "-(2**70) * 10**30"),
    "floats": ("0.1", "return [x + 0.2, float('inf'), -0.0]", "[0.1 + 0.2, float('inf'), -0.0]"),
    "nan": ("float('nan')", "return x != x", "True"),
    "booleans": ("True", "return not x", "False"),
    "complex numbers": ("1j", "return x * x", "complex(-1, 0)"),
    "texts": (r"'ä\n\0\U0001f600'", "return x[::-1]", r"'\U0001f600\0\nä'"),
    "half characters": (r"'\ud800'", "return x", r"'\ud800'"),
    "bytes": (r"b'\xff\0'", "return x * 2", r"b'\xff\0\xff\0'"),
    "tuples": ("(1, (2, []))", "return x + (3,)", "(1, (2, []), 3)"),
    "sets": ("{1, 'a', (2,)}", "return x | {None}", "{1, 'a', (2,), None}"),
    "frozen sets": ("frozenset([1])", "return {x: x}", "{frozenset([1]): frozenset([1])}"),
    "dicts": ("{1: 'a', (2, 3): 0}", "return {v: k for k, v in x.items()}", "{'a': 1, 0: (2, 3)}"),
    "dicts that look like tags": ("{'tuple': [1]}", "return x", "{'tuple': [1]}"),
    "ranges": ("range(3)", "return x[::-1]", "range(2, -1, -1)"),
    "counters": ("'aab'", "import collections; return collections.Counter(x)", "{'a': 2, 'b': 1}"),
    "nesting": ("[[1]]", "return {'a': (x, {1: [x[0]]})}", "{'a': ([[1]], {1: [[1]]})}"),
    "recursion": ("300", "return 0 if x == 0 else 1 + f(x - 1)", "300"),
    "printing": ("'x'", "print(x * 1000000); return x", "'x'"),
    "imports": ("16", "import math, re, random, statistics; return math.isqrt(x)", "4"),
    "no input": ("0", "import sys; return sys.stdin.read()", "''"),
    "files": ("'x'", "open('a', 'w').write(x); return open('/tmp/a').read()", "'x'"),
    "threads": (
        "-3",
        "import concurrent.futures as c; return c.ThreadPoolExecutor(2).submit(abs, x).result()",
        "3",
    ),
    "data classes": (
        "3",
        "import dataclasses as d; return d.asdict(d.make_dataclass('A', ['y'])(x))",
        "{'y': 3}",
    ),
}


@pytest.fixture
def marker(monkeypatch):
    """A word in the command line of every process that this test's sandboxes start."""
    word = f"jaxmerge-{uuid.uuid4()}"
    monkeypatch.setattr(check, "_INSIDE", f"# {word}\n{check._INSIDE}")
    return word


def _processes(word):
    """Those that have the word in their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if word.encode() in entry.read_bytes():
                found.append(entry.parent.name)
    return found


@pytest.fixture
def host(monkeypatch):
    """What attacks are after, by the words that stand for it in them."""
    monkeypatch.setenv("JAXMERGE_SECRET", "secret")
    abstract = f"jaxmerge-{uuid.uuid4()}"
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.socket(socket.AF_UNIX) as other,
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as bystander,
    ):
        other.bind(f"\0{abstract}")
        other.listen()
        yield {
            "HOST_PID": str(bystander.pid),
            "PORT": str(listener.getsockname()[1]),
            "ABSTRACT": abstract,
            "SECRET": "JAXMERGE_SECRET",
            "HOME": str(Path.home()),
            "CHECKOUT": str(CHECKOUT),
        }
        assert bystander.poll() is None
        bystander.kill()


@pytest.mark.parametrize("name", BENIGN)
def test_a_right_program_passes_and_no_other_value_does(name):
    argument, body, value = BENIGN[name]
    program = f"def f(x):\n    {body}\n"
    right = (
        f"got = candidate({argument})\nassert got == {value} and type(got) is type({value}), got"
    )
    assert check_program(program, right, "f", limits=LIMITS) == (True, "")
    wrong = f"assert candidate({argument}) == ({value}, 1)"
    assert not check_program(program, wrong, "f", limits=LIMITS).passed


def _filled_in(program, host):
    for word, meaning in host.items():
        program = program.replace(word, meaning)
    return program


@pytest.mark.parametrize("name", HARMLESS)
def test_an_attack_wins_where_there_is_no_sandbox(name, host):
    program = f"{_filled_in(ESCAPES[name][0], host)}\nprint(attack())"
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, capture_output=True, text=True, timeout=60).stdout == "won\n"


@pytest.mark.parametrize("name", ESCAPES)
def test_nothing_gets_out(name, host, marker):
    program, stopped = ESCAPES[name]
    passed, what = check_program(
        _filled_in(program, host),
        'got = candidate()\nassert got == "won", got',
        "attack",
        limits=LIMITS,
    )
    assert not passed
    assert re.fullmatch(f'assert got == "won", got: AssertionError: ({stopped})', what), what
    assert not _processes(marker)


@pytest.mark.parametrize("name", FAKES)
def test_nothing_fakes_a_success(name, marker):
    program, reason = FAKES[name]
    limits = dataclasses.replace(LIMITS, wall_seconds=2.0)
    passed, what = check_program(program, "assert candidate() == 4711", "attack", limits=limits)
    assert not passed
    assert re.search(reason, what), what
    assert what.isprintable()
    assert not _processes(marker)


def test_a_program_keeps_its_state_between_calls_and_its_arguments_to_itself():
    program = "calls = []\ndef f(x):\n    x.append(7)\n    calls.append(x)\n    return len(calls)"
    tests = (
        "given = [1]\nassert candidate(given) == 1 and given == [1]\nassert candidate(x=[]) == 2"
    )
    assert check_program(program, tests, "f", limits=LIMITS).passed


def test_tests_see_exceptions_as_what_they_are():
    program = "class Odd(ValueError): pass\ndef f(x): raise [KeyError(x), Odd(x), StopIteration][x]"
    tests = """
kinds = []
for number in range(3):
    try:
        candidate(number)
    except (KeyError, ValueError, RuntimeError) as error:
        kinds.append(type(error))
assert kinds == [KeyError, ValueError, RuntimeError], kinds
"""
    assert check_program(program, tests, "f", limits=LIMITS) == (True, "")


def test_the_line_that_failed_is_named():
    tests = (
        "def check():\n    assert candidate(1) == 1\n    assert candidate(2) == 3, 'no'\ncheck()"
    )
    assert check_program("def f(x): return x", tests, "f", limits=LIMITS) == (
        False,
        "assert candidate(2) == 3, 'no': AssertionError: no",
    )


def test_tests_that_go_wrong_by_themselves_fail():
    assert not check_program("def f(): return 1", "assert (", "f", limits=LIMITS).passed
    assert not check_program("def f(): return 1", "while True: pass", "f", limits=LIMITS).passed
    assert not check_program("def f(): return 1", "raise SystemExit(0)", "f", limits=LIMITS).passed


def test_threads_judge_side_by_side():
    """Each gets the verdict of its own program."""

    def passes(number):
        program = f"def f(x): return x * {number}"
        return check_program(program, f"assert candidate(2) == {number // 2 * 4}", "f").passed

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(passes, range(24))) == [True, False] * 12


def test_the_machine_is_left_as_it_was(marker):
    """No process, file, mount or open descriptor remains."""
    places = [Path.home(), CHECKOUT, Path("/tmp"), Path("/dev/shm"), Path("/var/tmp"), Path("/etc")]
    program = f"""
import os, time
def f():
    for place in {[str(place) for place in places]}:
        try:
            os.makedirs(place, exist_ok=True)
            open(place + "/{marker}", "w").write("x")
        except OSError:
            pass
    for _ in range(2):
        if os.fork() == 0:
            os.setsid()
            time.sleep(1e6)
    return 1
"""
    assert check_program(program, "assert candidate() == 1", "f", limits=LIMITS).passed
    mounts, descriptors = Path("/proc/self/mounts").read_text(), os.listdir("/proc/self/fd")
    for tests in ("assert candidate() == 1", "assert candidate() == 2", "while True: pass"):
        check_program(program, tests, "f", limits=LIMITS)
    assert not _processes(marker)
    assert not [place for place in places if (place / marker).exists()]
    assert Path("/proc/self/mounts").read_text() == mounts
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)


def test_nothing_survives_the_death_of_jaxmerge(marker):
    code = (
        "from jaxmerge.sandbox import check, check_program, Limits\n"
        f"check._INSIDE = '# {marker}\\n' + check._INSIDE\n"
        "check_program('import time\\ntime.sleep(1e6)', '', 'f', limits=Limits(wall_seconds=600))"
    )
    # Two sandboxes: bubblewrap outside and inside, and Python, of each.
    with subprocess.Popen([sys.executable, "-c", code], cwd=CHECKOUT) as process:
        assert _within(20.0, lambda: len(_processes(marker)) >= 6)
        process.send_signal(signal.SIGKILL)
    assert _within(10.0, lambda: not _processes(marker))


def _within(seconds, holds):
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)
    return holds()


def test_one_bubblewrap_does_for_who_is_not_root(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    program = "def f():\n    import os\n    return os.listdir('/')"
    tests = "assert not {'proc', 'home', 'work'} & set(candidate())"
    assert check_program(program, tests, "f", limits=LIMITS) == (True, "")
    assert not check_program(program, "assert candidate() == 1", "f", limits=LIMITS).passed


def test_where_bubblewrap_is_missing_the_install_line_is_said(monkeypatch):
    monkeypatch.setenv("PATH", "")
    check._works.cache_clear()
    with pytest.raises(JaxmergeError, match=r"task x: .*apt-get install bubblewrap\n.*bwrap"):
        require("task x")
    monkeypatch.undo()
    require("task x")


def test_a_sandbox_that_does_not_start_is_no_verdict(monkeypatch):
    """A machine that cannot judge must not look like a model that cannot code."""
    monkeypatch.setattr(container, "_ALL_NAMESPACES", ("--no-such-option",))
    with pytest.raises(JaxmergeError, match=r"does not start\n.*\n.*Unknown option"):
        check_program("def f(): return 1", "", "f")


def test_a_machine_without_a_filter_is_refused():
    with pytest.raises(JaxmergeError, match=r"this machine\n.*x86_64 or aarch64\n.*riscv64"):
        seccomp.filter_program("riscv64")
    assert seccomp.filter_program("x86_64") != seccomp.filter_program("aarch64")
