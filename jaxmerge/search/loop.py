"""The search: ask, evaluate, tell, within a budget; goes on where it stopped."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import Float

from jaxmerge.checkpoints import orbax
from jaxmerge.checkpoints.digest import check_digests, digests
from jaxmerge.errors import JaxmergeError
from jaxmerge.hosts import processes
from jaxmerge.rundir import Candidate, Weights, cost
from jaxmerge.scores.objective import Objective
from jaxmerge.search import space
from jaxmerge.search.archive import Archive, Request, best
from jaxmerge.search.parts import Places
from jaxmerge.search.strategies import State, Strategy


class Economy(NamedTuple):
    """How a search scores fewer examples; its final decision is made on all of them.

    Attributes:
        parts: of the search examples; each generation is scored on one, in turn.
        selected: of a generation, how many the strategy selects.
        finalists: candidates that are scored on all examples at the end: averages of those that
            the strategy selected late, and those of the best estimates.
    """

    parts: tuple[Places, ...]
    selected: int
    finalists: int


ToWeights = Callable[[Float[np.ndarray, "P D"]], Float[np.ndarray, "P *G K"]]
ToNumbers = Callable[[Float[np.ndarray, "P D"]], Sequence[Mapping[str, Any]]]


def search(
    archive: Archive,
    strategy: Strategy,
    to_weights: ToWeights = space.weights,
    *,
    objective: Objective,
    budget: int,
    budget_tokens: int = 0,
    seed: int = 0,
    states: Path | None = None,
    save_seconds: float = 60.0,
    origin: str = "search",
    name: str = "search",
    economy: Economy | None = None,
    numbers: ToNumbers | None = None,
) -> Candidate:
    """Runs `budget // population` generations at most; returns the best candidate of them.

    Started again, the search asks the log before it evaluates: the result is the same wherever it
    was stopped. The strategy's state, saved every `save_seconds`, spares a single process that.

    Args:
        archive: evaluates on the split `search`.
        strategy: asks for genotypes.
        to_weights: genotypes to merge weights; see `jaxmerge.search.space`.
        objective: what is maximised.
        budget: evaluations at most.
        budget_tokens: tokens at most, as `rundir.cost` counts them; 0: any number. See `_fits`.
        seed: of the strategy.
        states: directory for the strategy's state; None: it is not saved.
        save_seconds: least time between two saves; 0 saves every generation.
        origin, name: of its candidates, which tell it from other searches of the run.
        economy: how fewer examples are scored. The candidates that are scored in full for the
            decision have the origin `ORIGIN:decision`; they are not of the budget. None: all
            candidates are scored on all examples.
        numbers: genotypes to the numbers of their windows, see `space.window`; None: genotypes are
            of no window.

    Raises:
        JaxmergeError: a budget is less than one generation.
    """
    population = strategy.population
    generations = budget // population
    if not generations:
        _refuse("search.budget", f"search.population, {population}", budget)
    state = strategy.init(seed)
    first = 0
    # Several processes ask again from the start, all from the log.
    saving = None if processes.several() else states
    if saving:
        first, state = _restore(saving, state, archive.recorded(origin, name) // population)
    archive.skip(origin, name, first * population)
    saved = time.monotonic()
    for generation in range(first, generations):
        mine = [past for past in archive.past if (past.origin, past.name) == (origin, name)]
        if budget_tokens and not _fits(archive, strategy, economy, mine, budget_tokens):
            break
        z_PxD, state, asked = _asked(strategy, seed, generation, state, to_weights, numbers)
        requests = [one._replace(origin=origin, name=name) for one in asked]
        scored = _evaluated(archive, economy, requests)
        fitness = _fitness(scored, objective, by_task=strategy.by_task)
        # A process that went astray must not go on: its collectives would match nobody's.
        processes.agree(f"generation {generation}", z_PxD.tobytes() + fitness.tobytes())
        state = strategy.tell(seed, generation, z_PxD, fitness, state)
        due = time.monotonic() - saved >= save_seconds and generation + 1 < generations
        if due and saving:
            _save(saving, generation + 1, state)
            saved = time.monotonic()
    mine = [past for past in archive.past if (past.origin, past.name) == (origin, name)]
    return best(_decided(archive, economy, mine, objective) if economy else mine, objective)


def _asked(
    strategy: Strategy,
    seed: int,
    generation: int,
    state: State,
    to_weights: ToWeights,
    numbers: ToNumbers | None,
) -> tuple[Float[np.ndarray, "P D"], State, list[Request]]:
    """The genotypes of a generation, the state after them, and requests that lack origin and name.

    The first has what asking took, and what is expected.
    """
    started = time.perf_counter()
    z_PxD, state = strategy.ask(seed, generation, state)
    windows = numbers(z_PxD) if numbers else [None] * len(z_PxD)
    requests = [
        Request("", "", row, generation, window=of_window)
        for row, of_window in zip(to_weights(z_PxD), windows)
    ]
    requests[0] = requests[0]._replace(
        tokens=strategy.tokens(generation),
        expected=strategy.expected(generation, state),
        seconds=time.perf_counter() - started,
    )
    return z_PxD, state, requests


def _fitness(
    scored: Sequence[Candidate], objective: Objective, *, by_task: bool
) -> Float[np.ndarray, " P"] | Float[np.ndarray, "P T"]:
    """What a strategy is told of a generation: its objective, or its scores on each task."""
    if by_task:
        return np.array([[one.scores[task] for task in objective.tasks] for one in scored])
    return np.array([objective.of(one.scores) for one in scored])


def _refuse(where: str, expected: str, found: int) -> NoReturn:
    raise JaxmergeError(
        "the budget is less than one generation",
        where=where,
        expected=f"at least {expected}",
        found=str(found),
    )


def _fits(
    archive: Archive,
    strategy: Strategy,
    economy: Economy | None,
    mine: Sequence[Candidate],
    budget: int,
) -> bool:
    """Whether one generation more is within a budget in tokens, in the unit of `rundir.cost`.

    Counted are what the search has taken so far, what asking takes, what the dearest of its
    generations took to score, and what the final decision takes: it is made within the budget too.
    Before the first generation, candidates are as dear as the dearest single checkpoint. All but
    what candidates will write is known before; only a generation that writes more than each before
    it can pass this.

    Args:
        mine: the candidates of the search so far.
        budget: tokens.

    Raises:
        JaxmergeError: not even the first generation is.
    """
    generation = mine[-1].generation + 1 if mine else 0
    dearest = max((one.cost for one in archive.past if one.origin == "individual"), default=0)
    took = Counter[int]()
    for one in mine:
        took[one.generation] += one.cost
    scored = [of_one - cost(strategy.tokens(number)) for number, of_one in took.items()]
    scoring, deciding = strategy.population * dearest, 0
    if economy:
        scoring = -(-scoring // len(economy.parts))
        deciding = economy.finalists * dearest
    asking = cost(strategy.tokens(generation))
    needed = took.total() + asking + max(scored, default=scoring) + deciding
    if needed > budget and not generation:
        _refuse("search.budget_tokens", f"{needed} tokens", budget)
    return needed <= budget


def decision(origin: str) -> str:
    """The origin of the candidates that the search of an origin decides between."""
    return f"{origin}:decision"


def _evaluated(
    archive: Archive, economy: Economy | None, requests: Sequence[Request]
) -> list[Candidate]:
    """A generation; with an economy, on the part that is its turn."""
    if not economy:
        return archive.evaluate("search", requests)
    turn = requests[0].generation % len(economy.parts)
    return archive.evaluate_parts(requests, [economy.parts[turn]])


def _decided(
    archive: Archive, economy: Economy, mine: Sequence[Candidate], objective: Objective
) -> list[Candidate]:
    """The finalists, scored on all examples; or who has been already.

    The best of many estimates owes much to chance. What the strategy selected from generation to
    generation owes less, and in its average the errors of the estimates cancel out, as in that of
    the iterates of a stochastic approximation (Polyak & Juditsky, SIAM J. Control 30, 1992).
    """
    generations = mine[-1].generation + 1
    half, quarter = generations // 2, generations - max(1, generations // 4)
    late = [one for one in mine if one.generation >= half]  # early ones are worse
    by_estimate = sorted(late, key=lambda one: (-objective.of(one.scores), one.id))
    finalists = [
        (_average(late, economy, objective, half), generations - 1),
        (_average(late, economy, objective, quarter), generations - 1),
        *((np.array(one.coefficients, np.float32), one.generation) for one in by_estimate),
    ]
    origin, name = decision(mine[0].origin), mine[0].name
    requests = [Request(origin, name, *finalist) for finalist in finalists]
    chosen = list({request.key: request for request in requests}.values())[: economy.finalists]
    return archive.evaluate_parts(chosen, economy.parts)


def _average(
    late: Sequence[Candidate], economy: Economy, objective: Objective, first: int
) -> Float[np.ndarray, "*G K"]:
    """The mean weights of the candidates that were selected in the generations from `first` on."""
    rows: list[Weights] = []
    for generation in range(first, late[-1].generation + 1):
        asked = [one for one in late if one.generation == generation]
        asked.sort(key=lambda one: (-objective.of(one.scores), one.id))
        rows += [one.coefficients for one in asked[: economy.selected]]
    return np.mean(rows, axis=0).astype(np.float32)


def _save(states: Path, generation: int, state: State) -> None:
    """Writes the state before `generation`, then forgets the older ones."""
    states.mkdir(parents=True, exist_ok=True)
    leaves = {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    path = states / str(generation)
    if path.exists():  # of a run that was killed and has come here again: the same state
        shutil.rmtree(path)
    orbax.save(path, leaves)
    for older in states.iterdir():
        if older != path:
            shutil.rmtree(older)


def _restore(states: Path, fresh: State, recorded: int) -> tuple[int, State]:
    """The newest finished state whose generations are all in the log, or the fresh one."""
    found = [int(path.name) for path in states.glob("*") if path.name.isdigit()]
    usable = [generation for generation in found if generation <= recorded]
    if not usable:
        return 0, fresh
    path = orbax.absolute(states / str(max(usable)))
    source = orbax.describe("state", path)
    here = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    values = orbax.restore(
        source,
        jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
            source.abstract,
        ),
    )
    check_digests(source, digests(values))
    leaves, structure = jax.tree.flatten(fresh)
    restored = [np.asarray(values[f"leaf{i}"]) for i in range(len(leaves))]
    return max(usable), structure.unflatten(restored)
