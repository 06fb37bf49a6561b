"""What reads files that others wrote, each with a sound input and a way to spoil it.

Any input gives a right result or one message, a `JaxmergeError`: no other exception, no hang, no
memory beyond a bound. `tests/tools/fuzz_test.py` tries a few inputs, `tools/fuzz.py` as many as
there is time for.
"""

from __future__ import annotations

import contextlib
import functools
import json
import resource
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tools.fuzz_sound import (
    ADAPTER,
    EVOLVE,
    LLAMA,
    MERGE,
    as_bytes,
    llama,
    run_directory,
    tokenizer_files,
    weights,
)

SECONDS = 20  # of work that an input may take; sound ones take a tenth of a second
IDLE = 300  # seconds that it may take on a machine that is busy with something else
BYTES = 2**28  # that it may add to the memory of the process
MESSAGE = 20_000  # characters


class Reader(NamedTuple):
    """A sound input, or several, and what reads one."""

    seeds: tuple[bytes, ...]
    read: Callable[[bytes], object]


def safetensors(directory: Path) -> Reader:
    from etils import epath

    from jaxmerge.checkpoints.safetensors import read_header

    file = directory / "model.safetensors"
    weights(file, {"a": (2, 3), "b": (), "c": (0, 4)})
    return Reader((file.read_bytes(),), into(file, lambda: read_header(epath.Path(file))))


def npz(directory: Path) -> Reader:
    import numpy as np
    from etils import epath

    from jaxmerge.checkpoints import npz as arrays

    file, values = directory / "m.npz", {"params/a": np.ones((2, 3), "f4"), "opt/b": np.ones(2)}
    seeds = []
    for write in (np.savez, np.savez_compressed):
        write(file, allow_pickle=False, **values)
        seeds.append(file.read_bytes())

    def read() -> object:
        source = arrays.describe("m", epath.Path(file))
        return arrays.restore(source, source.abstract)

    return Reader(tuple(seeds), into(file, read))


def index(directory: Path) -> Reader:
    from etils import epath

    from jaxmerge.checkpoints import directory as checkpoint

    parts = {"model-1.safetensors": {"a": (2, 3)}, "model-2.safetensors": {"b": (4,)}}
    for name, tensors in parts.items():
        weights(directory / name, tensors)
    names = {tensor: file for file, tensors in parts.items() for tensor in tensors}
    seed = as_bytes({"metadata": {"total_size": 40}, "weight_map": names})
    file = directory / "model.safetensors.index.json"
    return Reader((seed,), into(file, lambda: checkpoint.read(epath.Path(directory))))


def config(directory: Path) -> Reader:
    from etils import epath

    from jaxmerge.checkpoints import directory as checkpoint

    llama(directory)
    families = ("qwen2", "gemma2", "mixtral", "gpt_neox", "unknown")
    seeds = [LLAMA, *({**LLAMA, "model_type": each} for each in families)]
    read = into(directory / "config.json", lambda: checkpoint.read(epath.Path(directory)))
    return Reader(tuple(map(as_bytes, seeds)), read)


def adapter_config(directory: Path) -> Reader:
    from etils import epath

    from jaxmerge.checkpoints import lora

    llama(directory / "base")
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    adapter = directory / "adapter"
    adapter.mkdir()
    factors = {f"{prefix}A.weight": (2, 8), f"{prefix}B.weight": (8, 2)}
    weights(adapter / "adapter_model.safetensors", factors)
    base, file = str(directory / "base"), adapter / "adapter_config.json"
    read = into(file, lambda: lora.describe("x", epath.Path(adapter), "", base))
    return Reader((as_bytes(ADAPTER),), read)


def mergekit(directory: Path) -> Reader:
    from jaxmerge.mergekit import document

    file = directory / "merge.yml"
    return Reader((MERGE.encode(),), into(file, lambda: document.read(str(file))))


def mergekit_evolve(directory: Path) -> Reader:
    from jaxmerge.mergekit import evolve

    file = directory / "evolve.yml"
    llama(directory / "a")

    def read() -> None:
        with contextlib.chdir(directory):  # what the file names is relative to that
            evolve.read(str(file))

    return Reader((EVOLVE.encode(),), into(file, read))


def jsonl(directory: Path) -> Reader:
    from jaxmerge.tasks.jsonl import jsonl as task

    file = directory / "task.jsonl"
    lines = [
        {"prompt": f"{i}+{i}=", "target": [str(i)], "a": {"text": ["x", f"y{i}"]}, "c": ["u", "v"]}
        for i in range(12)
    ]
    several = b"".join(as_bytes(line) + b"\n" for line in lines)

    def read() -> None:
        task(path=str(file), search=2, test=2, prompt="{prompt}{{{a.text.1}", judge="numeric")
        task(path=str(file), search=2, test=2, target="{a.text.0}", judge="regex")
        task(path=str(file), search=2, test=2, target="u", choices="c")

    return Reader((several, b"\xef\xbb\xbf" + several), into(file, read))


def vocabulary(directory: Path) -> Reader:
    """Tokens by number, for a merge of vocabularies that differ."""
    from jaxmerge.checkpoints import vocabulary

    seed = as_bytes(tokenizer_files()["tokenizer.json"])
    return Reader((seed,), into(directory / vocabulary.FILE, lambda: vocabulary.read(directory, 9)))


