"""Fine-tunes the base model of a config on the train splits of its tasks.

    python -m tools.finetune --config=configs/smollm2.py --mixture=sums:2,words:1 --out=DIR

The examples read as they do in evaluation, with the same tokenizer and chat template; only the
answer and the token that ends it are learnt. AdamW in float32, with a short warm-up and a cosine
decay to zero. Writes an Orbax checkpoint in bfloat16, or with --lora_rank a PEFT adapter, which
goes upon the base model (LoRA, arXiv 2106.09685).
"""

from __future__ import annotations

import copy
import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from absl import app, flags, logging
from etils import epath
from jaxtyping import Array, Bool, Float, Int
from ml_collections import config_flags
from tqdm import tqdm

from jaxmerge.checkpoints import huggingface, orbax
from jaxmerge.checkpoints.pool import load
from jaxmerge.errors import JaxmergeError
from jaxmerge.evaluation.tokenizer import Pretrained, Tokenizer
from jaxmerge.experiment.build import build_task
from jaxmerge.experiment.sources import start_jax
from jaxmerge.models.architecture import DecoderConfig
from jaxmerge.models.decoder import Decoder, decoder
from jaxmerge.models.model import Params
from jaxmerge.sharding import make_mesh
from jaxmerge.tasks.common import Task
from jaxmerge.tasks.requests import Rolling
from tools.finetune_lora import adapt, make_adapters, save_adapters

FLAGS = flags.FLAGS


class Schedule(NamedTuple):
    """How long and how fast to train."""

    steps: int
    batch: int  # examples per step
    learning_rate: float  # at its peak
    seed: int


class Sequences(NamedTuple):
    """Examples as tokens: prompt, answer, stop, padding on the right.

    Attributes:
        tokens: what the model reads.
        sources: position before each token of the answer, where that token is predicted.
        answers: the A tokens of answer and stop, padded on the right.
        learnt: which of them are there.
    """

    tokens: Int[np.ndarray, "B T"]
    sources: Int[np.ndarray, "B A"]
    answers: Int[np.ndarray, "B A"]
    learnt: Bool[np.ndarray, "B A"]


def encode(task: Task, tokenizer: Tokenizer) -> list[tuple[list[int], list[int]]]:
    """The train split as pairs of prompt and answer; the stop token ends the answer.

    Raises:
        JaxmergeError: there is nothing to train on.
    """
    examples = task.splits.get("train", ())
    if not examples:
        raise JaxmergeError("the train split has no examples", where=f"task {task.name}")
    asked = [task.requests(example)[0] for example in examples]
    return [
        (
            tokenizer.prompt(request.prompt),
            [*tokenizer.encode(example.target), tokenizer.stops[0]],
        )
        for example, request in zip(examples, asked)
        if not isinstance(request, Rolling)
    ]


def pad(pairs: Sequence[tuple[list[int], list[int]]]) -> Sequences:
    """All pairs in one shape, T a multiple of 8."""
    B = len(pairs)
    T = -(-max(len(prompt) + len(answer) - 1 for prompt, answer in pairs) // 8) * 8
    A = max(len(answer) for _, answer in pairs)
    all_ = Sequences(
        np.zeros((B, T), np.int32),
        np.zeros((B, A), np.int32),
        np.zeros((B, A), np.int32),
        np.zeros((B, A), bool),
    )
    for row, (prompt, answer) in enumerate(pairs):
        read, length = [*prompt, *answer[:-1]], len(answer)
        all_.tokens[row, : len(read)] = read
        all_.sources[row, :length] = len(prompt) - 1 + np.arange(length)
        all_.answers[row, :length] = answer
        all_.learnt[row, :length] = True
    return all_


def draw(
    mixture: Mapping[str, float], sizes: Mapping[str, int], count: int, rng: np.random.Generator
) -> Int[np.ndarray, " count"]:
    """Rows of the tasks laid one after the other: tasks by share, none twice before all once."""
    share = np.array([mixture[name] for name in sizes])
    task = rng.choice(len(sizes), size=count, p=share / share.sum())
    rows, first = np.empty(count, np.int64), 0
    for number, size in enumerate(sizes.values()):
        here = np.flatnonzero(task == number)
        rounds = -(-len(here) // size)
        order = np.concatenate([rng.permutation(size) for _ in range(rounds)] or [[]])
        rows[here] = first + order[: len(here)]
        first += size
    return rows


def make_loss(config: DecoderConfig) -> Callable[[Params, Sequences], Float[Array, ""]]:
    """Mean cross-entropy of the answers' tokens; logits are made where answers are, only there."""
    module = Decoder(config)

    def loss(params: Params, batch: Sequences) -> Float[Array, ""]:
        B, T = batch.tokens.shape
        positions_BxT = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
        mask_BxTxT = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool))[None], (B, T, T))
        variables = {"params": params}
        hidden_BxTxD, _ = module.apply(variables, batch.tokens, positions_BxT, mask_BxTxT)
        hidden_BxAxD = jnp.take_along_axis(hidden_BxTxD, batch.sources[:, :, None], axis=1)
        logits_BxAxV: Any = module.apply(variables, hidden_BxAxD, method="logits")
        losses = optax.softmax_cross_entropy_with_integer_labels(logits_BxAxV, batch.answers)
        return jnp.sum(losses * batch.learnt) / jnp.sum(batch.learnt)

    return loss


