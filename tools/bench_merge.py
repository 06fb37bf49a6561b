"""Merges from file to file against mergekit and against the machine's limits, in turn in one run.

    python tools/bench_merge.py [--checkpoints=8] [--layers=15] [--rounds=5] [--out=bench.json]
    python tools/bench_merge.py --methods=ties,slerp     these alone, without the weighted sum

Makes random Llama models in bfloat16 (254M parameters with 15 layers) in --directory, and an
environment with mergekit beside them. What is measured, from a warm page cache:

- `jaxmerge`: the command, start-up included; `jaxmerge work`: the merge in a process that has
  started and compiled.
- `mergekit`: its command; `mergekit work`: the merge in a process that has made a small one before.
- `jaxmerge ties`, `mergekit ties` and so on: both commands with the same YAML. TIES is of all
  checkpoints but the first, which is the base, with density 0.5; SLERP of the first two.
- `limit`: the inputs through plain reads, by as many threads as there are cores, and then the
  output through plain writes and fsync.
- `kernel`: the merge of eight checkpoints in memory, block after block by all cores, and the same
  by a loop in C, where there is a gcc. `kernel P=16` and `C, P=16`: sixteen merges at a time.
- `population`: what a search's step does with a pool in memory, by one thread.

Peak memory is the kernel's high-water mark of the command's process, also with twice as many
checkpoints: the second half are links to the first. Takes 0.6 GB of disk for each checkpoint of
254M parameters, 1.4 GB for mergekit, and 0.6 GB for what is written and removed again.

Prints medians, and ratios between what was measured in the same run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from bench_kernels import Kernels, Population, seconds
from bench_methods import OUT, add_method, peak_memory

from jaxmerge import config as configs
from jaxmerge.checkpoints.safetensors import make_header
from jaxmerge.experiment import merge as merging

_MERGEKIT, _TORCH = "0.1.5", "2.13.0"
# In mergekit's environment: merges by the recipes that are named, one after the other, and prints
# how long each took.
_PEER = """
import json, shutil, sys, time
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for recipe in sys.argv[1:]:
    with open(recipe) as stream:
        config = MergeConfiguration.model_validate(json.load(stream))
    start = time.perf_counter()
    run_merge(config, recipe + "-out", options=MergeOptions(copy_tokenizer=False, quiet=True))
    print(time.perf_counter() - start)
    shutil.rmtree(recipe + "-out")
"""
_CORES = len(os.sched_getaffinity(0))


class Size(NamedTuple):
    """The size of a Llama."""

    layers: int
    width: int = 1024
    feed_forward: int = 2816
    vocabulary: int = 32000


_SMALL = Size(layers=1, width=64, feed_forward=128, vocabulary=128)


def shapes(size: Size) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama."""
    width, inner = size.width, size.feed_forward
    found = {"model.embed_tokens.weight": (size.vocabulary, width), "model.norm.weight": (width,)}
    found["lm_head.weight"] = (size.vocabulary, width)
    for layer in range(size.layers):
        prefix = f"model.layers.{layer}."
        for name in "qkvo":
            found[f"{prefix}self_attn.{name}_proj.weight"] = (width, width)
        for name in ("gate", "up"):
            found[f"{prefix}mlp.{name}_proj.weight"] = (inner, width)
        found[f"{prefix}mlp.down_proj.weight"] = (width, inner)
        for name in ("input", "post_attention"):
            found[f"{prefix}{name}_layernorm.weight"] = (width,)
    return found


def make_models(directory: Path, count: int, size: Size) -> list[Path]:
    """Random models; those that are there already are left as they are."""
    paths = [directory / "-".join(map(str, size)) / f"model{k}" for k in range(count)]
    dtype = np.dtype(ml_dtypes.bfloat16)
    tensors = sorted(shapes(size).items())
    for k, path in enumerate(paths):
        if (path / "config.json").exists():
            continue
        path.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(k)
        with open(path / "model.safetensors", "wb") as stream:
            stream.write(make_header((name, dtype, shape) for name, shape in tensors))
            for _, shape in tensors:
                stream.write((rng.standard_normal(shape, np.float32) / 50).astype(dtype).tobytes())
        (path / "config.json").write_text(json.dumps(_config(size)))
    return paths


