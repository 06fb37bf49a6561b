"""What the device at hand computes, beside the CPU of the same machine, and how fast.

    python tools/check_device.py [--size=tiny|small|medium|large] [--json=FILE]

First merges, logits and derivatives of small models, on the device and on the CPU. Then, of random
decoders, merges against the bandwidth of the device's memory, reading and writing with candidates
side by side and one after the other, and a gradient step against a pass forward of the same
examples. One table, and below it the fields of a config with which a candidate took least time.
Ends with 1 where device and CPU differ by more than rounding.

Measured is the first device that JAX has; several work side by side, each as this one, and
`candidates_per_step` is then to be so many times as many. Times are medians, without compiling. On
a machine that does other work too they say little. JAX must have both devices: where JAX_PLATFORMS
is set, it is to be `cuda,cpu` or `tpu,cpu`.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from jaxmerge.evaluation.respond import Responder
from jaxmerge.evaluation.rows import Limits
from jaxmerge.evaluation.soft import SoftScore
from jaxmerge.evaluation.tokenizer import Bytes
from jaxmerge.merge.linear import ResidentMerger, linear, merger
from jaxmerge.models.architecture import DecoderConfig
from jaxmerge.models.decoder import decoder
from jaxmerge.sharding import make_mesh
from jaxmerge.tasks import kinds
from jaxmerge.tasks.common import Example
from jaxmerge.tasks.requests import Generate, Prompt, Request, Rolling
from jaxmerge.trees import PyTree

_SMALL = DecoderConfig(512, 64, 2, 4, 2, 16, 256)  # what is computed on the CPU too
# Relative to the largest value. Float32 products are asked for in full precision there; of others
# the device may have fewer bits, which is no fault and is only shown.
_TOLERANCE = 2e-5
_CHECKPOINTS = 8


class Size(NamedTuple):
    """How large what is timed is.

    Attributes:
        model: the decoder.
        dtype: of its parameters.
        read: bytes of a text that is read.
        written: tokens that are written after as many bytes.
        batches: values of `evaluate.batch_size` that are tried.
        candidates: numbers of candidates that are tried.
        times: how often each is timed.
    """

    model: DecoderConfig
    dtype: Any
    read: int
    written: int
    batches: tuple[int, ...]
    candidates: tuple[int, ...]
    times: int


SIZES = {
    "tiny": Size(_SMALL, jnp.float32, 16, 4, (8,), (2,), 3),
    "small": Size(
        DecoderConfig(2048, 256, 4, 4, 2, 64, 1024), jnp.float32, 64, 16, (16, 64), (1, 4), 5
    ),
    # 0.2 and 1.2 billion parameters; 9 and 40 GB with eight checkpoints and as many candidates.
    "medium": Size(
        DecoderConfig(32768, 1024, 12, 16, 8, 64, 4096),
        *(jnp.bfloat16, 128, 32, (16, 64, 256), (1, 2, 4, 8), 5),
    ),
    "large": Size(
        DecoderConfig(128256, 2048, 16, 32, 8, 64, 8192),
        *(jnp.bfloat16, 128, 32, (16, 64, 256), (1, 2, 4, 8), 5),
    ),
}


class Row(NamedTuple):
    """A line of the table.

    Attributes:
        what: was looked at.
        said: what was found.
        right: None where nothing could be wrong.
        fields: of a config, that are so there; None where there is no evaluation.
        seconds: that a candidate's evaluation took.
    """

    what: str
    said: str
    right: bool | None = None
    fields: dict[str, int] | None = None
    seconds: float | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, help="small on CPUs, else medium")
    parser.add_argument("--json", type=Path, help="a file for the same rows")
    said = parser.parse_args(arguments)
    device = jax.devices()[0]
    size = SIZES[said.size or ("small" if device.platform == "cpu" else "medium")]
    print(f"{device.device_kind} ({device.platform}), jax {jax.__version__}", flush=True)
    rows = []
    for row in itertools.chain(agreements(device), rates(device, size)):
        wrong = "  WRONG" if row.right is False else ""
        print(f"{row.what:<44}{row.said}{wrong}", flush=True)
        rows.append(row)
    timed = ((row.seconds, row.fields) for row in rows if row.seconds and row.fields)
    best = min(timed, key=lambda each: each[0])[1]
    print("least time for a candidate: " + " ".join(f"--config.{k}={v}" for k, v in best.items()))
    if said.json:
        kind = {"device": device.device_kind, "platform": device.platform, "jax": jax.__version__}
        told = {**kind, "rows": [row._asdict() for row in rows], "best": best}
        said.json.write_text(json.dumps(told, indent=1))
    return int(any(row.right is False for row in rows))


def agreements(device: Any) -> Iterator[Row]:
    """Merges, logits and derivatives of the device beside those of the CPU."""
    cpu = jax.devices("cpu")[0]
    for dtype in ("float32", "bfloat16", "float16"):
        of = functools.partial(_merged, jnp.dtype(dtype))
        apart = int(np.count_nonzero(_on(device, of) != _on(cpu, of)))
        said = f"{apart} values differ" if apart else "the bits of the CPU"
        yield Row(f"merge of {dtype}", said, apart == 0)
    settings = (("float32", "highest"), ("float32", "default"), ("bfloat16", "default"))
    for dtype, precision in settings:
        of = functools.partial(_logits_and_derivatives, jnp.dtype(dtype))
        with jax.default_matmul_precision(precision):
            ours, theirs = _on(device, of), _on(cpu, of)
        for name, a, b in zip(("logits", "derivatives"), ours, theirs):
            apart = float(np.abs(a - b).max() / np.abs(b).max())
            right = apart <= _TOLERANCE if precision == "highest" else None
            what = f"{name} in {dtype}, {precision} precision"
            yield Row(what, f"{apart:.1e} of the largest", right)


def _on(device: Any, of: Callable[[], Any]) -> Any:
    with jax.default_device(device):
        return of()


def _merged(dtype: Any) -> np.ndarray:
    """A population of merges, as whole numbers that have their bits."""
    rng = np.random.default_rng(0)
    trees = [
        {"x": jnp.asarray(rng.standard_normal((64, 256), np.float32).astype(dtype))}
        for _ in range(_CHECKPOINTS)
    ]
    weights = rng.standard_normal((4, _CHECKPOINTS)).astype(np.float32)
    weights[0] = np.eye(_CHECKPOINTS)[0]
    return np.asarray(linear(trees, weights)["x"]).view(f"u{dtype.itemsize}")


def _logits_and_derivatives(dtype: Any) -> list[np.ndarray]:
    """Of a random decoder, and of its mean log-probability by all parameters."""
    model, tokens = decoder(_SMALL), np.arange(3 * 32).reshape(3, 32) * 7 % _SMALL.vocab
    rng = np.random.default_rng(0)

    def drawn(leaf: Any) -> jax.Array:  # by NumPy: the same on all devices
        return jnp.asarray((rng.standard_normal(leaf.shape) / 8).astype(dtype))

    assert model.init
    params = jax.tree.map(drawn, jax.eval_shape(model.init, jax.random.key(0)))

    def mean(params: PyTree) -> tuple[jax.Array, jax.Array]:
        logits = model.apply(params, jnp.asarray(tokens)).astype(jnp.float32)
        return jax.nn.log_softmax(logits)[:, 1:, 3].mean(), logits

    derivatives, logits = jax.jit(jax.grad(mean, has_aux=True))(params)
    wide = [np.asarray(leaf, np.float32).ravel() for leaf in jax.tree.leaves(derivatives)]
    return [np.asarray(logits), np.concatenate(wide)]


def rates(device: Any, size: Size) -> Iterator[Row]:
    """What takes how long."""
    with jax.default_device(device):
        keys = jax.random.split(jax.random.key(0), _CHECKPOINTS)
        trees = [_random(size.model, size.dtype, key) for key in keys]
        stored = sum(leaf.nbytes for leaf in jax.tree.leaves(trees[0]))
        most = _bandwidth(max(stored, 2**26), size.times)
        yield Row("memory, read and written", f"{most / 1e9:.1f} GB/s")
        merge = merger(trees)
        for C in size.candidates:
            weights = np.full((C, _CHECKPOINTS), 1 / _CHECKPOINTS, np.float32)

            def step(weights: np.ndarray = weights) -> None:
                merge.give_back(jax.block_until_ready(merge(weights)))

            moved = (_CHECKPOINTS + C) * stored / _seconds(step, size.times)
            what = f"merge of {_CHECKPOINTS} into {C}, {stored / 1e6:.0f} MB each"
            yield Row(what, f"{moved / 1e9:.1f} GB/s, {moved / most:.0%} of the memory's")
        yield from _evaluations(device, size, merge)
        yield _climb(device, size, merge)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _random(config: DecoderConfig, dtype: Any, key: jax.Array) -> PyTree:
    init = decoder(config).init
    assert init
    return jax.tree.map(lambda leaf: leaf.astype(dtype), init(key))


def _bandwidth(size: int, times: int) -> float:
    """Bytes a second that a sum reads and writes."""
    add, values = jax.jit(lambda x: x + 1, donate_argnums=0), [jnp.zeros(size // 4, jnp.float32)]

    def step() -> None:
        values[0] = jax.block_until_ready(add(values[0]))

    return 2 * size / _seconds(step, max(times, 3))


def _evaluations(device: Any, size: Size, merge: ResidentMerger) -> Iterator[Row]:
    """Reading and writing, by batch and candidates, side by side or one after the other."""
    count = max(size.batches)
    asked = [f"{i * 7919:0{size.read}d}" for i in range(count)]
    reading = [Rolling(text) for text in asked]
    writing = [Generate(Prompt(text), size.written) for text in asked]
    first = [Generate(Prompt(text), 1) for text in asked]
    mesh = make_mesh(devices=[device])
    for rows, C in itertools.product(size.batches, size.candidates):
        for vmap in (1,) if C == 1 else (1, C):
            limits = Limits(rows, rows * 2 * size.read)
            responder = Responder(decoder(size.model), Bytes(), mesh, limits, vmap_candidates=vmap)
            merged = merge(np.full((C, _CHECKPOINTS), 1 / _CHECKPOINTS, np.float32))
            read, prefilled, written = (
                _answering(responder, merged, requests, size.times)
                for requests in (reading, first, writing)
            )
            merge.give_back(merged)
            # Rows that end early would be fewer tokens; random models hardly ever end one.
            tokens, new = C * count * size.read, C * count * (size.written - 1)
            wrote = f"{new / (written - prefilled):,.0f}" if written > prefilled else "?"
            how = "one at a time" if vmap == 1 else "side by side"
            fields = {"candidates_per_step": C, "batch_size": rows, "vmap_candidates": vmap}
            yield Row(
                f"{C} candidates, {how}, {rows} rows" if C > 1 else f"1 candidate, {rows} rows",
                f"read {tokens / read:,.0f}, prefill {tokens / prefilled:,.0f}, "
                f"write {wrote} tokens/s",
                fields={f"evaluate.{name}": value for name, value in fields.items()},
                seconds=(read + written) / C,
            )


def _answering(
    responder: Responder, merged: PyTree, requests: Sequence[Request], times: int
) -> float:
    prepared = responder.prepare(requests)
    return _seconds(lambda: jax.block_until_ready(responder.launch(prepared, merged)), times)


def _climb(device: Any, size: Size, merge: ResidentMerger) -> Row:
    """A step of a search by gradients, and a merge and a pass forward of the same examples."""
    rows = min(32, max(size.batches))
    words = [f"{i:0{size.read - 4}d}" for i in range(rows)]
    examples = {"search": [Example(word, "abc") for word in words], "test": []}
    task = kinds.generation("climbed", examples)
    soft = SoftScore(
        merge,
        _CHECKPOINTS,
        decoder(size.model),
        Bytes(),
        [task],
        make_mesh(devices=[device]),
        Limits(),
        minibatch=rows,
    )
    weights = np.full((1, _CHECKPOINTS), 1 / _CHECKPOINTS, np.float32)
    step = _seconds(lambda: soft.slopes(weights, 0, {"climbed": "probability"}), size.times)
    forward = _seconds(lambda: soft.scores(weights), size.times)
    said = f"{step * 1e3:.1f} ms, {step / forward:.2f} times a merge and a pass forward"
    return Row(f"gradient step, {rows} examples of {size.read} bytes", said)


def _seconds(run: Callable[[], object], times: int) -> float:
    """The median of so many calls, after two that compile: a second merge has another program."""
    run()
    run()
    found = []
    for _ in range(times):
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


if __name__ == "__main__":
    sys.exit(main())
