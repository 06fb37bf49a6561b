"""Whatever ends a command, it says so in one message; from its first moment on."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from jaxmerge import entry
from jaxmerge.errors import JaxmergeError, told
from tests.command import ROOT

# Runs a module as a command, and sends the process a signal when something is first imported.
_STOPPED = """
import os, runpy, signal, sys, threading

class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == {at!r}:
            os.kill(os.getpid(), signal.{number})
            threading.Event().wait(60)
            os._exit(99)

sys.meta_path.insert(0, Stop())
sys.argv = [{module!r}, *{arguments!r}]
runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
"""

_FAILING = """
from jaxmerge import entry
entry.begin()
entry.keep_traces_in({place!r})
{code}
"""


def python(program: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-c", program],
        **{"cwd": ROOT, "env": {**os.environ, "PYTHONPATH": str(ROOT)}},
        **{"capture_output": True, "text": True, "timeout": 120},
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("module", "at", "number"),
    [
        ("jaxmerge.run", "absl", "SIGINT"),
        ("jaxmerge.run", "jax._src.numpy", "SIGTERM"),
        ("jaxmerge.plan", "jaxmerge.planning", "SIGINT"),
        ("jaxmerge.sweep", "jaxlib", "SIGINT"),
        ("jaxmerge.report", "argparse", "SIGTERM"),
        ("jaxmerge.report", "plotly", "SIGINT"),
        ("jaxmerge.lm_eval_model", "jaxlib", "SIGINT"),
        ("jaxmerge", "jax", "SIGTERM"),
    ],
)
def test_stopped_while_it_imports(tmp_path, module, at, number):
    directory = "--out" if module == "jaxmerge" else "--workdir"
    arguments = {
        "jaxmerge": ["merge", "a", "b"],
        "jaxmerge.report": [str(tmp_path)],
    }.get(module, [])
    if module != "jaxmerge.report":
        arguments = [*arguments, f"{directory}={tmp_path / 'run'}"]
    else:  # a run that is there, so that it comes to the page
        from tests.report.fabricated import fabricate

        fabricate(tmp_path)
    code, out, err = python(
        _STOPPED.format(at=at, number=number, module=module, arguments=arguments)
    )
    assert code == 128 + signal.Signals[number]
    assert err.strip() == "jaxmerge: stopped; the same command goes on from here"
    assert out == ""


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import json; json.loads('[')", "JSONDecodeError"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_what_nobody_foresaw_is_one_line_and_a_trace_in_a_file(tmp_path, code, said):
    status, _, err = python(_FAILING.format(place=str(tmp_path), code=code))
    assert status == entry.UNFORESEEN == 70
    (line,) = err.strip().splitlines()
    assert said in line
    assert "please report" in line.lower()
    (log,) = tmp_path.glob("error-*.log")
    assert str(log) in line
    assert "Traceback" in log.read_text()
    assert "jax " in log.read_text()


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("open('/proc/self/cmdline/x')", 2, "a directory; one of its parents is a file"),
        (f"raise OSError({errno.ENOSPC}, 'full', 'a/b')", 2, "a/b: the system refuses"),
        ("raise MemoryError", 2, "not enough memory on this machine"),
        ("from jaxmerge.errors import JaxmergeError as E; raise E('so')", 2, "jaxmerge: so\n"),
        ("import os; os.close(1); os.open('/dev/full', os.O_WRONLY); print('x')", 2, "room on"),
    ],
)
def test_what_the_system_refuses_is_a_message(tmp_path, code, status, said):
    code = code + "\nimport sys; sys.stdout.flush()"
    found, _, err = python(_FAILING.format(place=str(tmp_path), code=code))
    assert found == status, err
    assert said in err
    assert "Traceback" not in err
    assert not [*tmp_path.iterdir()]


def test_a_place_that_can_not_be_written_to(tmp_path, monkeypatch):
    """The trace goes to the next; where there is none, it is shown."""
    monkeypatch.setattr(entry, "_places", [str(tmp_path / "missing")])
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert str(tmp_path) in entry.unforeseen(KeyError("x"))
    assert len([*tmp_path.glob("error-*.log")]) == 1
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "missing"))
    assert "KeyError: 'x'" in entry.unforeseen(KeyError("x"))


def test_what_is_foreseen():
    """A missing file is mostly a mistake of ours: what a caller names is looked at before."""
    assert told(FileNotFoundError(errno.ENOENT, "no such file", "x")) is None
    assert told(KeyError("x")) is None
    assert isinstance(told(OSError(errno.EDQUOT, "Disk quota exceeded", "x")), JaxmergeError)
    exhausted = type("JaxRuntimeError", (RuntimeError,), {})("RESOURCE_EXHAUSTED: 9 GB")
    assert "jaxmerge plan" in str(told(exhausted))


def test_nobody_reads(tmp_path):
    """As in `jaxmerge ... | head -1`."""
    program = _FAILING.format(place=str(tmp_path), code="for i in range(10**6): print(i)")
    with subprocess.Popen(
        [sys.executable, "-c", program],
        **{"cwd": ROOT, "env": {**os.environ, "PYTHONPATH": str(ROOT)}},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True},
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 141


@pytest.mark.parametrize(
    "mistake", ["def get_config(:", "1 / 0", "import no_such_module", "int('x')"]
)
@pytest.mark.parametrize(
    "flag", ["--config={}/mine.py", "--config {}/mine.py", "--config=~/mine.py"]
)
def test_a_config_file_with_a_mistake_is_named(tmp_path, monkeypatch, mistake, flag):
    """It is a program of the user's, and can fail in any way."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text(f"from jaxmerge.config import default\n{mistake}\n")
    flags = [*flag.format(tmp_path).split(), f"--workdir={tmp_path}/run"]
    started = f"import sys; sys.argv[1:] = {flags}; from jaxmerge import run; run.console()"
    code, _, err = python(started)
    assert code == entry.WRONG, err
    assert "mine.py, line 2: the config file fails with" in err
    assert "Traceback" not in err
    assert "should not have happened" not in err
