"""Merges by a method from file to file, by the commands of jaxmerge and mergekit, in turn.

For `bench_merge.py`: both read the same YAML, in the directory of the models.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench_kernels import seconds

OUT = "method-out"  # of a merge, in the directory


def write_method(method: str, models: list[Path], directory: Path) -> Path:
    """A merge by a method as a YAML that both read; paths are from the directory."""
    named = [{"model": f"./{path.relative_to(directory)}"} for path in models]
    recipe = {"merge_method": method, "dtype": "bfloat16", "base_model": named[0]["model"]}
    if method == "slerp":
        recipe |= {"models": named[:2], "parameters": {"t": 0.3}}
    else:
        numbers = {"weight": 1.0, "density": 0.5}
        recipe |= {"models": [{**each, "parameters": numbers} for each in named[1:]]}
    file = directory / f"{method}.yml"
    file.write_text(json.dumps(recipe))
    return file


def method_commands(
    method: str, models: list[Path], directory: Path, commands: Path | None
) -> dict[str, list[str]]:
    """The commands that make the same merge by a method, by their names."""
    file = write_method(method, models, directory)
    found = {
        f"jaxmerge {method}": [
            sys.executable,
            "-m",
            "jaxmerge",
            "merge",
            file.name,
            f"--out={OUT}",
        ]
    }
    if commands:
        peer = [str(commands / "mergekit-yaml"), file.name, OUT, "--no-copy-tokenizer", "--quiet"]
        found[f"mergekit {method}"] = peer
    return found


def run_method(arguments: list[str], directory: Path) -> float:
    """Seconds of a command that makes a merge in a directory."""
    took = seconds(lambda: _run(arguments, directory))
    _clear(directory)
    return took


def _run(arguments: list[str], directory: Path) -> None:
    done = subprocess.run(arguments, cwd=directory, env=_offline(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr}")


def _offline() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1"}


def _clear(directory: Path) -> None:
    for name in (OUT, f".{OUT}.jaxmerge"):
        shutil.rmtree(directory / name, ignore_errors=True)


def peak_memory(arguments: list[str], directory: Path) -> int:
    """Bytes resident at the peak of a command's process, mapped files included."""
    peak = 0
    # Its own high-water mark: ru_maxrss of a child begins with that of the process it came from.
    null = subprocess.DEVNULL
    with subprocess.Popen(
        arguments, cwd=directory, stdout=null, stderr=null, env=_offline()
    ) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
            peak = max(peak, int(found[1]) * 1024 if found else 0)
            time.sleep(0.005)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed")
    _clear(directory)
    return peak


def add_method(
    timed: dict[str, Callable[[], float]],
    peaks: dict[str, int],
    method: str,
    models: list[Path],
    directory: Path,
    commands: Path | None,
) -> None:
    """Adds what is measured of a method: both commands, and the memory of ours."""
    for name, arguments in method_commands(method, models, directory, commands).items():
        timed[name] = functools.partial(run_method, arguments, directory)
        peaks[name] = peak_memory(arguments, directory)
