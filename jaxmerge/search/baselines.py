"""What a search has to beat, each at a stated number of evaluations and tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxmerge.errors import JaxmergeError, check_choice
from jaxmerge.rundir import Candidate
from jaxmerge.scores.objective import Objective
from jaxmerge.search import gradient, loop, space, strategies
from jaxmerge.search.archive import Archive, Request, best

PAPER = "CMA_ES"  # the strategy of arXiv 2412.04144
AUTO, UNIFORM, BEST = "auto", "uniform", "best"  # `search.start`, or the name of a baseline
METAGPT = "metagpt"

_TEMPERATURE = 5.0  # nats; that of the authors' code for LM-Cocktail


class Setting(NamedTuple):
    """What a baseline may use: the individuals' scores, and evaluations on the search split.

    Attributes:
        tokens: that the search took, in the unit of `rundir.cost`: what those baselines have that
            come after it.
        losses: of each checkpoint in nats, and the tokens that they took; see `climb.losses`.
        distances: |theta_k - theta_0|^2 of each checkpoint from the base.
    """

    archive: Archive
    individuals: Sequence[Candidate]
    objective: Objective
    seed: int
    tokens: int = 0
    losses: Callable[[], tuple[Float[np.ndarray, " K"], int]] | None = None
    distances: Callable[[], Float[np.ndarray, " K"]] | None = None


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


def lm_cocktail(setting: Setting) -> Found:
    """w = softmax(-L / 5), L_k the loss of a checkpoint on the search examples, in nats.

    LM-Cocktail, arXiv 2311.13534, which takes five examples of one task; the temperature is that of
    its authors' code. Of several tasks it is the mean of their losses.
    """
    from scipy.special import softmax  # of this recipe alone

    assert setting.losses
    losses_K, tokens = setting.losses()
    found = _weighted("lm-cocktail", setting, softmax(-losses_K / _TEMPERATURE))
    return found._replace(tokens=found.tokens + tokens)


def metagpt(setting: Setting) -> Found:
    """w_k = |theta_k - theta_0|^2 / sum_j |theta_j - theta_0|^2 over the whole model.

    MetaGPT, arXiv 2406.11385. They sum to 1, so that the base itself has no weight left.
    """
    assert setting.distances
    squares_K = setting.distances()
    total, K = squares_K.sum(), len(squares_K)
    weights_K = squares_K / total if total else np.full(K, 1 / K)
    return _weighted(METAGPT, setting, weights_K)


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
    "lm-cocktail": Baseline(lm_cocktail, lambda K, draws: 1),
    METAGPT: Baseline(metagpt, lambda K, draws: 1),
    "random": Baseline(random, lambda K, draws: draws, after=True),
    "paper": Baseline(paper, _generations, after=True, heldout=True),
}


def check(names: Sequence[str], base: str) -> None:
    """Raises `JaxmergeError` for a name that is not in `BASELINES`, or lacks the base it wants.

    Args:
        names: of `config.baselines`.
        base: `pool.base`.
    """
    unknown = [name for name in names if name not in BASELINES]
    if unknown:
        raise JaxmergeError(
            "unknown baseline", where="baselines", expected=", ".join(BASELINES), found=unknown[0]
        )
    if METAGPT in names and not base:
        raise JaxmergeError(
            "metagpt weighs checkpoints by how far they are from their base",
            where="pool.base",
            expected="the checkpoint that they were made from; or baselines without metagpt",
            found=repr(base),
        )


def start_of(fields: Mapping[str, Any]) -> str:
    """Where a search starts: `search.start`, of which "auto" is what was measured best.

    Args:
        fields: of a config, by their full names.
    """
    if fields["search.start"] != AUTO:
        return fields["search.start"]
    along = gradient.NAME in (fields["search.strategy"], fields["search.warm_start"])
    return BEST if along and not _own_start(fields) else UNIFORM


def _own_start(fields: Mapping[str, Any]) -> bool:
    """Whether a search has a start, or other numbers than the weights of a sum."""
    other = fields["merge.method"] != "linear" or fields["space.constraint"] == space.WINDOW
    return bool(fields["search.init"]) or other


def check_start(fields: Mapping[str, Any]) -> None:
    """Raises `JaxmergeError` for a `search.start` that a search can't have.

    Args:
        fields: of a config, by their full names.
    """
    start, names = fields["search.start"], fields["baselines"]
    before = [name for name in names if name != UNIFORM and not BASELINES[name].after]
    check_choice("search.start", start, (AUTO, UNIFORM, BEST, *before))
    if start not in (AUTO, UNIFORM) and _own_start(fields):
        raise JaxmergeError(
            "checkpoints and baselines are no start for a search with a start of its own, over "
            "another method, or over a window",
            where="search.start",
            expected=f"{AUTO} or {UNIFORM}",
            found=start,
        )


def begin(
    wanted: str, objective: Objective, individuals: Sequence[Candidate], found: Sequence[Found]
) -> Candidate | None:
    """What a search starts from; None: where it starts unless it is told.

    Args:
        wanted: see `start_of`.
        objective: of the search.
        individuals: the single checkpoints.
        found: by the baselines that come before the search.
    """
    if wanted == UNIFORM:
        return None
    by_name = {one.name: one.candidate for one in found}
    known = [*individuals, *by_name.values()]
    return best(known, objective) if wanted == BEST else by_name[wanted]


def _single(name: str, setting: Setting, chosen: Sequence[int]) -> Found:
    """Evaluates the average of the chosen checkpoints."""
    weights = np.bincount(chosen, minlength=len(setting.individuals)) / len(chosen)
    return _weighted(name, setting, weights)


def _weighted(name: str, setting: Setting, weights_K: Float[np.ndarray, " K"]) -> Found:
    request = Request(f"baseline:{name}", name, weights_K.astype(np.float32))
    (candidate,) = setting.archive.evaluate("search", [request])
    return Found(name, candidate, 1, candidate.cost)
