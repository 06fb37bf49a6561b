"""The soft score: a smooth stand-in for a task's score, and its derivatives by merge weights.

A score that counts right answers is a staircase in the weights; the probability of the right answer
is not. So what a gradient climbs is `tasks.common.Soft` of each example, averaged: one pass forward
and one backward through a merged model give its derivatives by all parameters, and their inner
products with the checkpoints (`merge.pullback`) those by all weights.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float
from scipy.stats import rankdata

from jaxmerge.errors import JaxmergeError
from jaxmerge.evaluation.batches import together
from jaxmerge.evaluation.generate import log_likelihood
from jaxmerge.evaluation.rows import Limits, Row, rows_of
from jaxmerge.evaluation.tokenizer import Tokenizer
from jaxmerge.merge.groups import Groups
from jaxmerge.merge.linear import merger
from jaxmerge.merge.pullback import pullback
from jaxmerge.models.model import Model, Params
from jaxmerge.tasks.common import Soft, Task
from jaxmerge.trees import PyTree

# What of an answer's log-likelihood is maximised: exp(nats), exp(nats / tokens), nats / tokens.
FORMS = ("probability", "per_token", "log")

_BETTER = 0.1  # by which another form's rank correlation must be above the first's to be chosen


class _Example(NamedTuple):
    """What is asked about an example, as rows of tokens whose requests are numbered from 0."""

    soft: Soft
    rows: list[Row]
    tokens: list[int]  # that are scored of each request

    @property
    def width(self) -> int:
        return max(row.length for row in self.rows)


class _Minibatch(NamedTuple):
    """Examples that go through a model in each place of the mesh axis `pop`, R requests there.

    Attributes:
        arrays: `[pop, ...]`: those of `generate.log_likelihood`; the request of each scored token;
            of each request its example, whether it is right, its length, and its tokens.
        examples: of all places.
        read: tokens that are read, without padding.
    """

    arrays: tuple[Any, ...]
    examples: int
    read: int


class _Asked(NamedTuple):
    """A task's examples in minibatches."""

    kind: str
    minibatches: list[_Minibatch]
    left_out: int  # examples that have no soft score


class Slope(NamedTuple):
    """A task's soft score on a minibatch, and its derivatives by the weights."""

    score: float
    by_weights: Float[np.ndarray, "G K"]


