"""Search by gradients: Optax over genotypes, along the derivatives of the soft score.

The merge is differentiable in its weights, and a method's other numbers, so one backward pass
through a merged model gives the derivatives by all of them; see `evaluation.soft`. A generation of
this strategy is some steps of the optimiser, after which two candidates are scored as all others
are: the iterate, and the mean of the iterates of the last half (Polyak & Juditsky, SIAM J. Control
30, 1992).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxmerge.errors import JaxmergeError, check_least
from jaxmerge.evaluation.soft import Slope
from jaxmerge.scores.calibration import FORMS, Line
from jaxmerge.scores.objective import Objective
from jaxmerge.search.strategies import State, Strategy, on_host

NAME = "gradient"
POPULATION = 2  # the iterate, and the mean of iterates
SCHEDULES = ("cosine", "linear", "constant")

# Of optax, but no optimisers: parts that they are made of.
_PARTS = ("scale", "clip", "clip_by_global_norm", "clip_by_block_rms", "add_decayed_weights")

_LATE = 4  # steps whose soft scores say where the search is
_DRAWS = 22  # keeps these draws apart from others with the same seed
_STEP = 1e-4  # of the difference that says how the objective changes with a task's score


class Settings(NamedTuple):
    """How the optimiser goes.

    Attributes:
        optimizer: its name in `optax`, such as `adam`.
        learning_rate: in genotype units, at the first step.
        schedule: of the learning rate, down to 0 (`cosine` or `linear`), or `constant`.
        steps: in all.
        every: steps between two true scores.
        smoothing: standard deviation, in genotype units, of what is added to the genotype where the
            derivatives of a step are taken.
    """

    optimizer: str
    learning_rate: float
    schedule: str
    steps: int
    every: int
    smoothing: float = 0.0

    @property
    def generations(self) -> int:
        """How often the true objective is looked at."""
        return -(-self.steps // self.every)


def check(settings: Settings) -> None:
    """Raises `JaxmergeError`, which names the field of a config, unless all can be used."""
    for name, value, right, expected in (
        ("learning_rate", settings.learning_rate, settings.learning_rate > 0, "above 0"),
        ("steps", settings.steps, settings.steps >= 1, "at least 1"),
        ("score_every", settings.every, settings.every >= 1, "at least 1"),
        ("schedule", settings.schedule, settings.schedule in SCHEDULES, ", ".join(SCHEDULES)),
        ("smoothing", settings.smoothing, settings.smoothing >= 0, "0 or more"),
    ):
        if not right:
            raise JaxmergeError(
                "out of range", where=f"search.{name}", expected=expected, found=str(value)
            )
    _optimizer(settings)


def check_fields(fields: Mapping[str, Any]) -> None:
    """Raises `JaxmergeError` for what a search by gradients, or a start by them, does not go with.

    Args:
        fields: of a config, by their full names.
    """
    strategy, warm_start = fields["search.strategy"], fields["search.warm_start"]
    if strategy == warm_start:
        raise JaxmergeError(
            "a search along gradients needs no other before it",
            where="search.warm_start",
            expected='"", or a strategy of evosax after it',
            found=warm_start,
        )
    unlike: list[tuple[str, Any]] = [("search.subset", 1.0)]
    if warm_start:
        unlike.append(("analyses.pool_sizes", ()))
    for where, expected in unlike:
        found = tuple(fields[where]) if isinstance(fields[where], list) else fields[where]
        if found != expected:
            raise JaxmergeError(
                "a search along gradients does not go with this",
                where=where,
                expected=f'{expected!r}; or another search.strategy, such as "CMA_ES"',
                found=repr(found),
            )
    check_least("search.minibatch", fields["search.minibatch"], 1)


Slopes = Callable[[Float[np.ndarray, "G R"], int, Mapping[str, str]], Mapping[str, Slope]]
Lines = Callable[[Float[np.ndarray, "generations T F"]], Mapping[str, Line]]


# Longer than a screen: the functions of a strategy, which share what they are made of.
def gradient(
    slopes: Slopes,
    lines: Lines,
    settings: Settings,
    objective: Objective,
    *,
    start: Float[np.ndarray, "G D"],
    mapped: Callable[[Any], Any],
    summing: int,
) -> Strategy:
    """The strategy; it asks for genotypes like every other one, and needs not be told of scores.

    What is climbed is the objective of the true scores that are to be expected of the soft ones; or
    its mean over a Gaussian around the genotype, of which each step has one draw (randomised
    smoothing: Duchi, Bartlett & Wainwright, SIAM J. Optimization 22(2), 2012). A maximum that is
    narrower than the Gaussian, as few examples have many, does not hold the search.

    Args:
        slopes: soft scores of a merge at a step, each task in the form that is asked for, and their
            derivatives by what it is merged from; see `SoftScore`.
        lines: from the soft scores of all steps of each generation so far, in the mean: how they
            stand to the true scores, for T tasks.
        settings: of the optimiser.
        objective: of the T tasks that have soft scores.
        start: genotype to start from, of G groups.
        mapped: genotypes `[G, D]` to what is merged from, `[G, R]`: `space.mapped` or `space.row`.
        summing: how many of the R, from the first on, have a sum that no genotype changes.
    """
    optimizer, tasks = _optimizer(settings), objective.tasks
    to_weights, moved = jax.jit(mapped), _moved(mapped, optimizer)
    seen = np.zeros((settings.generations, len(tasks), len(FORMS)), np.float32)

    def init(seed: int) -> State:
        with on_host():
            z = jnp.array(start, jnp.float32)
            sums = {"sum": jnp.zeros_like(z), "seen": seen}
            return {"z": z, "optimizer": optimizer.init(z), **sums}

    def ask(seed: int, generation: int, state: State) -> tuple[np.ndarray, State]:
        first = generation * settings.every
        stop = min(first + settings.every, settings.steps)
        line = lines(np.asarray(state["seen"][:generation]))
        forms = {task: line[task].form for task in tasks}
        soft_TxF = late_TxF = np.zeros(seen.shape[1:])  # means over all steps, and over late ones
        for step in range(first, stop):
            drawn = _drawn(settings.smoothing, seed, step, state["z"].shape)
            with on_host():
                weights = to_weights(state["z"] + drawn)
            found = slopes(np.asarray(weights), step, forms)
            now_TxF = np.stack([found[task].scores_F for task in tasks])
            soft_TxF = soft_TxF + (now_TxF - soft_TxF) / (step - first + 1)
            late_TxF = late_TxF + (now_TxF - late_TxF) / min(step - first + 1, _LATE)
            hoped = {task: line[task].of(soft_F) for task, soft_F in zip(tasks, late_TxF)}
            by_score = _by_score(objective, hoped)
            rise = np.asarray(
                sum(by_score[task] * line[task].slope * found[task].by_weights for task in tasks)
            )
            if summing:
                # What moves all weights of a group alike moves nothing where they have a sum. It is
                # taken away, since some optimisers would go by the sign of its rounding.
                alike = np.mean(rise[:, :summing], axis=1, keepdims=True)
                rise = np.concatenate([rise[:, :summing] - alike, rise[:, summing:]], axis=1)
            with on_host():
                state = moved(state, drawn, jnp.asarray(rise, jnp.float32))
                if step >= settings.steps // 2:
                    state = {**state, "sum": state["sum"] + state["z"]}
        late = stop - settings.steps // 2
        z, total = (np.asarray(state[name]).reshape(-1) for name in ("z", "sum"))
        told = np.array(state["seen"])
        told[generation] = soft_TxF
        state = {**state, "seen": told}
        return np.stack([z, total / np.float32(late) if late > 0 else z]), state

    def tell(
        seed: int, generation: int, z_PxD: np.ndarray, fitness_P: np.ndarray, state: State
    ) -> State:
        return state

    def expected_of(generation: int, state: State) -> Mapping[str, float]:
        seen = np.asarray(state["seen"])
        line = lines(seen[:generation])
        return {task: line[task].of(soft_F) for task, soft_F in zip(tasks, seen[generation])}

    return Strategy(POPULATION, init, ask, tell, expected=expected_of)


def mean_alone(strategy: Strategy) -> Strategy:
    """The same, asking only for the mean of the late iterates: half the true scores."""

    def ask(seed: int, generation: int, state: State) -> tuple[np.ndarray, State]:
        z_PxD, state = strategy.ask(seed, generation, state)
        return z_PxD[-1:], state

    return strategy._replace(population=1, ask=ask)


def _optimizer(settings: Settings) -> Any:
    """The `optax.GradientTransformation`."""
    import optax  # of searches alone: a fifth of a second

    rate, steps = settings.learning_rate, settings.steps
    schedule = {
        "cosine": lambda: optax.cosine_decay_schedule(rate, steps),
        "linear": lambda: optax.linear_schedule(rate, 0.0, steps),
        "constant": lambda: optax.constant_schedule(rate),
    }[settings.schedule]()
    make = getattr(optax, settings.optimizer, None)
    try:
        made = make(schedule) if make and settings.optimizer not in _PARTS else None
        if made:  # some want to know the value too
            update = functools.partial(_first_update, made)
            jax.eval_shape(update, jax.ShapeDtypeStruct((1,), np.float32))
    except (TypeError, ValueError, AttributeError):
        made = None
    if not made:
        raise JaxmergeError(
            "optax has no optimiser of this name that takes a learning rate",
            where="search.optimizer",
            expected="such as adam, adamw, sgd, rmsprop, lion, adabelief",
            found=settings.optimizer,
        )
    return made


def _first_update(optimizer: Any, z: jax.Array) -> Any:
    return optimizer.update(z, optimizer.init(z), z)


def _moved(mapped: Callable[[Any], Any], optimizer: Any) -> Any:
    """One step up, along the derivatives by what is merged from, at so much beside the genotype."""
    import optax

    def moved(state: State, drawn_GxD: jax.Array, rise_GxR: jax.Array) -> State:
        _, back = jax.vjp(mapped, state["z"] + drawn_GxD)
        (rise,) = back(rise_GxR)
        updates, inner = optimizer.update(-rise, state["optimizer"], state["z"])
        return {**state, "z": optax.apply_updates(state["z"], updates), "optimizer": inner}

    return jax.jit(moved)


def _drawn(smoothing: float, seed: int, step: int, shape: tuple[int, ...]) -> np.ndarray:
    """What a step adds to the genotype; the same in all processes, and after a resume."""
    generator = np.random.Generator(np.random.PCG64([_DRAWS, seed, step]))
    return (smoothing * generator.standard_normal(shape)).astype(np.float32)


def _by_score(objective: Objective, scores: Mapping[str, float]) -> dict[str, float]:
    """The derivatives of the objective by the tasks' scores, as central differences.

    Every aggregate is linear in the scores, or in pieces.
    """

    def at(task: str, change: float) -> float:
        return objective.of({**scores, task: scores[task] + change})

    return {task: (at(task, _STEP) - at(task, -_STEP)) / (2 * _STEP) for task in scores}
