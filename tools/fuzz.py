"""Tries spoiled inputs on everything that reads files of others, for as long as it may.

    python tools/fuzz.py --seconds=3600 --seed=7   all readers, one after the other
    python tools/fuzz.py --inputs=500 --reader=safetensors,jsonl

Those that parse bytes are tried with atheris too, where it is installed: it goes on with the inputs
that reach code which no other has reached. What should not have happened is written to --out, once
for each place in the code, and makes the exit code 1. See tools/fuzz_readers.py.

With --inputs, the same seed tries the same inputs on any machine, however fast it is; the digest of
them is printed. What atheris tries depends on the code that it runs, besides. CI does that. Hours
are by hand, each time with a seed of their own.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import importlib
import importlib.util
import itertools
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

from tools import fuzz_readers, fuzz_spoil


class Bound(NamedTuple):
    """When to end: after so many seconds, or after so many inputs where those are given."""

    seconds: float
    inputs: int

    def over(self, begun: float, tried: int) -> bool:
        return tried >= self.inputs if self.inputs else time.monotonic() - begun >= self.seconds


class Tally:
    """How inputs ended; new ways to end badly are kept in files."""

    def __init__(self, name: str, out: Path):
        self.counts: collections.Counter[str] = collections.Counter()
        self._name, self._out, self._known = name, out, set[str]()
        self._digest = hashlib.sha256()

    def add(self, data: bytes, said: str) -> None:
        self._digest.update(hashlib.sha256(data).digest())
        kind = said if said in ("read", "refused") else "wrong"
        self.counts[kind] += 1
        lines = [line for line in said.splitlines() if line.startswith("  File")] or [said]
        place = hashlib.sha256(f"{lines[-1]}{said.splitlines()[-1][:40]}".encode()).hexdigest()[:8]
        if kind == "wrong" and place not in self._known and len(self._known) < 50:
            self._known.add(place)
            (self._out / f"{self._name}-{place}.input").write_bytes(data)
            (self._out / f"{self._name}-{place}.txt").write_text(said, errors="backslashreplace")

    def save(self, how: str) -> None:
        counts = {"reader": self._name, "how": how, **self.counts, "places": len(self._known)}
        counts["digest"] = self._digest.hexdigest()[:12]
        (self._out / f"{self._name}.{how}.json").write_text(json.dumps(counts))


def at_random(reader: fuzz_readers.Reader, tally: Tally, bound: Bound, seed: int) -> None:
    """Spoiled inputs until it is over, after the sound ones."""
    draw = random.Random(seed)
    reader.read(reader.seeds[0])  # imports, which take seconds
    for data in reader.seeds:
        tally.add(data, fuzz_readers.verdict(reader.read, data))
    begun = time.monotonic()
    for tried in itertools.count():
        if bound.over(begun, tried):
            break
        data = fuzz_spoil.spoiled(draw, draw.choice(reader.seeds))
        tally.add(data, fuzz_readers.verdict(reader.read, data))


def by_coverage(
    make: Callable[[Path], fuzz_readers.Reader],
    tally: Tally,
    bound: Bound,
    seed: int,
    directory: Path,
) -> None:
    """atheris, which ends the process."""
    atheris: Any = importlib.import_module("atheris")

    with atheris.instrument_imports(include=["jaxmerge", "yaml"]):
        reader = make(directory)
        reader.read(reader.seeds[0])  # imports what is imported when it is needed
        for data in reader.seeds:
            tally.add(data, fuzz_readers.verdict(reader.read, data))

    def one(data: bytes) -> None:
        tally.add(data, fuzz_readers.verdict(reader.read, data))
        if sum(tally.counts.values()) % 100 == 0:
            tally.save("coverage")

    def spoil(data: bytes, largest: int, seed: int) -> bytes:
        draw = random.Random(seed)
        if draw.random() < 0.5:
            return atheris.Mutate(data, largest)
        return fuzz_spoil.spoiled(draw, data)[:largest]

    corpus = directory.parent / "corpus"
    corpus.mkdir()
    for i, data in enumerate(reader.seeds):
        (corpus / str(i)).write_bytes(data)
    limits = ["-max_len=20000", "-rss_limit_mb=0", f"-seed={seed + 1}"]  # 0 is the time
    limits += [f"-runs={bound.inputs}" if bound.inputs else f"-max_total_time={int(bound.seconds)}"]
    # Our own alarm finds a hang.
    atheris.Setup([sys.argv[0], str(corpus), *limits, "-timeout=600"], one, custom_mutator=spoil)
    atheris.Fuzz()


def _one(name: str, how: str, bound: Bound, out: Path, seed: int) -> None:
    import transformers
    from absl import logging as absl_logging

    logging.disable(logging.CRITICAL)
    absl_logging.set_verbosity(absl_logging.FATAL)
    transformers.logging.set_verbosity(logging.CRITICAL)
    tally = Tally(name, out)
    with tempfile.TemporaryDirectory() as top:
        directory = Path(top, "reader")
        directory.mkdir()
        if how == "coverage":
            by_coverage(fuzz_readers.READERS[name], tally, bound, seed, directory)
        else:
            at_random(fuzz_readers.READERS[name](directory), tally, bound, seed)
            tally.save(how)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    bounds = parser.add_mutually_exclusive_group()
    bounds.add_argument("--seconds", type=float, default=60, help="of all readers together")
    bounds.add_argument("--inputs", type=int, default=0, help="of each reader, each way")
    parser.add_argument("--reader", default=",".join(fuzz_readers.READERS))
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--how", choices=("random", "coverage"), help="one reader, this way")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    names = given.reader.split(",")
    if given.how:
        bound = Bound(given.seconds, given.inputs)
        _one(names[0], given.how, bound, given.out, given.seed)
        return 0
    guided = importlib.util.find_spec("atheris") is not None
    parts = [(name, "random") for name in names]
    parts += [(name, "coverage") for name in names if guided and name in fuzz_readers.OF_BYTES]
    # Sets of strings have the same order each time.
    environment, failed = {**os.environ, "PYTHONHASHSEED": "0"}, False
    bound = (
        f"--inputs={given.inputs}" if given.inputs else f"--seconds={given.seconds / len(parts)}"
    )
    for name, how in parts:
        flags = [f"--reader={name}", f"--how={how}", bound]
        flags += [f"--out={given.out}", f"--seed={given.seed}"]
        log = given.out / f"{name}.{how}.log"
        with log.open("w") as stream:
            command = [sys.executable, __file__, *flags]
            done = subprocess.run(command, stdout=stream, stderr=stream, env=environment)
        counts = given.out / f"{name}.{how}.json"
        ended = f"exit code {done.returncode}, see {log}" if done.returncode else ""
        failed |= done.returncode != 0
        print(counts.read_text() if counts.exists() else "", ended, flush=True)
    return 1 if failed or list(given.out.glob("*.input")) else 0


if __name__ == "__main__":
    sys.exit(main())
