"""The merge of arrays in memory, by XLA in blocks and by a loop in C; for `bench_merge.py`."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxmerge.merge.linear import merger
from jaxmerge.streaming.block import Kind, pages, program, shared

_CORES = len(os.sched_getaffinity(0))
_KERNEL_VALUES = 2**24  # of each checkpoint: more than any cache holds
_BLOCK = 2**18
_C = """
#include <stdint.h>
#include <immintrin.h>
/* out_p = sum_k w_pk x_k in float32, one product and one sum after the other, rounded to even;
   each of the K values is read and widened once for all merges, 32 places at a time */
static inline __m512 widened(const uint16_t *x) {
  __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
static inline __m512 plus(__m512 total, __m512 product) {
  return _mm512_add_round_ps(total, product, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
static inline void store(uint16_t *out, __m512 total) {
  __m512i bits = _mm512_castps_si512(total);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  _mm256_storeu_si256((__m256i *)out, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
}
void merge(const uint16_t **x, const float *w, uint16_t **out, int merges, long size) {
  for (long i = 0; i < size; i += 32) {
    __m512 one[K], other[K];
    for (int k = 0; k < K; k++) {
      one[k] = widened(x[k] + i);
      other[k] = widened(x[k] + i + 16);
    }
    for (int p = 0; p < merges; p++) {
      __m512 first = _mm512_set1_ps(-0.0f), second = first;
      for (int k = 0; k < K; k++) {
        __m512 weight = _mm512_set1_ps(w[p * K + k]);
        first = plus(first, _mm512_mul_ps(weight, one[k]));
        second = plus(second, _mm512_mul_ps(weight, other[k]));
      }
      store(out[p] + i, first);
      store(out[p] + i + 16, second);
    }
  }
}
"""


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
        self._on_device = [{"bfloat16": shared(block.view(np.uint32))} for block in self._rows]
        self._weights = rng.random((16, checkpoints), np.float32)
        self._out = np.zeros((16, shape[0], _BLOCK // 2), np.uint32)
        kind = Kind((dtype,) * checkpoints, dtype, dtype)
        self._program = program(
            kind, tuple(("bfloat16", k) for k in range(checkpoints)), dense=True
        )
        self.library = _compiled(directory, checkpoints)

    def xla(self, merges: int) -> float:
        """Seconds of so many merges at a time, results copied out as the writer does."""
        weights_PxK = [jnp.asarray(weights_K) for weights_K in self._weights[:merges]]
        results = threading.local()

        def one(number: int) -> None:
            if not hasattr(results, "old"):
                results.old = jnp.zeros((1, _BLOCK // 2), np.uint32)
            for weights_K, out in zip(weights_PxK, self._out[:, number]):
                results.old = self._program(self._on_device[number], weights_K, results.old)
                out[:] = np.asarray(results.old)[0]

        return self._all_blocks(one)

    def c(self, merges: int) -> float:
        """Seconds of the same by the loop in C, where there is one."""
        library = self.library
        assert library
        weights = self._weights.ctypes.data_as(ctypes.c_void_p)
        K = self._rows.shape[1]

        def one(number: int) -> None:
            rows = (ctypes.c_void_p * K)(*(row.ctypes.data for row in self._rows[number]))
            results = self._out[:merges, number]
            out = (ctypes.c_void_p * merges)(*(result.ctypes.data for result in results))
            library.merge(rows, weights, out, merges, ctypes.c_long(_BLOCK))

        return self._all_blocks(one)

    def agree(self) -> bool:
        """Whether both give the same bits, for all merges."""
        self.c(len(self._weights))
        expected = self._out.tobytes()
        self._out[:] = 0
        self.xla(len(self._weights))
        return self._out.tobytes() == expected

    def _all_blocks(self, one: Callable[[int], None]) -> float:
        with ThreadPoolExecutor(_CORES) as threads:
            return seconds(lambda: list(threads.map(one, range(len(self._rows)))))


class Population:
    """The merge of candidates of a pool in memory, as an evaluation makes it step after step.

    Args:
        checkpoints: K.
    """

    def __init__(self, checkpoints: int):
        rng, shape = np.random.default_rng(0), (_KERNEL_VALUES // 2**12, 2**10)
        self._merge = merger(
            [
                {"x": jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)}
                for _ in range(checkpoints)
            ]
        )
        self._weights = rng.random((16, checkpoints), np.float32)

    def __call__(self, candidates: int) -> float:
        """Seconds of a step that writes over the models of the last one."""
        weights = self._weights[:candidates]

        def step() -> None:
            self._merge.give_back(jax.block_until_ready(self._merge(weights)))

        step()
        return seconds(step)


def _compiled(directory: Path, checkpoints: int) -> ctypes.CDLL | None:
    if not shutil.which("gcc") or "avx512bw" not in Path("/proc/cpuinfo").read_text():
        return None
    source, library = directory / "merge.c", directory / "merge.so"
    source.write_text(_C)
    options = [
        "-O3",
        "-march=native",
        "-ffp-contract=off",
        "-shared",
        "-fPIC",
        f"-DK={checkpoints}",
    ]
    subprocess.run(["gcc", *options, source, "-o", library], check=True)
    return ctypes.CDLL(str(library))


def seconds(run: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
