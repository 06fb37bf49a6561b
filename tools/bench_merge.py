"""Merges from file to file against mergekit and against the machine's limits, in turn in one run.

    python tools/bench_merge.py [--checkpoints=8] [--layers=15] [--rounds=5] [--out=bench.json]

Makes random Llama models in bfloat16 (254M parameters with 15 layers) in --directory, and an
environment with mergekit beside them. What is measured, from a warm page cache:

- `jaxmerge`: the command, start-up included; `jaxmerge work`: the merge in a process that has
  started and compiled.
- `mergekit`: its command; `mergekit start`: the same command on models of a single small layer.
- `limit`: the inputs through plain reads, by as many threads as there are cores, and then the
  output through plain writes and fsync.
- `kernel`: the merge of eight checkpoints in memory, block after block by all cores, and the same
  by a loop in C, where there is a gcc. `kernel P=16`: sixteen merges at a time.

Prints medians, and ratios between what was measured in the same run.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxmerge import config as configs
from jaxmerge import merging
from jaxmerge.checkpoints.safetensors import make_header
from jaxmerge.streaming.block import Kind, pages, program

_MERGEKIT = "0.1.5"
_CORES = len(os.sched_getaffinity(0))
_KERNEL_VALUES = 2**24  # of each checkpoint: more than any cache holds
_BLOCK = 2**18
_C = """
#include <stdint.h>
#include <immintrin.h>
/* out = sum_k w_k x_k in float32, one product and one sum after the other, rounded to even */
void merge(const uint16_t **x, const float *w, int count, uint16_t *out, long begin, long end) {
  for (long i = begin; i < end; i += 16) {
    __m512 total = _mm512_set1_ps(-0.0f);
    for (int k = 0; k < count; k++) {
      __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(x[k] + i)));
      __m512 value = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
      __m512 product = _mm512_mul_ps(_mm512_set1_ps(w[k]), value);
      total = _mm512_add_round_ps(total, product, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
    __m512i bits = _mm512_castps_si512(total);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    _mm256_storeu_si256((__m256i *)(out + i), _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
  }
}
"""


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


def mergekit_command(directory: Path) -> Path:
    """mergekit's command, in an environment of its own that is made when it is missing."""
    command = directory / "mergekit" / "bin" / "mergekit-yaml"
    if not command.exists():
        subprocess.run([sys.executable, "-m", "venv", directory / "mergekit"], check=True)
        pip = [directory / "mergekit" / "bin" / "pip", "install", "--quiet"]
        subprocess.run([*pip, f"mergekit=={_MERGEKIT}"], check=True)
    return command


def run_mergekit(command: Path, models: list[Path], directory: Path) -> float:
    """Seconds of mergekit's linear merge, as a command."""
    recipe = {
        "merge_method": "linear",
        "dtype": "bfloat16",
        "models": [
            {"model": str(path), "parameters": {"weight": 1 / len(models)}} for path in models
        ],
    }
    file, out = directory / "recipe.yaml", directory / "mergekit-out"
    file.write_text(json.dumps(recipe))  # JSON is YAML
    shutil.rmtree(out, ignore_errors=True)
    arguments = [command, file, out, "--no-copy-tokenizer", "--quiet"]
    return seconds(lambda: subprocess.run(arguments, check=True, capture_output=True))


def jaxmerge_config(models: list[Path]) -> configs.Config:
    """A uniform merge into a Hugging Face directory."""
    config = configs.default()
    config.pool.checkpoints = tuple(map(str, models))
    config.merge.weights = (1 / len(models),) * len(models)
    config.export.formats = ("huggingface",)
    return config


def run_jaxmerge(models: list[Path], directory: Path) -> float:
    """Seconds of the same merge with jaxmerge's command."""
    out = directory / "jaxmerge-out"
    shutil.rmtree(out, ignore_errors=True)
    config = jaxmerge_config(models)
    arguments = [sys.executable, "-m", "jaxmerge.run", "--mode=merge", f"--workdir={out}"]
    arguments += [f"--config={Path(__file__).parents[1] / 'configs' / 'default.py'}"]
    arguments += [f"--config.pool.checkpoints={config.pool.checkpoints}"]
    arguments += [f"--config.merge.weights={config.merge.weights}"]
    arguments += ["--config.export.formats=('huggingface',)"]
    return seconds(lambda: subprocess.run(arguments, check=True, capture_output=True))


def work(models: list[Path], directory: Path) -> float:
    """Seconds of the merge alone, in this process."""
    out = directory / "work-out"
    shutil.rmtree(out, ignore_errors=True)
    return seconds(lambda: merging.merge(jaxmerge_config(models), str(out)))


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


class Kernels:
    """The merge of arrays in memory: by XLA in blocks, and by a loop in C.

    Args:
        directory: where the C code is compiled.
        checkpoints: how many arrays.
    """

    def __init__(self, directory: Path, checkpoints: int):
        rng, dtype = np.random.default_rng(0), np.dtype(ml_dtypes.bfloat16)
        shape = (_KERNEL_VALUES // _BLOCK, checkpoints, _BLOCK)
        self._rows = pages(2 * int(np.prod(shape))).view(dtype).reshape(shape)
        for block in self._rows:
            block[:] = rng.standard_normal(block.shape, np.float32).astype(dtype)
        self._weights = rng.random((16, checkpoints), np.float32)
        self._out = np.zeros((16, shape[0], _BLOCK), dtype)
        kind = Kind((dtype,) * checkpoints, dtype, dtype)
        self._program = program(
            kind, tuple(("bfloat16", k) for k in range(checkpoints)), dense=True
        )
        self.library = _compiled(directory)

    def xla(self, merges: int) -> float:
        """Seconds of so many merges at a time, results copied out as the writer does."""
        weights = jnp.asarray(self._weights[:merges])

        def one(number: int) -> None:
            found = self._program({"bfloat16": jax.device_put(self._rows[number])}, weights)
            self._out[:merges, number] = np.asarray(found)

        return self._all_blocks(one)

    def c(self) -> float:
        """Seconds of the loop in C, where there is one."""
        library = self.library
        assert library
        weights = self._weights[0].ctypes.data_as(ctypes.c_void_p)
        K = self._rows.shape[1]

        def one(number: int) -> None:
            rows = (ctypes.c_void_p * K)(*(row.ctypes.data for row in self._rows[number]))
            out = self._out[1, number].ctypes.data_as(ctypes.c_void_p)
            library.merge(rows, weights, K, out, ctypes.c_long(0), ctypes.c_long(_BLOCK))

        return self._all_blocks(one)

    def agree(self) -> bool:
        """Whether both give the same bits."""
        self.c()
        expected = self._out[1].tobytes()
        self.xla(1)
        return self._out[0].tobytes() == expected

    def _all_blocks(self, one: Callable[[int], None]) -> float:
        with ThreadPoolExecutor(_CORES) as threads:
            return seconds(lambda: list(threads.map(one, range(len(self._rows)))))


def _compiled(directory: Path) -> ctypes.CDLL | None:
    if not shutil.which("gcc") or "avx512bw" not in Path("/proc/cpuinfo").read_text():
        return None
    source, library = directory / "merge.c", directory / "merge.so"
    source.write_text(_C)
    options = ["-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC"]
    subprocess.run(["gcc", *options, source, "-o", library], check=True)
    return ctypes.CDLL(str(library))


def peak_memory(models: list[Path], directory: Path) -> int:
    """Bytes resident at the peak of a merge's process, mapped files included."""
    run_jaxmerge(models, directory)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def seconds(run: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


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
    args = parser.parse_args()
    directory = args.directory.absolute()
    models = make_models(directory, args.checkpoints, Size(args.layers))
    small = make_models(directory, args.checkpoints, _SMALL)
    peak = peak_memory(models, directory)  # before any other child, of which the largest counts
    merging.set_up_host(jaxmerge_config(models))
    kernels = Kernels(directory, args.checkpoints)
    timed: dict[str, Callable[[], float]] = {
        "limit": lambda: limit(models, directory),
        "jaxmerge": lambda: run_jaxmerge(models, directory),
        "jaxmerge work": lambda: work(models, directory),
        "kernel": lambda: kernels.xla(1),
        "kernel P=16": lambda: kernels.xla(16),
    }
    if kernels.library:
        timed["kernel in C"] = kernels.c
    if not args.no_mergekit:
        command = mergekit_command(directory)
        timed["mergekit"] = lambda: run_mergekit(command, models, directory)
        timed["mergekit start"] = lambda: run_mergekit(command, small, directory)
    for warm in timed.values():
        warm()
    rounds = [{name: run() for name, run in timed.items()} for _ in range(args.rounds)]
    found = {name: statistics.median(taken[name] for taken in rounds) for name in timed}
    same = kernels.agree() if kernels.library else None
    report(found, models, peak, same, args.rounds)
    machine = {"cpu": platform.processor() or platform.machine(), "cores": _CORES}
    record = {"argv": sys.argv, "machine": machine, "peak": peak, "same bits": same}
    args.out.write_text(json.dumps({**record, "rounds": rounds, "medians": found}, indent=2) + "\n")


def report(
    found: dict[str, float], models: list[Path], peak: int, same: bool | None, rounds: int
) -> None:
    """Prints medians and ratios."""
    size = sum((path / "model.safetensors").stat().st_size for path in models)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "numpy"))
    print(f"{len(models)} checkpoints, {size / 1e9:.2f} GB, medians of {rounds}, {_CORES} cores")
    print(f"{versions}, mergekit {_MERGEKIT}; python {' '.join(sys.argv)}")
    for name, took in found.items():
        print(f"{name:16}{took:8.3f} s")
    ratios = {
        "mergekit / jaxmerge": ("mergekit", "jaxmerge"),
        "jaxmerge work / limit": ("jaxmerge work", "limit"),
        "C / kernel": ("kernel in C", "kernel"),
        "kernel P=16 / P=1": ("kernel P=16", "kernel"),
    }
    for name, (one, other) in ratios.items():
        if one in found and other in found:
            print(f"{name:32}{found[one] / found[other]:8.2f}")
    if "mergekit" in found:
        theirs = found["mergekit"] - found["mergekit start"]
        print(f"{'mergekit work / jaxmerge work':32}{theirs / found['jaxmerge work']:8.2f}")
    print(
        f"peak memory of the command {peak / 1e6:.0f} MB; kernel and C have the same bits: {same}"
    )


if __name__ == "__main__":
    main()