def train(
    loss: Callable[[Any, Params, Sequences], Float[Array, ""]],
    trained: Any,
    frozen: Params,
    sequences: Sequences,
    rows: Int[np.ndarray, " count"],
    schedule: Schedule,
) -> Any:
    """The tree `trained` after AdamW has gone through all rows; it is donated.

    Args:
        loss: `(trained, frozen, batch) -> loss`.
        trained: the tree that changes, float32.
        frozen: what else the loss needs.
        sequences: all examples, of one shape.
        rows: examples in the order of training, `schedule.steps * schedule.batch` of them.
        schedule: how long and how fast.
    """
    rate = optax.warmup_cosine_decay_schedule(
        0.0, schedule.learning_rate, max(1, schedule.steps // 10), schedule.steps + 1
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.01)
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(trained, state, frozen, batch):
        value, gradient = jax.value_and_grad(loss)(trained, frozen, batch)
        updates, state = optimizer.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state, value

    state = jax.jit(optimizer.init)(trained)
    # disable=None: no bar where the output is no terminal.
    with tqdm(total=schedule.steps, unit="step", disable=None) as bar:
        for number, batch_rows in enumerate(rows.reshape(schedule.steps, schedule.batch), 1):
            batch = Sequences(*(array[batch_rows] for array in sequences))
            trained, state, value = step(trained, state, frozen, batch)
            if number % 10 == 0 or number in (1, schedule.steps):
                tqdm.write(f"step {number:4}  loss {float(value):.3f}")
            bar.update()
    return trained


def finetune(
    base: str,
    out: str | os.PathLike[str],
    tasks: Sequence[Task],
    mixture: Mapping[str, float],
    tokenizer: Tokenizer,
    schedule: Schedule,
    *,
    lora_rank: int = 0,
) -> None:
    """Fine-tunes a model and writes it to `out`, whole or not at all.

    Args:
        base: Hugging Face directory of a decoder that `jaxmerge.models` knows.
        out: the directory to make.
        tasks: those of the mixture; their train splits are learnt.
        mixture: share of each task by name; they need not sum to one.
        tokenizer: of the base.
        schedule: how long and how fast.
        lora_rank: of the adapters; 0 trains all parameters.

    Raises:
        JaxmergeError: there is something at `out`; the base can't be read or has no decoder here.
    """
    if epath.Path(out).exists():
        raise JaxmergeError("there is something here already", where=str(out))
    source = huggingface.describe("base", orbax.absolute(base))
    architecture = dict(source.architecture)
    if architecture.pop("model", "") != "decoder":
        raise JaxmergeError("there is no decoder for this model", where=base)
    config = DecoderConfig.from_plain(architecture)
    model = decoder(config)
    pairs = {task.name: encode(task, tokenizer) for task in tasks}
    sequences = pad([pair for of_task in pairs.values() for pair in of_task])
    rng = np.random.default_rng(schedule.seed)
    sizes = {name: len(of_task) for name, of_task in pairs.items()}
    rows = draw(mixture, sizes, schedule.steps * schedule.batch, rng)
    loss = make_loss(config)
    (params,) = load([source], make_mesh(), model.sharding_rules, dtype="float32").trees
    if not lora_rank:
        params = train(lambda p, _, batch: loss(p, batch), params, {}, sequences, rows, schedule)
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        orbax.save(out, params, architecture=model.architecture)
        return
    layout = huggingface.layout(source.path)
    adapters = make_adapters(layout, lora_rank, jax.random.key(schedule.seed))
    adapters = train(
        lambda trained, frozen, batch: loss(adapt(frozen, trained), batch),
        adapters,
        params,
        sequences,
        rows,
        schedule,
    )
    save_adapters(out, layout, adapters, base)


def parse_mixture(items: Sequence[str]) -> dict[str, float]:
    """`["sums:2", "words"]` -> `{"sums": 2.0, "words": 1.0}`.

    Raises:
        JaxmergeError: there is none, or a share is no positive number.
    """
    mixture = {}
    for item in items:
        name, _, share = item.partition(":")
        try:
            mixture[name] = float(share or 1)
        except ValueError:
            mixture[name] = 0.0
        if not mixture[name] > 0:
            raise JaxmergeError("needs positive shares", where="--mixture", found=item)
    if not mixture:
        raise JaxmergeError("names no task", where="--mixture", expected="such as sums:2,words:1")
    return mixture


def make_tasks(config: Any, names: Sequence[str], examples: int) -> list[Task]:
    """The tasks as a run of the config would make them, with a train split of this size.

    Raises:
        JaxmergeError: the config has no such task.
    """
    known = (*config.objective.tasks, *config.heldout, *config.tasks)
    for name in names:
        if name not in known:
            raise JaxmergeError(
                "the config has no such task",
                where="--mixture",
                expected=f"one of {', '.join(dict.fromkeys(known))}",
                found=name,
            )
    config = copy.deepcopy(config)
    config.objective.search_examples = config.objective.test_examples = 0
    for name in names:
        arguments = config.tasks.get(name, ml_collections.ConfigDict())
        config.tasks[name] = {**arguments.to_dict(), "train": examples}
    return [build_task(config, name) for name in names]


def define_flags() -> None:
    """Not at import: other programs have flags of these names."""
    config_flags.DEFINE_config_file("config", lock_config=True)
    flags.DEFINE_string("out", None, "directory to make; it must not exist", required=True)
    flags.DEFINE_list("mixture", None, "tasks of the config and their shares: sums:2,words:1")
    flags.DEFINE_integer("steps", 60, "optimiser steps", lower_bound=1)
    flags.DEFINE_integer("batch", 16, "examples per step", lower_bound=1)
    flags.DEFINE_integer("examples", 1000, "of each task, at most, to draw from", lower_bound=1)
    flags.DEFINE_float("learning_rate", 5e-5, "at its peak", lower_bound=0)
    flags.DEFINE_integer("lora_rank", 0, "0: all parameters are trained", lower_bound=0)
    flags.DEFINE_integer("seed", 0, "of the order of examples and of the adapters")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file it opens
    config: Any = FLAGS.config
    try:
        mixture = parse_mixture(FLAGS.mixture or [])
        if not config.pool.base:
            raise JaxmergeError("names no model to fine-tune", where="pool.base")
        config.mesh.cpu_devices = 0  # one device is faster than several that share the cores
        start_jax(config)
        finetune(
            config.pool.base,
            FLAGS.out,
            make_tasks(config, tuple(mixture), FLAGS.examples),
            mixture,
            Pretrained(config.pool.base, chat=config.pool.chat, system=config.pool.system),
            Schedule(FLAGS.steps, FLAGS.batch, FLAGS.learning_rate, FLAGS.seed),
            lora_rank=FLAGS.lora_rank,
        )
    except JaxmergeError as error:
        print(f"finetune: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    define_flags()
    app.run(main)
