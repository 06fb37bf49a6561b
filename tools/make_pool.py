"""Trains the quickstart's pool: eight branches of one small decoder, each good at something else.

    python tools/make_pool.py --out=pools/quickstart

A byte-level decoder of 260 thousand parameters learns a little of every task (the trunk). From
there eight branches go their own ways: other data, learning rates, lengths and seeds. They forget
what they no longer see, and as their learning rates never decay they stop at noisy places.

Takes about two minutes on 2 cores; the same command gives the same bits on the same machine.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from etils import epath
from jaxtyping import Array, Bool, Float, Int
from tqdm import tqdm

from jaxmerge.checkpoints import orbax
from jaxmerge.errors import JaxmergeError
from jaxmerge.evaluation.evaluator import Evaluator
from jaxmerge.evaluation.tokenizer import Bytes
from jaxmerge.merge.linear import merger
from jaxmerge.models.architecture import DecoderConfig
from jaxmerge.models.decoder import decoder
from jaxmerge.models.model import Model, Params
from jaxmerge.sharding import make_mesh
from jaxmerge.tasks import TASKS

FLAGS = flags.FLAGS
flags.DEFINE_string("out", "pools/quickstart", "directory to make; it must not exist")
flags.DEFINE_string(
    "trunk", "", "directory for the trunk too, the base of TIES and others; must not exist"
)
flags.DEFINE_integer("seed", 0, "of the parameters, the examples and their order")
flags.DEFINE_bool("small", False, "three branches, hardly trained, in a quarter of a minute")

SEARCH_TASKS = ("arithmetic", "instructions", "programs")
ARCHITECTURE = DecoderConfig(
    vocab=Bytes.vocabulary,
    width=80,
    layers=3,
    heads=5,
    kv_heads=5,
    head_width=16,
    feed_forward=224,
)
TRAIN_EXAMPLES = 3800  # of each task: of sums, the scarcest, about 4000 exist
BATCH = 64  # sequences
CHUNK = 50  # steps per compiled call


class Stage(NamedTuple):
    """A piece of training.

    Attributes:
        steps: optimiser steps, a multiple of CHUNK.
        learning_rate: constant after the warm-up.
        mixture: share of each task; they need not sum to one.
    """

    steps: int
    learning_rate: float
    mixture: Mapping[str, float]


TRUNK = Stage(
    450,
    4e-3,
    {"arithmetic": 3.5, "instructions": 1.5, "programs": 2.5, "sorting": 0.7, "counting": 0.7},
)
# Specialists in one or two tasks; `hot` ones take steps too long for them.
BRANCHES = {
    "sums": Stage(100, 2e-3, {"arithmetic": 1}),
    "words": Stage(100, 2e-3, {"instructions": 1}),
    "code": Stage(100, 2e-3, {"programs": 1}),
    "sums-and-code": Stage(100, 4e-3, {"arithmetic": 1, "programs": 1}),
    "words-and-sorting": Stage(100, 4e-3, {"instructions": 1, "sorting": 1}),
    "sorting": Stage(100, 6e-3, {"sorting": 3, "instructions": 1}),
    "words-hot": Stage(100, 8e-3, {"instructions": 1}),
    "counting-hot": Stage(50, 1e-2, {"counting": 1, "programs": 1}),
}
# The pool of --small: enough to see every command at work, not to merge anything of use.
SMALL_TRUNK = TRUNK._replace(steps=CHUNK)
SMALL_BRANCHES = {name: BRANCHES[name]._replace(steps=CHUNK) for name in ("sums", "words", "code")}


class Sequences(NamedTuple):
    """Examples as tokens: prompt, answer, stop, padding on the right."""

    tokens: Int[np.ndarray, "*batch T"]
    answers: Bool[np.ndarray, "*batch T"]  # which tokens are learnt: answer and stop


def encode_training_sets(seed: int) -> dict[str, Sequences]:
    """The train split of every task, all padded to one length T."""
    tokenizer, rows = Bytes(), {}
    for name, build in TASKS.items():
        examples = build(seed=seed, train=TRAIN_EXAMPLES, search=0, test=0).splits["train"]
        rows[name] = [
            (
                tokenizer.encode(example.prompt),
                [*tokenizer.encode(example.target), tokenizer.stops[0]],
            )
            for example in examples
        ]
    length = max(len(prompt) + len(answer) for task in rows.values() for prompt, answer in task)
    sets = {}
    for name, pairs in rows.items():
        tokens = np.full((len(pairs), length), 0, np.uint8)
        answers = np.zeros((len(pairs), length), bool)
        for row, (prompt, answer) in enumerate(pairs):
            end = len(prompt) + len(answer)
            tokens[row, :end] = prompt + answer
            answers[row, len(prompt) : end] = True
        sets[name] = Sequences(tokens, answers)
    return sets


def draw_batches(
    sets: Mapping[str, Sequences], stage: Stage, rng: np.random.Generator
) -> Sequences:
    """All batches of a stage, `[chunks, CHUNK, BATCH, T]`: tasks by share, rows at random."""
    share = np.array([stage.mixture.get(name, 0.0) for name in sets])
    shape = (stage.steps // CHUNK, CHUNK, BATCH)
    task = rng.choice(len(sets), size=shape, p=share / share.sum())
    row = rng.integers(TRAIN_EXAMPLES, size=shape)
    return Sequences(
        np.stack([each.tokens for each in sets.values()])[task, row],
        np.stack([each.answers for each in sets.values()])[task, row],
    )


def make_trainer(model: Model) -> tuple[Callable[[Params], Any], Callable[..., Any]]:
    """AdamW as `init(params) -> state` and `train(params, state, rate, sequences)`, compiled once.

    `train` takes CHUNK steps and gives the new parameters and state.
    """
    warmup = optax.linear_schedule(0.0, 1.0, 40)  # steps
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b2=0.98),
        optax.add_decayed_weights(0.01),
        optax.scale_by_schedule(warmup),
    )

    def loss(params: Params, tokens: Array, answers: Array) -> Float[Array, ""]:
        tokens = tokens.astype(jnp.int32)
        logits = model.apply(params, tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.sum(losses * answers[:, 1:]) / jnp.sum(answers)

    @functools.partial(jax.jit, donate_argnums=1)
    def train(params: Params, state: Any, rate: Float[Array, ""], sequences: Sequences):
        def step(carry, batch: Sequences):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, *batch), state, params)
            updates = jax.tree.map(lambda update: -rate * update, updates)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), sequences)[0]

    return jax.jit(optimizer.init), train


def train_pool(
    model: Model, trunk: Stage, branches: Mapping[str, Stage], seed: int
) -> dict[str, Params]:
    """Parameters of the trunk and, from there, of every branch, by name."""
    sets = encode_training_sets(seed)
    init, train = make_trainer(model)
    stages = {"trunk": trunk, **branches}
    pool = {}
    assert model.init is not None  # a decoder makes its own parameters
    start = jax.jit(model.init)(jax.random.key(seed))
    # disable=None: no bar where the output is no terminal.
    with tqdm(total=sum(s.steps for s in stages.values()), unit="step", disable=None) as bar:
        for name, stage in stages.items():
            bar.set_description(name)
            rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
            params = pool.get("trunk", start)
            state = init(params)
            for chunk in zip(*draw_batches(sets, stage, rng)):
                params, state = train(
                    params, state, jnp.float32(stage.learning_rate), Sequences(*chunk)
                )
                jax.block_until_ready(params)
                bar.update(CHUNK)
            pool[name] = params
    return pool


def score(
    model: Model, pool: Mapping[str, Params], seed: int, count: int
) -> dict[str, dict[str, float]]:
    """Mean scores of the checkpoints on `count` search examples a task; `test` stays unseen."""
    tasks = [build(seed=seed, train=0, search=count, test=0) for build in TASKS.values()]
    evaluator = Evaluator(
        merger(tuple(pool.values())),
        model,
        Bytes(),
        tasks,
        "search",
        make_mesh(),
        candidates_per_step=1,
    )
    scores = evaluator(np.eye(len(pool), dtype=np.float32))
    return {
        name: {task: float(per_example[row].mean()) for task, per_example in scores.items()}
        for row, name in enumerate(pool)
    }


def table(scores: Mapping[str, Mapping[str, float]]) -> str:
    """Checkpoints by tasks in percent, the best of each column marked with a star."""
    rows = {
        name: {
            **{task: by_task[task] for task in SEARCH_TASKS},
            "average": float(np.mean([by_task[task] for task in SEARCH_TASKS])),
            **{f"({task})": by_task[task] for task in by_task if task not in SEARCH_TASKS},
        }
        for name, by_task in scores.items()
    }
    columns = list(next(iter(rows.values())))
    best = {column: max(row[column] for row in rows.values()) for column in columns}
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{column:>15}" for column in columns)]
    for name, row in rows.items():
        cells = [f"{100 * row[c]:.1f}{'*' if row[c] == best[c] else ' '}" for c in columns]
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>15}" for cell in cells))
    return "\n".join(lines)


def make_pool(
    out: str | os.PathLike[str], seed: int, *, trunk_to: str = "", small: bool = False
) -> None:
    """Trains the pool, writes its branches to `out` and prints their scores.

    Args:
        out: directory to make.
        trunk_to: directory for the trunk; "": it is not kept.
        seed: of the parameters, the examples and their order.
        small: whether it is the pool of --small.

    Raises:
        JaxmergeError: there is something at `out`, or at `trunk_to`.
    """
    out = epath.Path(out)
    for path in (out, *([epath.Path(trunk_to)] if trunk_to else [])):
        if path.exists():
            raise JaxmergeError("there is something here already", where=str(path))
    model = decoder(ARCHITECTURE)
    trunk, stages = (SMALL_TRUNK, SMALL_BRANCHES) if small else (TRUNK, BRANCHES)
    count = 16 if small else 192
    pool = train_pool(model, trunk, stages, seed)
    branches = {name: params for name, params in pool.items() if name != "trunk"}
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        for name, params in branches.items():
            orbax.save(partial / name, params, architecture=model.architecture)
        if trunk_to:
            orbax.save(orbax.absolute(trunk_to), pool["trunk"], architecture=model.architecture)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"\n{out}: scores on {count} search examples, in percent; * best, (held out)\n")
    print(table(score(model, branches, seed, count)))


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file it opens
    try:
        make_pool(FLAGS.out, FLAGS.seed, trunk_to=FLAGS.trunk, small=FLAGS.small)
    except JaxmergeError as error:
        print(f"make_pool: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    app.run(main)