def weights_file(directory: Path) -> Reader:
    """A table of weights for a merge, or the winner of a search."""
    import numpy as np

    from jaxmerge import config as configs
    from jaxmerge.experiment import given

    settings = configs.default()
    settings.merge.weights_file = str(file := directory / "table.json")
    settings.merge.method, settings.space.granularity = "ties", "leaf"
    tree = {"a": np.zeros((2, 3)), "b": np.zeros(3)}
    best = {"weights": {"x": 0.5, "y": 0.5}, "groups": [[0.5, 0.5]] * 2, "genes": {"density": 0.5}}
    method = {"name": "ties", "fixed": {"lambda": 1.0}, "seed": 1}
    seeds = (
        {"weights": {"a": [0.1, 0.9], "b": [0.2, 0.8]}, "genes": {"density": {"a": 0.5, "b": 1.0}}},
        {"best": best, "groups": ["a", "b"], "method": method},
    )
    read = into(file, lambda: given.read(settings, tree, "", ("x", "y")))
    return Reader(tuple(map(as_bytes, seeds)), read)


def candidates(directory: Path) -> Reader:
    """The log, for a run that goes on."""
    from jaxmerge.rundir import RunDirectory

    run = run_directory(directory / "run")
    file = run / "candidates.jsonl"
    said = json.loads((run / "config.json").read_text())
    seed = b"".join(file.read_bytes().splitlines(keepends=True)[:6])
    return Reader((seed,), into(file, lambda: RunDirectory(run, said).close()))


def verdict(read: Callable[[bytes], object], data: bytes) -> str:
    """How reading an input ends: `read`, `refused`, or else what is wrong, with its trace.

    The main thread must ask: a hang is ended by an alarm.
    """
    from jaxmerge.errors import JaxmergeError

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with _alarm():
            read(data)
        said = "read"
    except JaxmergeError as error:
        said = "refused" if 0 < len(str(error)) < MESSAGE else f"a message of {len(str(error))}"
    except Exception:  # whatever it is: an error that is not a message is what is looked for
        return traceback.format_exc()
    except _Hang:
        return f"more than {SECONDS} seconds of work\n{traceback.format_exc()}"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return f"{grown} bytes of memory" if grown > BYTES else said


def into(file: Path, read: Callable[[], object]) -> Callable[[bytes], object]:
    """Writes an input into the file, and reads what it is a part of."""

    def write_and_read(data: bytes) -> object:
        file.write_bytes(data)
        return read()

    return write_and_read


def _of_run(directory: Path, name: str) -> Reader:
    from jaxmerge import report

    run = run_directory(directory / "run")
    seed = (run / name).read_bytes()
    return Reader((seed,), into(run / name, lambda: report.write(run)))


def _goes_on(directory: Path, name: str) -> Reader:
    """What a run wrote, for the run that goes on."""
    from jaxmerge.checkpoints.pool import Record
    from jaxmerge.experiment import records
    from jaxmerge.experiment.answers import Answers
    from jaxmerge.rundir import RunDirectory

    run = run_directory(directory / "run")
    said = json.loads((run / "config.json").read_text())
    of_pool = [Record(**one) for one in json.loads((run / "pool.json").read_text())["checkpoints"]]
    seed = (run / name).read_bytes()

    def read() -> None:
        with contextlib.closing(RunDirectory(run, said)) as opened:
            records.record_pool(opened, of_pool)
            records.record_tasks(opened, ())
            Answers(opened, "search")

    return Reader((seed,), into(run / name, read))


def _of_tokenizer(directory: Path, name: str) -> Reader:
    from jaxmerge.evaluation.tokenizer import Pretrained
    from jaxmerge.tasks.requests import Prompt

    files = tokenizer_files()
    for file, content in files.items():
        (directory / file).write_bytes(as_bytes(content))

    def read() -> None:
        made = Pretrained(str(directory), chat=True)
        made.decode(made.prompt(Prompt("abuser")))
        made.pair(Prompt("ab", form="text"), " a")
        made.pieces(first=True)

    return Reader((as_bytes(files[name]),), into(directory / name, read))


class _Hang(BaseException):
    """It takes too long; no code of ours catches it."""


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise _Hang

    timers = (
        (signal.ITIMER_PROF, signal.SIGPROF, SECONDS),
        (signal.ITIMER_REAL, signal.SIGALRM, IDLE),
    )
    before = [signal.signal(number, ring) for _, number, _ in timers]
    for timer, _, seconds in timers:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for (timer, number, _), handler in zip(timers, before):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


READERS: dict[str, Callable[[Path], Reader]] = {
    "safetensors": safetensors,
    "npz": npz,
    "index": index,
    "config": config,
    "adapter_config": adapter_config,
    "tokenizer": functools.partial(_of_tokenizer, name="tokenizer.json"),
    "tokenizer_config": functools.partial(_of_tokenizer, name="tokenizer_config.json"),
    "generation_config": functools.partial(_of_tokenizer, name="generation_config.json"),
    "vocabulary": vocabulary,
    "weights_file": weights_file,
    "mergekit": mergekit,
    "mergekit_evolve": mergekit_evolve,
    "jsonl": jsonl,
    "candidates": candidates,
    "candidates_page": functools.partial(_of_run, name="candidates.jsonl"),
    "config_goes_on": functools.partial(_goes_on, name="config.json"),
    "pool_goes_on": functools.partial(_goes_on, name="pool.json"),
    "outputs_goes_on": functools.partial(_goes_on, name="outputs.json"),
    "results": functools.partial(_of_run, name="results.json"),
    "run_config": functools.partial(_of_run, name="config.json"),
    "run_pool": functools.partial(_of_run, name="pool.json"),
    "run_tasks": functools.partial(_of_run, name="tasks.json"),
    "run_outputs": functools.partial(_of_run, name="outputs.json"),
}
# Those that parse bytes themselves, which is worth a look at what the bytes reach.
OF_BYTES = ("safetensors", "npz", "index", "adapter_config", "mergekit", "jsonl", "candidates")
