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
from jaxmerge.evaluation.generate import log_likelihood
from jaxmerge.evaluation.minibatches import asked
from jaxmerge.evaluation.rows import Limits
from jaxmerge.evaluation.tokenizer import Tokenizer
from jaxmerge.hosts import processes
from jaxmerge.merge.groups import Groups
from jaxmerge.merge.linear import Merger, ResidentMerger
from jaxmerge.models.deferred import apart, joined
from jaxmerge.models.model import Model, Params
from jaxmerge.tasks.common import Task
from jaxmerge.trees import PyTree

# What of an answer's log-likelihood is maximised: exp(nats), exp(nats / tokens), nats / tokens.
FORMS = ("probability", "per_token", "log")

_BETTER = 0.1  # by which another form's rank correlation must be above the first's to be chosen


class Slope(NamedTuple):
    """A task's soft score on a minibatch, and its derivatives by the weights."""

    score: float
    by_weights: Float[np.ndarray, "G K"]


class SoftScore:
    """The soft scores of merges on the examples of the search split, and their derivatives.

    Args:
        merge: the pool's merge on the devices of `mesh`: `Pool.merge`, or `merger(trees)`.
        checkpoints: K.
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
        without: tasks that have no example with a soft score; they are left out.

    Raises:
        JaxmergeError: no task has an example with a soft score.
    """

    def __init__(
        self,
        merge: Merger,
        checkpoints: int,
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
        self._merge, self._K, self._groups = merge, checkpoints, groups
        self._mesh, self._seed = mesh, seed
        encode = functools.partial(
            asked, places=mesh.shape["pop"], branching=model.branches is not None
        )
        self._model = model
        asked_of = {task.name: encode(task, tokenizer, limits, minibatch) for task in tasks}
        self._tasks = {name: of for name, of in asked_of.items() if of.minibatches}
        self.without = tuple(name for name in asked_of if name not in self._tasks)
        if not self._tasks:
            raise JaxmergeError(
                "no search example has a text that stands for its score, so there is nothing that "
                "a gradient could climb",
                where=", ".join(f"task {name}" for name in self.without),
                expected="targets that the judge takes for right, choices, texts, or answers of "
                "single checkpoints that it accepts; or another search.strategy",
            )
        over_pop = NamedSharding(mesh, PartitionSpec("pop"))
        self._arrays = {
            name: [
                [processes.place(each, over_pop) for each in one.arrays] for one in of.minibatches
            ]
            for name, of in self._tasks.items()
        }
        self.forms = dict.fromkeys(self._tasks, FORMS[0])
        self.agreement: dict[str, float] = {}
        self._looks = 0  # whole passes over all examples
        # Between CPU devices, collectives of programs that queue up can wait for each other.
        self._one_at_a_time = mesh.devices.flat[0].platform == "cpu"

    @property
    def left_out(self) -> dict[str, int]:
        """Examples of each task that have no soft score."""
        return {name: of.left_out for name, of in self._tasks.items()}

    def slopes(self, weights_GxK: Float[np.ndarray, "G K"], step: int) -> dict[str, Slope]:
        """Each task's soft score on the minibatch of a step, with its derivatives."""
        merged = self._merged(weights_GxK)
        found = {}
        for name, of in self._tasks.items():
            turn = self._turn(name, step)
            climb = program(self._model, self._mesh, of.kind, self.forms[name])
            score_C, gradients = self._started(climb(merged, *self._arrays[name][turn]))
            by_C = self._started(self._merge.pullback(gradients))
            del gradients  # as large as a model: those of the next task take its place
            score_C, by_C = (processes.fetch(each).astype(np.float64) for each in (score_C, by_C))
            count = of.minibatches[turn].examples
            found[name] = Slope(float(score_C.sum() / count), by_C.sum(axis=0) / count)
        self._give_back(merged)
        return found

    def score(self, weights_GxK: Float[np.ndarray, "G K"], form: str = "") -> dict[str, float]:
        """Each task's soft score on all its examples that have one.

        Args:
            weights_GxK: of the merge.
            form: of answers; "": the one that was chosen for the task.
        """
        found = self._by_form(weights_GxK)
        return {name: of[form or self.forms[name]] for name, of in found.items()}

    def choose_forms(self, checkpoints: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Chooses the form of answers whose ranks of the checkpoints agree best with the true ones.

        Args:
            checkpoints: true scores of each, by task, in pool order.

        Returns:
            Spearman's correlation of the chosen form with the true score, by task; NaN where either
            is the same for all checkpoints.
        """
        G = len(self._groups.names) if self._groups else 1
        soft = [self._by_form(np.repeat(row[None], G, 0)) for row in np.eye(self._K)]
        agreement = {}
        for name, of in self._tasks.items():
            true = [each[name] for each in checkpoints]
            for form in FORMS if of.kind == "answer" else FORMS[:1]:
                now = _agreement([each[name][form] for each in soft], true)
                if form == FORMS[0] or _is_better(now, agreement[name]):
                    self.forms[name], agreement[name] = form, now
        self.agreement = agreement
        return agreement

    def _by_form(self, weights_GxK: np.ndarray) -> dict[str, dict[str, float]]:
        """Each task's soft score in every form; all come from the same log-likelihoods."""
        merged, found = self._merged(weights_GxK), {}
        self._looks += 1
        for name, of in self._tasks.items():
            score = program(self._model, self._mesh, of.kind)
            sums = [self._started(score(merged, *each)) for each in self._arrays[name]]
            count = sum(each.examples for each in of.minibatches)
            sums_CxF = np.concatenate([processes.fetch(each).astype(np.float64) for each in sums])
            found[name] = dict(zip(FORMS, (sums_CxF.sum(axis=0) / count).tolist()))
        self._give_back(merged)
        return found

    def differentiated(self, steps: Iterable[int]) -> int:
        """Tokens that go through a model in these steps, forward and then backward."""
        return sum(
            of.minibatches[self._turn(name, step)].read
            for step in steps
            for name, of in self._tasks.items()
        )

    @property
    def read(self) -> int:
        """Tokens that `score` and `choose_forms` have read."""
        whole = sum(each.read for of in self._tasks.values() for each in of.minibatches)
        return self._looks * whole

    def _give_back(self, merged: PyTree) -> None:
        if isinstance(self._merge, ResidentMerger):
            self._merge.give_back(merged)

    def _started(self, outputs: Any) -> Any:
        return jax.block_until_ready(outputs) if self._one_at_a_time else outputs

    def _merged(self, weights_GxK: np.ndarray) -> PyTree:
        """The merge in each place of `pop`."""
        rows = weights_GxK if self._groups else weights_GxK[0]
        return self._merge(np.repeat(rows[None], self._mesh.shape["pop"], axis=0))

    def _turn(self, name: str, step: int) -> int:
        """The minibatch of a task at a step: all of them in a new order, again and again."""
        count = len(self._tasks[name].minibatches)
        place = [*self._tasks].index(name)
        rng = np.random.Generator(np.random.PCG64([self._seed, place, step // count]))
        return int(rng.permutation(count)[step % count])


def _agreement(soft: Sequence[float], true: Sequence[float]) -> float:
    """Spearman's rank correlation; NaN where either is the same everywhere."""
    if min(len(set(soft)), len(set(true))) < 2:
        return math.nan
    return float(np.corrcoef(rankdata(soft), rankdata(true))[0, 1])


def _is_better(now: float, before: float) -> bool:
    """Whether a rank correlation is clearly above another; NaN is none."""
    return now > before + _BETTER or (math.isnan(before) and not math.isnan(now))


@functools.cache
def program(model: Model, mesh: Mesh, kind: str, climbed: str = "") -> Callable[..., Any]:
    """`(merged_C, *arrays_C) -> sums_CxF`, in each of `FORMS`; or sums `[C]` and derivatives.

    Args:
        model: of all merges.
        mesh: whose axis `pop` has a place for each of C merges.
        kind: of the task, see `tasks.common.Soft`; other than answers have the same in all forms.
        climbed: the form of which the derivatives by the merged parameters are wanted; "": none.
    """

    def soft(params: Params, *arrays: Array) -> dict[str, Array]:
        *tokens, request_BxQ, example_R, right_R, length_R, tokens_R = arrays
        R = len(example_R)
        nats_BxQ = log_likelihood(model, params, *tokens).nats_BxQ
        nats_R = jnp.zeros(R + 1).at[request_BxQ].add(nats_BxQ)[:R]
        # Requests that only fill up are of an example after the last, and not right.
        if kind == "choice":
            return dict.fromkeys(FORMS, _chosen(nats_R / length_R, example_R, right_R))
        if kind == "text":
            return dict.fromkeys(FORMS, jnp.sum(right_R * nats_R / length_R))
        # What is no probability is not added up over an example's answers, but averaged.
        answers_E = jnp.zeros(R + 1).at[example_R].add(right_R)
        share_R = right_R / jnp.maximum(answers_E[example_R], 1)
        per_token_R = nats_R / tokens_R
        return {
            "probability": jnp.sum(right_R * jnp.exp(nats_R)),
            "per_token": jnp.sum(share_R * jnp.exp(per_token_R)),
            "log": jnp.sum(share_R * per_token_R),
        }

    def climb(own: Params, shared: Any, *arrays: Array) -> tuple[Array, Params]:
        """The score and its derivatives by the leaves that are floating point; None for others.

        Of leaves that are made a layer at a time, they are by what makes them: their weights.
        """

        def floating(leaf: Array) -> Array | None:
            return leaf if jnp.issubdtype(leaf.dtype, jnp.floating) else None

        def of(some: Params) -> Array:
            each = jax.tree.map(lambda a, b: a if b is None else b, own, some)
            return soft(joined(each, shared), *arrays)[climbed]

        return jax.value_and_grad(of)(jax.tree.map(floating, own))

    def scored(own: Params, shared: Any, *arrays: Array) -> Array:
        found = soft(joined(own, shared), *arrays)
        return jnp.stack([found[form] for form in FORMS])

    run = climb if climbed else scored

    def local(own_C: Params, shared: Any, *arrays_C: Array) -> Any:
        return jax.lax.map(lambda each: run(each[0], shared, *each[1:]), (own_C, *arrays_C))

    over_pop = PartitionSpec("pop")

    def lifted(merged: Params, *arrays: Array) -> Any:
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(over_pop, PartitionSpec(), *(over_pop for _ in arrays)),
            out_specs=over_pop,
            axis_names={"pop"},
            check_vma=False,
        )(*apart(merged), *arrays)

    return jax.jit(lifted)


def _chosen(value_R: Array, example_R: Array, right_R: Array) -> Array:
    """The sum over examples of the softmax over its requests, at the right ones."""
    R = len(value_R)
    most_E = jnp.full(R + 1, -jnp.inf).at[example_R].max(jax.lax.stop_gradient(value_R))
    grown_R = jnp.exp(value_R - most_E[example_R])
    total_E = jnp.zeros(R + 1).at[example_R].add(grown_R)
    return jnp.sum(right_R * grown_R / total_E[example_R])
