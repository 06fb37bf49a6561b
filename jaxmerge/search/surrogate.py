"""Search by a surrogate: quadratics of the merge weights, one a task, fitted to scored merges.

MAP (arXiv 2406.07529) fits such quadratics to a few dozen random merges, and takes the Pareto front
of the quadratics for that of the merges. Here what they propose is scored, and they are fitted
again to all that has been scored, generation by generation: where a quadratic was wrong, the
proposal that it made corrects it.

Each proposal of a generation has a preference between the tasks and quadratics of its own, fitted
to a resample of the merges: the Bayesian bootstrap (Rubin, The Annals of Statistics 9, 1981). So
proposals differ where the quadratics are uncertain, as in Thompson sampling.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxmerge.errors import JaxmergeError
from jaxmerge.search.preferences import lattice
from jaxmerge.search.strategies import State, Strategy, on_host

NAME = "surrogate"
MOST_WEIGHTS = 64  # a quadratic of R numbers has R (R + 3) / 2 + 1 coefficients

_RIDGES = 10.0 ** np.arange(-6, 2)  # of features that have variance 1, per merge
_STARTS = 8  # of the ascent of each proposal
_STEPS, _RATE = 150, 0.1  # of Adam, in genotype units
_RHO = 0.05  # of the augmentation, as in ParEGO

# All merges that have been scored so far: what they were merged from, and the scores.
Known = Callable[[], tuple[Float[np.ndarray, "N *G R"], Float[np.ndarray, "N T"]]]


def check_fields(fields: Mapping[str, Any]) -> None:
    """Raises `JaxmergeError` for what a search by a surrogate does not go with.

    Args:
        fields: of a config, by their full names.
    """
    if fields["search.strategy"] == NAME and fields["analyses.pool_sizes"]:
        raise JaxmergeError(
            "a surrogate is fitted to all checkpoints",
            where="analyses.pool_sizes",
            expected="(); or another search.strategy",
            found=str(tuple(fields["analyses.pool_sizes"])),
        )


def check(weights: int) -> None:
    """Raises `JaxmergeError` unless so many weights, and other numbers, are few enough."""
    if weights > MOST_WEIGHTS:
        raise JaxmergeError(
            f"a quadratic of {weights} weights has more coefficients than merges can tell",
            where="space.granularity",
            expected=f'at most {MOST_WEIGHTS} weights in all groups, as "model" has; or another '
            "search.strategy",
        )


# Longer than a screen: the functions of a strategy, which share what they are made of.
def surrogate(
    known: Known,
    start: Float[np.ndarray, " D"],
    population: int,
    *,
    mapped: Callable[[Any], Any],
    sigma: float,
    bounds: tuple[float, float],
    tasks: int,
) -> Strategy:
    """The strategy; it asks for genotypes like every other one.

    The first generation is normal around the start. Of later ones each proposal is the genotype
    where its quadratics q promise most: with T = 1 the largest q, else the largest
    min_t v_t g_t + rho sum_t v_t g_t, where g_t is how far q_t is above the best score of the task
    so far, in units of the range of its scores (the scalarisation of ParEGO: Knowles, IEEE
    Transactions on Evolutionary Computation 10(1), 2006).

    Args:
        known: see `Known`; asked anew for each generation.
        start: genotype to start from; of G groups one after the other.
        population: P.
        mapped: genotypes `[D]` to what is merged from, of any shape.
        sigma: standard deviation of the first generation.
        bounds: of genotypes.
        tasks: T, whose front is looked for; 1: `known` has the objective.
    """
    size = len(start)
    ascend = jax.jit(jax.vmap(functools.partial(_ascend, mapped, bounds=bounds)))

    def ask(seed: int, generation: int, state: State) -> tuple[np.ndarray, State]:
        rng = np.random.default_rng((seed, generation))
        if generation == 0:
            z_PxD = start + sigma * rng.standard_normal((population, size))
            z_PxD[0] = start
            return np.clip(z_PxD, *bounds).astype(np.float32), state
        rows, scores_NxT = known()
        w_NxR = np.asarray(rows, np.float64).reshape(len(rows), -1)
        middle_R, scale_R = w_NxR.mean(axis=0), w_NxR.std(axis=0)
        scale_R = np.where(scale_R > 1e-9, scale_R, 1.0)
        ideal_T, worst_T = scores_NxT.max(axis=0), scores_NxT.min(axis=0)
        units = (scores_NxT - ideal_T) / np.where(ideal_T > worst_T, ideal_T - worst_T, 1.0)
        fit = _Fit((w_NxR - middle_R) / scale_R, units)
        quadratics = np.stack([fit.resampled(rng) for _ in range(population)])
        v_PxT = _preferences(tasks, population, rng)
        z_PxSxD = start + sigma * 2 * rng.standard_normal((population, _STARTS, size))
        with on_host():
            found = ascend(
                *(jnp.asarray(each, jnp.float32) for each in (z_PxSxD, quadratics, v_PxT)),
                jnp.broadcast_to(jnp.asarray(middle_R, jnp.float32), (population, len(middle_R))),
                jnp.broadcast_to(jnp.asarray(scale_R, jnp.float32), (population, len(scale_R))),
            )
        return np.asarray(found), state

    def tell(
        seed: int, generation: int, z_PxD: np.ndarray, fitness: np.ndarray, state: State
    ) -> State:
        return {"told": np.int32(generation + 1)}  # all else is in what is known

    return Strategy(population, lambda seed: {"told": np.int32(0)}, ask, tell, by_task=tasks > 1)


def _preferences(tasks: int, population: int, rng: np.random.Generator) -> Float[np.ndarray, "P T"]:
    """Of a lattice of the simplex, which has its corners too, as many as are wanted."""
    if tasks == 1:
        return np.ones((population, 1))
    return rng.permutation(lattice(tasks, population))[:population]


def _features(w: Any) -> Any:
    """1, all w_j, and all products w_i w_j with i <= j, of `[..., R]`."""
    xp = w.__array_namespace__()
    i, j = np.triu_indices(w.shape[-1])
    return xp.concatenate([xp.ones((*w.shape[:-1], 1), w.dtype), w, w[..., i] * w[..., j]], axis=-1)


class _Fit:
    """Ridge regressions of scores on quadratic features of standardised weights.

    The penalty of each task is the one that has the least error where merges are left out one by
    one, all of them at once by the hat matrix.
    """

    def __init__(self, w_NxR: Float[np.ndarray, "N R"], scores_NxT: Float[np.ndarray, "N T"]):
        self._x_NxF, self._y_NxT = _features(w_NxR), scores_NxT
        errors = [self._left_out(ridge) for ridge in _RIDGES]
        self._ridge_T = _RIDGES[np.argmin(errors, axis=0)]

    def resampled(self, rng: np.random.Generator) -> Float[np.ndarray, "T F"]:
        """Coefficients of all tasks, from merges that count as a resample has them."""
        count_N = rng.exponential(size=len(self._x_NxF))
        count_N /= count_N.mean()
        x = self._x_NxF * count_N[:, None]
        return np.stack(
            [
                np.linalg.solve(self._penalised(self._x_NxF.T @ x, ridge), x.T @ self._y_NxT[:, t])
                for t, ridge in enumerate(self._ridge_T)
            ]
        )

    def _left_out(self, ridge: float) -> Float[np.ndarray, " T"]:
        """Mean squares of the errors at merges that were left out."""
        x = self._x_NxF
        hat_NxN = x @ np.linalg.solve(self._penalised(x.T @ x, ridge), x.T)
        residual = (self._y_NxT - hat_NxN @ self._y_NxT) / (1 - np.diag(hat_NxN))[:, None]
        return np.mean(residual**2, axis=0)

    def _penalised(self, gram_FxF: np.ndarray, ridge: float) -> np.ndarray:
        """The intercept is not pulled to 0, but for what keeps the matrix invertible."""
        penalty_F = np.full(len(gram_FxF), ridge * len(self._x_NxF))
        penalty_F[0] = 1e-9
        return gram_FxF + np.diag(penalty_F)


def _ascend(
    mapped: Callable[[Any], Any],
    z_SxD: jax.Array,
    quadratics_TxF: jax.Array,
    v_T: jax.Array,
    middle_R: jax.Array,
    scale_R: jax.Array,
    *,
    bounds: tuple[float, float],
) -> jax.Array:
    """Where the quadratics promise most, of the places that an ascent reaches from some starts."""
    import optax  # of searches alone: a fifth of a second

    def promised(z_D: jax.Array) -> jax.Array:
        w_R = (jnp.reshape(mapped(z_D), -1) - middle_R) / scale_R
        gains_T = quadratics_TxF @ _features(w_R)
        return jnp.min(v_T * gains_T) + _RHO * jnp.sum(v_T * gains_T)

    optimizer = optax.adam(optax.cosine_decay_schedule(_RATE, _STEPS))
    slope = jax.vmap(jax.grad(promised))

    def step(carried: Any, _: None) -> tuple[Any, None]:
        z, inner = carried
        updates, inner = optimizer.update(-slope(z), inner, z)
        moved: Any = optax.apply_updates(z, updates)
        return (jnp.clip(moved, *bounds), inner), None

    (z_SxD, _), _ = jax.lax.scan(step, (z_SxD, optimizer.init(z_SxD)), None, length=_STEPS)
    return z_SxD[jnp.argmax(jax.vmap(promised)(z_SxD))]