def _config(size: Size) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size.width,
        "intermediate_size": size.feed_forward,
        "num_hidden_layers": size.layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": size.vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def install_mergekit(directory: Path) -> Path:
    """Where the commands of mergekit's own environment are; it is made when it is missing."""
    commands = directory / "mergekit" / "bin"
    if not (commands / "mergekit-yaml").exists():
        subprocess.run([sys.executable, "-m", "venv", directory / "mergekit"], check=True)
        for wanted in (f"torch=={_TORCH}", f"mergekit=={_MERGEKIT}"):
            subprocess.run([commands / "pip", "install", "--quiet", wanted], check=True)
    return commands


def write_recipe(models: list[Path], file: Path) -> Path:
    """mergekit's uniform merge."""
    weight = {"weight": 1 / len(models)}
    members = [{"model": str(path), "parameters": weight} for path in models]
    recipe = {"merge_method": "linear", "dtype": "bfloat16", "models": members}
    file.write_text(json.dumps(recipe))  # JSON is YAML
    return file


def run_mergekit(commands: Path, models: list[Path], directory: Path) -> float:
    """Seconds of mergekit's linear merge, as a command."""
    file, out = write_recipe(models, directory / "recipe.yaml"), directory / "mergekit-out"
    arguments = [commands / "mergekit-yaml", file, out, "--no-copy-tokenizer", "--quiet"]
    took = seconds(lambda: subprocess.run(arguments, check=True, capture_output=True))
    shutil.rmtree(out)
    return took


def mergekit_work(commands: Path, models: list[Path], small: list[Path], directory: Path) -> float:
    """Seconds of the merge alone, in a process of mergekit's that has merged small models."""
    recipes = [
        write_recipe(small, directory / "small.yaml"),
        write_recipe(models, directory / "recipe.yaml"),
    ]
    arguments = [commands / "python", "-c", _PEER, *recipes]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def jaxmerge_config(models: list[Path]) -> configs.Config:
    """A uniform merge into a Hugging Face directory."""
    config = configs.default()
    config.pool.checkpoints = tuple(map(str, models))
    config.merge.weights = (1 / len(models),) * len(models)
    config.export.formats = ("huggingface",)
    return config


def jaxmerge_command(models: list[Path], out: Path) -> list[str]:
    """The command of the same merge with jaxmerge."""
    config = jaxmerge_config(models)
    return [
        *(sys.executable, "-m", "jaxmerge.run", "--mode=merge", f"--workdir={out}"),
        f"--config={Path(__file__).parents[1] / 'configs' / 'default.py'}",
        f"--config.pool.checkpoints={config.pool.checkpoints}",
        f"--config.merge.weights={config.merge.weights}",
        "--config.export.formats=('huggingface',)",
    ]


def run_jaxmerge(models: list[Path], directory: Path) -> float:
    """Seconds of jaxmerge's command."""
    out = directory / OUT
    arguments = jaxmerge_command(models, out)
    took = seconds(lambda: subprocess.run(arguments, check=True, capture_output=True))
    shutil.rmtree(out)
    return took


def linked_twice(models: list[Path], directory: Path) -> list[Path]:
    """Twice as many checkpoints, the others links to these."""
    links = [directory / "links" / path.name for path in models]
    for path, link in zip(models, links):
        link.mkdir(parents=True, exist_ok=True)
        for file in path.iterdir():
            if not (link / file.name).exists():
                os.link(file, link / file.name)
    return models + links


def work(models: list[Path], directory: Path) -> float:
    """Seconds of the merge alone, in this process."""
    out = directory / "work-out"
    took = seconds(lambda: merging.merge(jaxmerge_config(models), str(out)))
    shutil.rmtree(out)
    return took