class SoftScore:
    """The soft scores of merges on the examples of the search split, and their derivatives.

    Args:
        trees: K checkpoints on the devices of `mesh`, as `Pool.trees`.
        model: their architecture.
        tokenizer: text to ids.
        tasks: what is scored.
        mesh: each place of its axis `pop` works on a part of a minibatch.
        limits: of which the context is heeded.
        groups: of leaves that share their weights; None: all do.
        minibatch: examples of a task in a step, in all places.
        seed: of the order of the minibatches.

    Attributes:
        forms: what is climbed of each task's answers; see `FORMS`.
        agreement: what `choose_forms` found.

    Raises:
        JaxmergeError: a task has no example with a soft score.
    """

    def __init__(
        self,
        trees: Sequence[PyTree],
        model: Model,
        tokenizer: Tokenizer,
        tasks: Sequence[Task],
        mesh: Mesh,
        limits: Limits,
        *,
        groups: Groups | None = None,
        minibatch: int = 32,
        seed: int = 0,
    ):
        self._trees, self._groups, self._mesh, self._seed = tuple(trees), groups, mesh, seed
        self._merge = merger(self._trees, groups)
        encode = functools.partial(_examples, tokenizer, limits, model.branches is not None)
        self._tasks = {task.name: _asked(task, encode, mesh, minibatch) for task in tasks}
        self._programs = {
            name: functools.partial(_program, model, mesh, asked.kind)
            for name, asked in self._tasks.items()
        }
        self.forms = dict.fromkeys(self._tasks, FORMS[0])
        self.agreement: dict[str, float] = {}
        self._looks = 0  # whole passes over all examples
        # Between CPU devices, collectives of programs that queue up can wait for each other.
        self._one_at_a_time = mesh.devices.flat[0].platform == "cpu"

    @property
    def left_out(self) -> dict[str, int]:
        """Examples of each task that have no soft score."""
        return {name: asked.left_out for name, asked in self._tasks.items()}

    def slopes(self, weights_GxK: Float[np.ndarray, "G K"], step: int) -> dict[str, Slope]:
        """Each task's soft score on the minibatch of a step, with its derivatives."""
        merged = self._merged(weights_GxK)
        found = {}
        for name, asked in self._tasks.items():
            minibatch = asked.minibatches[self._turn(name, step)]
            program = self._program(name, differentiate=True)
            score_C, gradients = self._started(program(merged, *minibatch.arrays))
            by_C = self._started(pullback(self._trees, gradients, self._groups))
            found[name] = Slope(
                float(np.asarray(score_C, np.float64).sum() / minibatch.examples),
                np.asarray(by_C, np.float64).sum(axis=0) / minibatch.examples,
            )
        self._merge.give_back(merged)
        return found

    def score(self, weights_GxK: Float[np.ndarray, "G K"], form: str = "") -> dict[str, float]:
        """Each task's soft score on all its examples that have one.

        Args:
            weights_GxK: of the merge.
            form: of answers; "": the one that was chosen for the task.
        """
        merged, found = self._merged(weights_GxK), {}
        self._looks += 1
        for name, asked in self._tasks.items():
            program = self._program(name, differentiate=False, form=form)
            sums = [self._started(program(merged, *each.arrays)) for each in asked.minibatches]
            count = sum(each.examples for each in asked.minibatches)
            found[name] = float(sum(np.asarray(each, np.float64).sum() for each in sums) / count)
        self._merge.give_back(merged)
        return found

    def choose_forms(self, checkpoints: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Chooses the form of answers whose ranks of the checkpoints agree best with the true ones.

        Args:
            checkpoints: true scores of each, by task, in pool order.

        Returns:
            Spearman's correlation of the chosen form with the true score, by task; NaN where either
            is the same for all checkpoints.
        """
        K, G = len(self._trees), len(self._groups.names) if self._groups else 1
        answers = any(asked.kind == "answer" for asked in self._tasks.values())
        agreement = {}
        for form in FORMS if answers else FORMS[:1]:
            soft = [self.score(np.repeat(row[None], G, 0), form) for row in np.eye(K)]
            for name, asked in self._tasks.items():
                columns = [[one[name] for one in each] for each in (soft, checkpoints)]
                varied = all(len(set(column)) > 1 for column in columns)
                ranks = [rankdata(column) for column in columns]
                now = float(np.corrcoef(*ranks)[0, 1]) if varied else float("nan")
                answer = asked.kind == "answer"
                if form == FORMS[0] or (answer and _is_better(now, agreement[name])):
                    self.forms[name], agreement[name] = form, now
        self.agreement = agreement
        return agreement

    def differentiated(self, steps: Iterable[int]) -> int:
        """Tokens that go through a model in these steps, forward and then backward."""
        return sum(
            asked.minibatches[self._turn(name, step)].read
            for step in steps
            for name, asked in self._tasks.items()
        )

    @property
    def read(self) -> int:
        """Tokens that `score` and `choose_forms` have read."""
        whole = sum(each.read for asked in self._tasks.values() for each in asked.minibatches)
        return self._looks * whole

    def _started(self, outputs: Any) -> Any:
        return jax.block_until_ready(outputs) if self._one_at_a_time else outputs

    def _merged(self, weights_GxK: np.ndarray) -> PyTree:
        """The merge in each place of `pop`."""
        rows = weights_GxK if self._groups else weights_GxK[0]
        return self._merge(np.repeat(rows[None], self._mesh.shape["pop"], axis=0))

    def _program(self, name: str, *, differentiate: bool, form: str = "") -> Callable[..., Any]:
        return self._programs[name](form or self.forms[name], differentiate)

    def _turn(self, name: str, step: int) -> int:
        """The minibatch of a task at a step: all of them in a new order, again and again."""
        count = len(self._tasks[name].minibatches)
        place = [*self._tasks].index(name)
        rng = np.random.Generator(np.random.PCG64([self._seed, place, step // count]))
        return int(rng.permutation(count)[step % count])


def _is_better(now: float, before: float) -> bool:
    """Whether a rank correlation is clearly above another; NaN is none."""
    return now > before + _BETTER or (math.isnan(before) and not math.isnan(now))


def _examples(
    tokenizer: Tokenizer, limits: Limits, branching: bool, task: Task
) -> list[_Example | None]:
    found: list[_Example | None] = []
    for example in task.splits["search"]:
        soft = task.soft(example)
        if soft is None:
            found.append(None)
            continue
        where = f"task {task.name}"
        asked = dict(enumerate(soft.requests))
        rows = rows_of(asked, tokenizer, limits, where, branching=branching)
        tokens = [0] * len(soft.requests)
        for branch in (branch for row in rows for branch in row.branches):
            tokens[branch.request] += len(branch.scored)
        found.append(_Example(soft, rows, tokens))
    return found


def _asked(
    task: Task, encode: Callable[[Task], list[_Example | None]], mesh: Mesh, count: int
) -> _Asked:
    """The examples of a task, those of like length together."""
    encoded = encode(task)
    examples = sorted((one for one in encoded if one), key=lambda one: one.width)
    if not examples:
        raise JaxmergeError(
            "no search example of the task has a text that stands for its score, so there is "
            "nothing that a gradient could climb",
            where=f"task {task.name}",
            expected="targets that its judge takes for right, choices or texts; or another "
            "search.strategy",
        )
    cut = [examples[start : start + count] for start in range(0, len(examples), count)]
    size = -(-count // mesh.shape["pop"])  # examples of a place
    R = size * max(len(one.soft.requests) for one in examples)
    B = size * max(len(one.rows) for one in examples)
    minibatches = [_minibatch(each, mesh, size, R, B) for each in cut]
    return _Asked(examples[0].soft.kind, minibatches, len(encoded) - len(examples))


def _minibatch(examples: Sequence[_Example], mesh: Mesh, size: int, R: int, B: int) -> _Minibatch:
    """Examples dealt out to the places of `pop`, each of which has B rows and R requests."""
    places = mesh.shape["pop"]
    widest = [row for one in examples for row in one.rows]
    of_places = [_place(examples[p::places], size, R, B, widest) for p in range(places)]
    over_pop = NamedSharding(mesh, PartitionSpec("pop"))
    arrays = tuple(jax.device_put(np.stack(each), over_pop) for each in zip(*of_places))
    return _Minibatch(arrays, len(examples), sum(row.length for row in widest))


def _place(
    examples: Sequence[_Example], size: int, R: int, B: int, widest: Sequence[Row]
) -> tuple[np.ndarray, ...]:
    """The arrays of one place of `pop`; see `_Minibatch`."""
    rows: list[Row] = []
    example_R, right_R = np.full(R, size, np.int32), np.zeros(R, np.float32)
    length_R, tokens_R = np.ones(R, np.float32), np.ones(R, np.float32)
    first = 0
    for number, one in enumerate(examples):
        these = slice(first, first + len(one.tokens))
        example_R[these], tokens_R[these] = number, one.tokens
        right_R[first + one.soft.right] = 1.0
        lengths = np.broadcast_to(np.array(one.soft.lengths), len(one.tokens))
        length_R[these] = np.where(lengths > 0, lengths, one.tokens)
        for row in one.rows:
            numbered = [branch._replace(request=branch.request + first) for branch in row.branches]
            rows.append(Row(row.trunk, numbered))
        first = these.stop
    # Rows that only fill up are real ones: of a row of padding derivatives need not be numbers.
    filled = together([*rows, *[widest[0]] * (B - len(rows))], widest)
    request_BxQ = np.where(filled.requests < 0, R, filled.requests).astype(np.int32)
    request_BxQ[len(rows) :] = R
    return (*filled.arrays, request_BxQ, example_R, right_R, length_R, tokens_R)


@functools.cache
def _program(
    model: Model, mesh: Mesh, kind: str, form: str, differentiate: bool
) -> Callable[..., Any]:
    """`(merged_C, *arrays_C) -> sums_C`, and their derivatives by the merged parameters."""

    def soft(params: Params, *arrays: Array) -> Array:
        *tokens, request_BxQ, example_R, right_R, length_R, tokens_R = arrays
        R = len(example_R)
        nats_BxQ = log_likelihood(model, params, *tokens).nats_BxQ
        nats_R = jnp.zeros(R + 1).at[request_BxQ].add(nats_BxQ)[:R]
        # Requests that only fill up are of an example after the last, and not right.
        if kind == "choice":
            return _chosen(nats_R / length_R, example_R, right_R)
        if kind == "text":
            return jnp.sum(right_R * nats_R / length_R)
        per_token_R = nats_R / tokens_R
        of_form = {"probability": jnp.exp(nats_R), "per_token": jnp.exp(per_token_R)}
        return jnp.sum(right_R * of_form.get(form, per_token_R))

    def climbed(params: Params, *arrays: Array) -> tuple[Array, Params]:
        """The score and its derivatives by the leaves that are floating point; None for others."""

        def own(leaf: Array) -> Array | None:
            return leaf if jnp.issubdtype(leaf.dtype, jnp.floating) else None

        def of(floating: Params) -> Array:
            each = jax.tree.map(lambda a, b: a if b is None else b, params, floating)
            return soft(each, *arrays)

        return jax.value_and_grad(of)(jax.tree.map(own, params))

    run = climbed if differentiate else soft

    def local(own_C: Params, *arrays_C: Array) -> Any:
        return jax.lax.map(lambda each: run(*each), (own_C, *arrays_C))

    over_pop = PartitionSpec("pop")

    def lifted(merged: Params, *arrays: Array) -> Any:
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(over_pop, *(over_pop for _ in arrays)),
            out_specs=over_pop,
            axis_names={"pop"},
            check_vma=False,
        )(merged, *arrays)

    return jax.jit(lifted)


def _chosen(value_R: Array, example_R: Array, right_R: Array) -> Array:
    """The sum over examples of the softmax over its requests, at the right one."""
    R = len(value_R)
    most_E = jnp.full(R + 1, -jnp.inf).at[example_R].max(jax.lax.stop_gradient(value_R))
    grown_R = jnp.exp(value_R - most_E[example_R])
    total_E = jnp.zeros(R + 1).at[example_R].add(grown_R)
    return jnp.sum(right_R * grown_R / total_E[example_R])
