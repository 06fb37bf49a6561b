"""What a search has to beat, each at a stated number of evaluations and tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxmerge.errors import JaxmergeError
from jaxmerge.rundir import Candidate
from jaxmerge.scores.objective import Objective
from jaxmerge.search import loop, strategies
from jaxmerge.search.archive import Archive, Request, best

PAPER = "CMA_ES"  # the strategy of arXiv 2412.04144


class Setting(NamedTuple):
    """What a baseline may use: the individuals' scores, and evaluations on the search split.

    Attributes:
        tokens: that the search took, in the unit of `rundir.cost`: what those baselines have that
            come after it.
    """

    archive: Archive
    individuals: Sequence[Candidate]
    objective: Objective
    seed: int
    tokens: int = 0


class Found(NamedTuple):
    """A method's choice, and what it took beyond the scores of the individuals.

    Attributes:
        name: of the method.
        candidate: its choice.
        evaluations: that it took.
        tokens: that it took, in the unit of `rundir.cost`; what had been scored before is free.
    """

    name: str
    candidate: Candidate
    evaluations: int
    tokens: int


def individuals(archive: Archive, names: Sequence[str]) -> list[Candidate]:
    """Every checkpoint by itself."""
    one_hot = np.eye(len(names), dtype=np.float32)
    return archive.evaluate(
        "search", [Request("individual", name, row) for name, row in zip(names, one_hot)]
    )


def uniform(setting: Setting) -> Found:
    """w_k = 1/K."""
    return _single("uniform", setting, range(len(setting.individuals)))


def best_per_task(setting: Setting) -> Found:
    """The average of the best checkpoint of each task; one that is best at two counts twice."""
    chosen = [
        int(np.argmax([individual.scores[task] for individual in setting.individuals]))
        for task in setting.objective.tasks
    ]
    return _single("best-per-task", setting, chosen)


def greedy(setting: Setting) -> Found:
    """Greedy soup (arXiv 2203.05482, recipe 1).

    Checkpoints are tried in order of their own objective, best first; one is kept when the average
    of those kept so far and it is at least as good as without it. K - 1 evaluations.
    """
    value = [setting.objective.of(individual.scores) for individual in setting.individuals]
    order = sorted(range(len(value)), key=lambda k: -value[k])
    kept, soup, tokens = order[:1], setting.individuals[order[0]], 0
    for k in order[1:]:
        tried = _single("greedy", setting, [*kept, k]).candidate
        tokens += tried.cost
        if setting.objective.of(tried.scores) >= setting.objective.of(soup.scores):
            kept, soup = [*kept, k], tried
    return Found("greedy", soup, len(order) - 1, tokens)


def random(setting: Setting) -> Found:
    """The best of uniform draws from the simplex (Dirichlet(1)), for as many tokens as the search.

    One more is drawn as long as it fits when it is as dear as the dearest candidate so far; one is
    drawn in any case.
    """
    generator = np.random.Generator(np.random.PCG64(setting.seed))
    candidates: list[Candidate] = []
    dearest, took = max(1, *(one.cost for one in setting.individuals)), 0
    fitting = max(1, setting.tokens // dearest)
    while fitting > 0:
        drawn = generator.dirichlet(np.ones(len(setting.individuals)), fitting)
        candidates += setting.archive.evaluate(
            "search",
            [Request("baseline:random", "random", row) for row in drawn.astype(np.float32)],
        )
        before, took = took, sum(one.cost for one in candidates)
        dearest = max(dearest, *(one.cost for one in candidates))
        fitting = (setting.tokens - took) // dearest if took > before else 0
    return Found("random", best(candidates, setting.objective), len(candidates), took)


def paper(setting: Setting) -> Found:
    """CMA-ES over one weight a checkpoint (arXiv 2412.04144), for as many tokens as the search.

    Weights are a softmax, from the uniform merge, as `search.strategy = "CMA_ES"` has them unless
    it is told otherwise. One generation is made in any case.
    """
    K, origin = len(setting.individuals), "baseline:paper"
    population = strategies.default_population(K)
    strategy = strategies.evosax(PAPER, K, population)
    costs = [max(1, one.cost) for one in setting.individuals]
    tokens = max(setting.tokens, population * max(costs))
    chosen = loop.search(
        setting.archive,
        strategy,
        objective=setting.objective,
        budget=tokens // min(costs),
        budget_tokens=tokens,
        seed=setting.seed,
        origin=origin,
        name="paper",
    )
    mine = [one for one in setting.archive.past if one.origin == origin]
    return Found("paper", chosen, len(mine), sum(one.cost for one in mine))


def _generations(checkpoints: int, draws: int) -> int:
    """Evaluations of the whole generations, one at least."""
    population = strategies.default_population(checkpoints)
    return max(1, draws // population) * population


class Baseline(NamedTuple):
    """A method.

    Attributes:
        find: looks for the merge.
        evaluations: how many it makes for K checkpoints, and for the draws that the search's tokens
            are enough for.
        after: whether it has the tokens that the search took, and so comes after it.
        heldout: whether its choice is scored on held-out tasks too.
    """

    find: Callable[[Setting], Found]
    evaluations: Callable[[int, int], int]
    after: bool = False
    heldout: bool = False


BASELINES = {
    "uniform": Baseline(uniform, lambda K, draws: 1, heldout=True),
    "best-per-task": Baseline(best_per_task, lambda K, draws: 1),
    "greedy": Baseline(greedy, lambda K, draws: K - 1),
    "random": Baseline(random, lambda K, draws: draws, after=True),
    "paper": Baseline(paper, _generations, after=True, heldout=True),
}


def check(names: Sequence[str]) -> None:
    """Raises `JaxmergeError` for a name that is not in `BASELINES`."""
    unknown = [name for name in names if name not in BASELINES]
    if unknown:
        raise JaxmergeError(
            "unknown baseline", where="baselines", expected=", ".join(BASELINES), found=unknown[0]
        )


def _single(name: str, setting: Setting, chosen: Sequence[int]) -> Found:
    """Evaluates the average of the chosen checkpoints."""
    weights = np.bincount(chosen, minlength=len(setting.individuals)) / len(chosen)
    request = Request(f"baseline:{name}", name, weights.astype(np.float32))
    (candidate,) = setting.archive.evaluate("search", [request])
    return Found(name, candidate, 1, candidate.cost)