def limit(models: list[Path], directory: Path) -> float:
    """Seconds of plain reads of the inputs, and plain writes of as much as one of them."""
    files = [path / "model.safetensors" for path in models]
    size = files[0].stat().st_size

    def read(file: Path) -> None:
        memory = np.empty(2**20, np.uint8)
        with open(file, "rb", 0) as stream:
            while stream.readinto(memory.data):
                pass

    def move() -> None:
        with ThreadPoolExecutor(_CORES) as threads:
            list(threads.map(read, files))
        chunk = np.ones(2**20, np.uint8)
        with open(directory / "limit-out", "wb", 0) as stream:
            for _ in range(-(-size // chunk.size)):
                stream.write(chunk.data)
            os.fsync(stream.fileno())

    took = seconds(move)
    (directory / "limit-out").unlink()
    return took


def _by_itself(run: Callable[[], float]) -> float:
    """What a run takes when the disk has nothing left to write of the one before."""
    os.sync()
    return run()


def main() -> None:
    """Measures, prints a table, and writes what was measured as JSON."""
    parser = argparse.ArgumentParser(
        description="Merges against mergekit and the machine's limits."
    )
    parser.add_argument("--directory", type=Path, default=Path("bench"), help="for models and all")
    parser.add_argument("--checkpoints", type=int, default=8)
    parser.add_argument("--layers", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-mergekit", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("bench_merge.json"))
    parser.add_argument("--methods", default="linear,ties,slerp", help="that are measured")
    args = parser.parse_args()
    directory = args.directory.absolute()
    models = make_models(directory, args.checkpoints, Size(args.layers))
    commands = None if args.no_mergekit else install_mergekit(directory)
    peaks: dict[str, int] = {}
    timed: dict[str, Callable[[], float]] = {}
    same = None
    methods = args.methods.split(",")
    if "linear" in methods:
        same = add_linear(timed, peaks, models, directory, commands)
    for method in methods:
        if method != "linear":
            add_method(timed, peaks, method, models, directory, commands)
    for warm in timed.values():
        warm()
    rounds = [{name: _by_itself(run) for name, run in timed.items()} for _ in range(args.rounds)]
    found = {name: statistics.median(taken[name] for taken in rounds) for name in timed}
    bits = same() if same else None
    report(found, models, peaks, bits, args.rounds)
    machine = {"cpu": platform.processor() or platform.machine(), "cores": _CORES}
    record = {"argv": sys.argv, "machine": machine, "peak": peaks, "same bits": bits}
    args.out.write_text(json.dumps({**record, "rounds": rounds, "medians": found}, indent=2) + "\n")


def add_linear(
    timed: dict[str, Callable[[], float]],
    peaks: dict[str, int],
    models: list[Path],
    directory: Path,
    commands: Path | None,
) -> Callable[[], bool] | None:
    """Adds what is measured of the weighted sum; what says whether kernel and C agree."""
    small = make_models(directory, len(models), _SMALL)
    for each in (models, linked_twice(models, directory)):
        arguments = jaxmerge_command(each, directory / OUT)
        peaks[f"jaxmerge, {len(each)} checkpoints"] = peak_memory(arguments, directory)
    merging.set_up_host(jaxmerge_config(models))
    kernels = Kernels(directory, len(models))
    population = Population(len(models))
    timed |= {
        "limit": lambda: limit(models, directory),
        "jaxmerge": lambda: run_jaxmerge(models, directory),
        "jaxmerge work": lambda: work(models, directory),
        "kernel": lambda: kernels.xla(1),
        "kernel P=16": lambda: kernels.xla(16),
        "population P=1": lambda: population(1),
        "population P=16": lambda: population(16),
    }
    if kernels.library:
        timed["kernel in C"] = lambda: kernels.c(1)
        timed["C, P=16"] = lambda: kernels.c(16)
    if commands:
        timed["mergekit"] = lambda: run_mergekit(commands, models, directory)
        timed["mergekit work"] = lambda: mergekit_work(commands, models, small, directory)
    return kernels.agree if kernels.library else None


def report(
    found: dict[str, float],
    models: list[Path],
    peaks: dict[str, int],
    same: bool | None,
    rounds: int,
) -> None:
    """Prints medians and ratios."""
    size = sum((path / "model.safetensors").stat().st_size for path in models)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "numpy"))
    print(f"{len(models)} checkpoints, {size / 1e9:.2f} GB, medians of {rounds}, {_CORES} cores")
    print(f"{versions}, mergekit {_MERGEKIT}; python {' '.join(sys.argv)}")
    for name, took in found.items():
        print(f"{name:20}{took:8.3f} s")
    ratios = {
        "mergekit / jaxmerge": ("mergekit", "jaxmerge"),
        "mergekit work / jaxmerge work": ("mergekit work", "jaxmerge work"),
        **{
            f"mergekit / jaxmerge, {m}": (f"mergekit {m}", f"jaxmerge {m}")
            for m in ("ties", "slerp")
        },
        "jaxmerge work / limit": ("jaxmerge work", "limit"),
        "C / kernel": ("kernel in C", "kernel"),
        "kernel P=16 / P=1": ("kernel P=16", "kernel"),
        "C, P=16 / P=1": ("C, P=16", "kernel in C"),
        "population P=16 / P=1": ("population P=16", "population P=1"),
    }
    for name, (one, other) in ratios.items():
        if one in found and other in found:
            print(f"{name:32}{found[one] / found[other]:8.2f}")
    for name, peak in peaks.items():
        print(f"peak memory of the command, {name}: {peak / 1e6:.0f} MB")
    print(f"kernel and C have the same bits: {same}")


if __name__ == "__main__":
    main()
