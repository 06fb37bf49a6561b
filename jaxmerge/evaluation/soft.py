"""The soft score: a smooth stand-in for a task's score, and its derivatives by merge weights.

A score that counts right answers is a staircase in the weights; the probability of the right answer
is not. So what a gradient climbs is `tasks.common.Soft` of each example, averaged: one pass forward
and one backward through a merged model give its derivatives by all parameters, and their inner
products with the checkpoints (`merge.pullback`) those by all weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxmerge.errors import JaxmergeError
from jaxmerge.evaluation.generate import log_likelihood
from jaxmerge.evaluation.minibatches import asked
from jaxmerge.evaluation.rows import Limits
from jaxmerge.evaluation.tokenizer import Tokenizer
from jaxmerge.hosts import processes
from jaxmerge.merge.by_method import CombinationMerger
from jaxmerge.merge.groups import Groups
from jaxmerge.merge.linear import Merger, ResidentMerger
from jaxmerge.models.deferred import apart, joined
from jaxmerge.models.model import Model, Params
from jaxmerge.scores.calibration import FORMS
from jaxmerge.tasks.common import Task
from jaxmerge.trees import PyTree


class Slope(NamedTuple):
    """A task's soft scores on a minibatch, and the derivatives of one of them by the weights.

    Attributes:
        scores_F: in each of `calibration.FORMS`: of all examples, as far as the minibatch says it.
        by_weights: of the form that was asked for; by a method's rows of `merge.searched`, where
            the merge is by a method.
    """

    scores_F: Float[np.ndarray, " F"]
    by_weights: Float[np.ndarray, "G R"]


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
        tasks: names of those that have a soft score.
        without: names of those that have no example with one; they are left out.

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
        self.tasks = tuple(self._tasks)
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
        self._looks = 0  # whole passes over all examples
        self._above = {  # what each minibatch had above all examples, at the last of them
            name: np.zeros((len(of.minibatches), len(FORMS))) for name, of in self._tasks.items()
        }
        # Between CPU devices, collectives of programs that queue up can wait for each other.
        self._one_at_a_time = mesh.devices.flat[0].platform == "cpu"

    @property
    def left_out(self) -> dict[str, int]:
        """Examples of each task that have no soft score."""
        return {name: of.left_out for name, of in self._tasks.items()}

    def slopes(
        self, weights_GxK: Float[np.ndarray, "G R"], step: int, forms: Mapping[str, str]
    ) -> dict[str, Slope]:
        """Each task's soft scores on the minibatch of a step, and the derivatives of one form.

        Args:
            weights_GxK: of the groups; of a merge by a method rows of `merge.searched`.
            step: says which minibatch.
            forms: of each task.
        """
        weights_CxGxK = self._everywhere(weights_GxK)
        merged, found = self._merge(weights_CxGxK), {}
        for name, of in self._tasks.items():
            turn = self._turn(name, step)
            climb = program(self._model, self._mesh, of.kind, forms[name])
            sums_CxF, gradients = self._started(climb(merged, *self._arrays[name][turn]))
            by_C = self._started(self._merge.pullback(gradients, weights_CxGxK))
            del gradients  # as large as a model: those of the next task take its place
            sums_CxF, by_C = (processes.fetch(each).astype(np.float64) for each in (sums_CxF, by_C))
            count = of.minibatches[turn].examples
            # Minibatches are not alike: by what this one was above all at the last look.
            above_F = self._above[name][turn]
            found[name] = Slope(sums_CxF.sum(axis=0) / count - above_F, by_C.sum(axis=0) / count)
        self._give_back(merged)
        return found

    def scores(self, weights_GxK: Float[np.ndarray, "G K"]) -> dict[str, Float[np.ndarray, " F"]]:
        """Each task's soft score on all its examples that have one, in each of `FORMS`."""
        merged, found = self._merge(self._everywhere(weights_GxK)), {}
        self._looks += 1
        for name, of in self._tasks.items():
            score = program(self._model, self._mesh, of.kind)
            sums = [self._started(score(merged, *each)) for each in self._arrays[name]]
            counts = np.array([each.examples for each in of.minibatches])
            sums_MxF = np.stack([processes.fetch(each).astype(np.float64).sum(0) for each in sums])
            found[name] = sums_MxF.sum(axis=0) / counts.sum()
            self._above[name] = sums_MxF / counts[:, None] - found[name]
        self._give_back(merged)
        return found

    def losses(self, weights_GxK: Float[np.ndarray, "G K"]) -> dict[str, float]:
        """Of each task: nats for a token, or -log of the mean probability of the right choice."""
        found, nats = self.scores(weights_GxK), FORMS.index("log")
        of_choice = {name: each.kind == "choice" for name, each in self._tasks.items()}
        return {
            name: float(-np.log(found[name][nats]) if of_choice[name] else -found[name][nats])
            for name in self.tasks
        }

    def differentiated(self, steps: Iterable[int]) -> int:
        """Tokens that go through a model in these steps, forward and then backward."""
        return sum(
            of.minibatches[self._turn(name, step)].read
            for step in steps
            for name, of in self._tasks.items()
        )

    @property
    def read(self) -> int:
        """Tokens that `scores` has read."""
        return self._looks * self.whole

    @property
    def whole(self) -> int:
        """Tokens that one call of `scores` reads."""
        return sum(each.read for of in self._tasks.values() for each in of.minibatches)

    def _give_back(self, merged: PyTree) -> None:
        if isinstance(self._merge, ResidentMerger | CombinationMerger):
            self._merge.give_back(merged)

    def _started(self, outputs: Any) -> Any:
        return jax.block_until_ready(outputs) if self._one_at_a_time else outputs

    def _everywhere(self, weights_GxK: np.ndarray) -> np.ndarray:
        """The same in each place of `pop`."""
        rows = weights_GxK if self._groups else weights_GxK[0]
        return np.repeat(rows[None], self._mesh.shape["pop"], axis=0)

    def _turn(self, name: str, step: int) -> int:
        """The minibatch of a task at a step: all of them in a new order, again and again."""
        count = len(self._tasks[name].minibatches)
        place = [*self._tasks].index(name)
        rng = np.random.Generator(np.random.PCG64([self._seed, place, step // count]))
        return int(rng.permutation(count)[step % count])


@functools.cache
def program(model: Model, mesh: Mesh, kind: str, climbed: str = "") -> Callable[..., Any]:
    """`(merged_C, *arrays_C) -> sums_CxF`, in each of `FORMS`; or these and derivatives.

    Args:
        model: of all merges.
        mesh: whose axis `pop` has a place for each of C merges.
        kind: of the task, see `tasks.common.Soft`; other than answers have the same in all forms.
        climbed: the form of which the derivatives by the merged parameters are wanted; "": none.
    """

    def soft(params: Params, *arrays: Array) -> list[Array]:
        *tokens, request_BxQ, example_R, right_R, length_R, tokens_R = arrays
        R = len(example_R)
        nats_BxQ = log_likelihood(model, params, *tokens).nats_BxQ
        nats_R = jnp.zeros(R + 1).at[request_BxQ].add(nats_BxQ)[:R]
        # Requests that only fill up are of an example after the last, and not right.
        if kind == "choice":
            return [_chosen(nats_R / length_R, example_R, right_R)] * len(FORMS)
        if kind == "text":
            return [jnp.sum(right_R * nats_R / length_R)] * len(FORMS)
        # What is no probability is not added up over an example's answers, but averaged.
        answers_E = jnp.zeros(R + 1).at[example_R].add(right_R)
        share_R = right_R / jnp.maximum(answers_E[example_R], 1)
        per_token_R = nats_R / tokens_R
        in_form = {
            "probability": jnp.sum(right_R * jnp.exp(nats_R)),
            "per_token": jnp.sum(share_R * jnp.exp(per_token_R)),
            "log": jnp.sum(share_R * per_token_R),
        }
        return [in_form[form] for form in FORMS]

    def climb(own: Params, shared: Any, *arrays: Array) -> tuple[Array, Params]:
        """The scores, and derivatives by the leaves that are floating point; None for others.

        Of leaves that are made a layer at a time, they are by what makes them: their weights.
        """

        def floating(leaf: Array) -> Array | None:
            return leaf if jnp.issubdtype(leaf.dtype, jnp.floating) else None

        def of(some: Params) -> tuple[Array, Array]:
            each = jax.tree.map(lambda a, b: a if b is None else b, own, some)
            sums = soft(joined(each, shared), *arrays)
            return sums[FORMS.index(climbed)], jnp.stack(sums)

        (_, sums_F), derivatives = jax.value_and_grad(of, has_aux=True)(jax.tree.map(floating, own))
        return sums_F, derivatives

    def scored(own: Params, shared: Any, *arrays: Array) -> Array:
        return jnp.stack(soft(joined(own, shared), *arrays))

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
