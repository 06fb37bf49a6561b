"""What a search has to beat, each at a stated number of evaluations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxmerge.errors import JaxmergeError
from jaxmerge.rundir import Candidate
from jaxmerge.scores.objective import Objective
from jaxmerge.search.archive import Archive, Request


class Setting(NamedTuple):
    """What a baseline may use: the individuals' scores, and evaluations on the search split."""

    archive: Archive
    individuals: Sequence[Candidate]
    objective: Objective
    budget: int  # evaluations that the search has
    seed: int


class Found(NamedTuple):
    """A method's choice, and how many evaluations it took beyond those of the individuals."""

    name: str
    candidate: Candidate
    evaluations: int


def best(candidates: Sequence[Candidate], objective: Objective) -> Candidate:
    """The candidate of the highest objective; of equals, the first."""
    return max(candidates, key=lambda candidate: (objective.of(candidate.scores), -candidate.id))


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
    kept, soup = order[:1], setting.individuals[order[0]]
    for k in order[1:]:
        tried = _single("greedy", setting, [*kept, k]).candidate
        if setting.objective.of(tried.scores) >= setting.objective.of(soup.scores):
            kept, soup = [*kept, k], tried
    return Found("greedy", soup, len(order) - 1)


def random(setting: Setting) -> Found:
    """The best of as many uniform draws from the simplex (Dirichlet(1)) as the search evaluates."""
    generator = np.random.Generator(np.random.PCG64(setting.seed))
    drawn = generator.dirichlet(np.ones(len(setting.individuals)), setting.budget)
    candidates = setting.archive.evaluate(
        "search",
        [Request("baseline:random", "random", row) for row in drawn.astype(np.float32)],
    )
    return Found("random", best(candidates, setting.objective), setting.budget)


class Baseline(NamedTuple):
    """A method, and how many evaluations it makes for K checkpoints and the search's budget."""

    find: Callable[[Setting], Found]
    evaluations: Callable[[int, int], int]


BASELINES = {
    "uniform": Baseline(uniform, lambda K, budget: 1),
    "best-per-task": Baseline(best_per_task, lambda K, budget: 1),
    "greedy": Baseline(greedy, lambda K, budget: K - 1),
    "random": Baseline(random, lambda K, budget: budget),
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
    return Found(name, candidate, 1)
