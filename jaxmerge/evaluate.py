"""Candidates times tasks to per-example scores.

A candidate is a vector of merge weights. A step merges `candidates_per_step` of them, runs every
task on the merged models, and only then waits: tokens and log-likelihoods come back to the host,
where they are judged while the device works on the next task or the next step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxmerge.errors import JaxmergeError
from jaxmerge.generate import generate, log_likelihood
from jaxmerge.merge import linear
from jaxmerge.models.model import Model, Params
from jaxmerge.tasks import batches
from jaxmerge.tasks.common import Example, Task
from jaxmerge.tokenizer import Tokenizer
from jaxmerge.trees import PyTree

_WITHIN_A_MODEL = ("data", "fsdp", "tensor")  # mesh axes that need collectives

Scores = dict[str, Float[np.ndarray, "P N"]]  # per task: one score per candidate and example


class _Prepared(NamedTuple):
    """A task's examples, encoded and on the devices."""

    task: Task
    examples: Sequence[Example]
    rows: int
    microbatches: list[batches.Microbatch]
    program: Callable[..., Array]


class Evaluator:
    """Scores populations of merges on the examples of one split.

    Args:
        trees: the pool's K parameter trees, on `mesh`.
        model: their architecture.
        tokenizer: text to ids; its vocabulary must fit the model's.
        tasks: what to score on; names are unique.
        split: `search` or `test`.
        mesh: from `sharding.make_mesh`; candidates are spread over `pop`, examples over `data`.
        candidates_per_step: models that are merged together; rounded up to a multiple of `pop`. Up
            to two steps exist at a time, since one is launched before the last is judged.
        batch_size: rows that go through a model at a time; rounded up to a multiple of `data`.
        vmap_candidates: of a device's candidates, how many run side by side in one program; 0
            chooses: 1 on CPU (one after the other is 2 to 3 times faster there), else all.

    Raises:
        JaxmergeError: a task has no examples in the split, or the vocabularies do not fit.
    """

    def __init__(
        self,
        trees: Sequence[PyTree],
        model: Model,
        tokenizer: Tokenizer,
        tasks: Sequence[Task],
        split: str,
        mesh: Mesh,
        *,
        candidates_per_step: int,
        batch_size: int = 64,
        vmap_candidates: int = 0,
    ):
        if model.vocabulary and tokenizer.vocabulary > model.vocabulary:
            raise JaxmergeError(
                "the tokenizer has tokens that the model does not know",
                where="pool.tokenizer",
                expected=f"at most {model.vocabulary} tokens",
                found=str(tokenizer.vocabulary),
            )
        pop, data = mesh.shape["pop"], mesh.shape["data"]
        self.candidates_per_step = -(-candidates_per_step // pop) * pop
        self._trees, self._tokenizer, self._mesh = tuple(trees), tokenizer, mesh
        self._merge = linear.program(trees[0], population=True)
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        # Between CPU devices, collectives of programs that queue up can wait for each other's
        # threads for ever (jaxlib 0.10.2): there, one program at a time.
        self._one_at_a_time = on_cpu and any(mesh.shape[axis] > 1 for axis in _WITHIN_A_MODEL)
        if not vmap_candidates:
            vmap_candidates = 1 if on_cpu else self.candidates_per_step // pop
        self._tasks = [
            _prepare(
                task, split, model, tokenizer, mesh, -(-batch_size // data) * data, vmap_candidates
            )
            for task in tasks
        ]

    @property
    def examples(self) -> dict[str, int]:
        """N, the number of examples of each task."""
        return {prepared.task.name: len(prepared.examples) for prepared in self._tasks}

    def __call__(self, weights_PxK: Float[np.ndarray, "P K"]) -> Scores:
        """Per-example scores of all candidates, `[P, N]` for each task."""
        steps = list(self.steps(weights_PxK))
        return {name: np.concatenate([step[name] for step in steps]) for name in steps[0]}

    def steps(self, weights_PxK: Float[np.ndarray, "P K"]) -> Iterator[Scores]:
        """The same, `candidates_per_step` rows at a time, as soon as they are known."""
        waiting = None
        for start in range(0, len(weights_PxK), self.candidates_per_step):
            launched = self._launch(weights_PxK[start : start + self.candidates_per_step])
            if waiting is not None:
                yield self._collect(*waiting)
            waiting = launched
        if waiting is not None:
            yield self._collect(*waiting)

    def _launch(self, weights_CxK: np.ndarray) -> tuple[int, list[list[Array]]]:
        """Enqueues a step; waits for the device only where programs must not queue up."""
        count = len(weights_CxK)
        # The last step is filled up with a candidate it has: every step has the same shape.
        filling = np.repeat(weights_CxK[-1:], self.candidates_per_step - count, axis=0)
        weights = jax.device_put(
            np.concatenate([weights_CxK, filling]).astype(np.float32),
            NamedSharding(self._mesh, PartitionSpec("pop")),
        )
        merged = self._merge(self._trees, weights)
        return count, [
            [
                self._started(prepared.program(merged, *batch.arrays))
                for batch in prepared.microbatches
            ]
            for prepared in self._tasks
        ]

    def _started(self, output: Array) -> Array:
        return jax.block_until_ready(output) if self._one_at_a_time else output

    def _collect(self, count: int, outputs: list[list[Array]]) -> Scores:
        scores = {}
        for prepared, of_batches in zip(self._tasks, outputs):
            by_row = _by_row(prepared, [jax.device_get(output)[:count] for output in of_batches])
            judge = {
                "generation": batches.judge_texts,
                "multiple_choice": batches.judge_choices,
            }[prepared.task.kind]
            scores[prepared.task.name] = judge(
                prepared.task, prepared.examples, self._tokenizer, by_row
            )
        return scores


def _prepare(
    task: Task,
    split: str,
    model: Model,
    tokenizer: Tokenizer,
    mesh: Mesh,
    batch_size: int,
    vmap_candidates: int,
) -> _Prepared:
    examples = task.splits.get(split, ())
    if not examples:
        raise JaxmergeError(f"the {split} split has no examples", where=f"task {task.name}")
    generates = task.kind == "generation"
    run = _generation(model, task.max_new_tokens, tokenizer.stops) if generates else _choice(model)
    rows = len(examples) if generates else sum(len(example.choices) for example in examples)
    over_data = NamedSharding(mesh, PartitionSpec("data"))
    return _Prepared(
        task=task,
        examples=examples,
        rows=rows,
        microbatches=[
            batches.Microbatch(microbatch.rows_B, jax.device_put(microbatch.arrays, over_data))
            for microbatch in batches.encode(task, examples, tokenizer, batch_size)
        ],
        program=population_program(run, mesh, vmap_candidates),
    )


# Cached, as is the program made of them: splits, tasks and runs share what is compiled.
@functools.cache
def _generation(model: Model, max_new_tokens: int, stops: tuple[int, ...]) -> Callable[..., Array]:
    return functools.partial(generate, model, max_new_tokens=max_new_tokens, stops=stops)


@functools.cache
def _choice(model: Model) -> Callable[..., Array]:
    return functools.partial(log_likelihood, model)


@functools.cache
def population_program(
    run: Callable[..., Array], mesh: Mesh, vmap_candidates: int
) -> Callable[..., Array]:
    """Lifts `run(params, *rows_B) -> [B, ...]` to `(merged_C, *rows_B) -> [C, B, ...]`.

    Each place of the `pop` axis works on its own candidates; inside, the compiler spreads one model
    over the other axes.
    """

    def local(merged: Params, *arrays_B: Array) -> Array:
        if vmap_candidates == 1:
            return jax.lax.map(lambda params: run(params, *arrays_B), merged)
        return jax.lax.map(
            lambda params: run(params, *arrays_B), merged, batch_size=vmap_candidates
        )

    def lifted(merged: Params, *arrays_B: Array) -> Array:
        over_pop = PartitionSpec("pop")
        specs = (over_pop, *(PartitionSpec() for _ in arrays_B))
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=specs,
            out_specs=over_pop,
            axis_names={"pop"},
            check_vma=False,
        )(merged, *arrays_B)

    return jax.jit(lifted)


def _by_row(prepared: _Prepared, outputs: list[np.ndarray]) -> np.ndarray:
    """Puts the outputs `[C, B, ...]` of all microbatches into the order of the task's rows."""
    count, trailing = outputs[0].shape[0], outputs[0].shape[2:]
    by_row = np.empty((count, prepared.rows, *trailing), outputs[0].dtype)
    for microbatch, output in zip(prepared.microbatches, outputs):
        real_B = microbatch.rows_B >= 0
        by_row[:, microbatch.rows_B[real_B]] = output[:, real_B]
    return by_row
