"""Small runs for tools/chaos.py: what they are, and how they are begun, waited for and killed.

They are forked from a process that has the imports, so that what is disturbed are runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

PATIENCE = 3600.0  # seconds that a run may take, on a machine that others keep busy
# What a run imports late; a run that is killed is to be in the middle of something else.
IMPORTS = (
    *("jaxmerge.run", "jaxmerge.sweep.__main__", "jaxmerge.experiment.search"),
    *("jaxmerge.experiment.merge", "jaxmerge.experiment.results", "jaxmerge.streaming.merge"),
    *("jaxmerge.experiment.speech", "jaxmerge.models.decoder", "jaxmerge.models.names"),
    # Not evosax, whose import starts a backend of JAX with its threads, which no fork has.
    *("orbax.checkpoint.experimental.v1", "optax", "flax.linen", "tensorstore", "transformers"),
    *("transformers.models.auto.tokenization_auto", "transformers.models.llama"),
    "transformers.models.llama.configuration_llama",  # and with it torch
    "tests.tiny",
)
CONFIG = """
from jaxmerge import config as configs
from tests import tiny

def get_config():
    config = tiny.run_config(configs.default(), {pool!r})
    config.tasks.generation = {{"builder": "tests.tiny:generation", "search": 6, "test": 6}}
    config.tasks.choice = {{"builder": "tests.tiny:choice", "search": 6, "test": 6}}
    config.heldout, config.baselines = (), ("uniform", "greedy")
    config.objective.search_examples = config.objective.test_examples = 6
    config.search.budget, config.compilation_cache = 8, ""  # see `remember_programs`
    return config
"""


def remember_programs(directory: Path) -> None:
    """Every program that a run compiles is kept for the others; before JAX is imported.

    `compilation_cache` would leave out those that take less than 0.3 s, which are most of them.
    """
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(directory)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


class Job(NamedTuple):
    """A command on a tiny pool."""

    module: str
    flags: tuple[str, ...]
    pool: str = "pool"

    def typed(self, top: Path, workdir: Path) -> list[str]:
        """The arguments of the command."""
        return [f"--config={top / self.pool}.py", f"--workdir={workdir}", *self.flags]


JOBS = {
    "search": Job("jaxmerge.run", ()),
    "gradient": Job(
        "jaxmerge.run",
        ("--config.search.strategy=gradient", "--config.space.granularity=leaf")
        + ("--config.search.minibatch=3",),
    ),
    "merge": Job(
        "jaxmerge.run",
        ("--mode=merge", "--config.merge.weights=(0.5,0.25,0.25)")
        + ("--config.export.formats=('huggingface','orbax')",),
        "models",
    ),
    "export": Job(
        "jaxmerge.run",
        ("--config.export.formats=('huggingface','orbax')", "--config.search.budget=4")
        + ("--config.pool.tokenizer=bytes",),
        "models",
    ),
    "sweep": Job("jaxmerge.sweep", ("--sweep=seed=0,1", "--config.search.budget=4")),
}


class Ended(NamedTuple):
    """How a run ended; code -9: it was killed."""

    code: int
    said: str
    calls: int  # that were counted, of writes or reads


def nothing(_: Path) -> None:
    """Before a run that nothing disturbs."""


class Place:
    """Pools, configs and run directories of one session."""

    def __init__(self, top: Path):
        self.top, self._runs = top, 0
        _forked(lambda: _make_pools(top))
        for name in ("pool", "models"):
            (top / f"{name}.py").write_text(CONFIG.format(pool=str(top / name)))

    def workdir(self) -> Path:
        self._runs += 1
        return self.top / "runs" / str(self._runs)

    def start(
        self, job: Job, workdir: Path, prepare: Callable[[Path], object] = nothing
    ) -> tuple[int, Path]:
        """Forks a run; what it says goes to a file beside the directory."""
        workdir.parent.mkdir(exist_ok=True)
        said = workdir.with_suffix(".said")
        flags = job.typed(self.top, workdir)
        return fork(lambda: command(job.module, flags, prepare), said), said

    def run(
        self,
        job: Job,
        workdir: Path,
        kill_after: float = PATIENCE,
        prepare: Callable[[Path], object] = nothing,
    ) -> Ended:
        pid, said = self.start(job, workdir, prepare)
        code = wait(pid, kill_after)
        if code == -9 and kill_after == PATIENCE:
            raise AssertionError(f"a run hangs: {workdir}")
        return ended(code, said)


def ended(code: int, said: Path) -> Ended:
    """How a run has ended that printed into a file."""
    text = said.read_text(errors="replace")
    calls = [line for line in text.splitlines() if line.startswith("calls ")]
    return Ended(code, text[-3000:], int(calls[-1].split()[1]) if calls else 0)


def wait(pid: int, seconds: float) -> int:
    """The exit code of a process, which is killed when the time is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def command(module: str, flags: list[str], prepare: Callable[[Path], object]) -> int:
    """A command in this process; returns its exit code."""
    sys.argv = [module, *flags]
    workdir = Path(next(flag for flag in flags if flag.startswith("--workdir=")).split("=", 1)[1])
    code = 0
    try:
        prepare(workdir)
        name = "jaxmerge.sweep.__main__" if module == "jaxmerge.sweep" else module
        importlib.import_module(name).console()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:  # as Python does at its end: the hook may end the process
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    with contextlib.suppress(AttributeError):
        print(f"\ncalls {ctypes.CDLL(None).fault_count()}", flush=True)
    return code


def fork(do: Callable[[], int], said: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        stream = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        code = do()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _forked(do: Callable[[], object]) -> None:
    """Does something in a process of its own: JAX must not begin in the one that is forked."""

    def whole() -> int:
        do()
        return 0

    with tempfile.NamedTemporaryFile() as said:
        code = wait(fork(whole, Path(said.name)), PATIENCE)
        assert code == 0, Path(said.name).read_text()


def _make_pools(top: Path) -> None:
    import numpy as np

    from tests import tiny
    from tools import fuzz_sound

    tiny.pool(top / "pool")
    for seed in range(3):
        directory = top / "models" / f"model{seed}"
        directory.mkdir(parents=True)
        fuzz_sound.llama(directory, vocab_size=256, hidden_size=16, eos_token_id=10)
        file = directory / "model.safetensors"
        data = bytearray(file.read_bytes())
        first = 8 + int.from_bytes(data[:8], "little")
        count = (len(data) - first) // 4
        values = np.random.default_rng(seed).standard_normal(count) * 0.5
        data[first:] = values.astype("<f4").tobytes()
        file.write_bytes(data)
