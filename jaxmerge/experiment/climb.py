"""Searches along gradients, from a config: what is climbed, by which strategy, at which cost."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxmerge import config as configs
from jaxmerge.config import Config
from jaxmerge.errors import JaxmergeError
from jaxmerge.evaluation.soft import SoftScore
from jaxmerge.experiment.budget import build_strategy
from jaxmerge.experiment.prepare import Prepared
from jaxmerge.hosts import processes
from jaxmerge.rundir import Candidate, cost
from jaxmerge.scores.objective import Objective
from jaxmerge.search import gradient, space
from jaxmerge.search.strategies import Strategy
from jaxmerge.tasks.common import Task, accepting, wants_texts

_LEAST_SIGMA = 0.05  # of `search.sigma`, that a strategy starts with after gradients


class Climb(NamedTuple):
    """A search along gradients.

    Attributes:
        strategy: that steps along them.
        evaluations: candidates that it scores.
        soft: what it climbs.
        texts: examples of each task for which accepted texts stand.
    """

    strategy: Strategy
    evaluations: int
    soft: SoftScore
    texts: Mapping[str, int]

    def findings(self) -> dict[str, Any]:
        """What results.json says of it, by task."""
        soft = self.soft
        return {
            task: {
                "form": soft.forms[task],
                "spearman": None if math.isnan(agreement) else agreement,
                "left_out": soft.left_out[task],
                "by_texts": self.texts.get(task, 0),
            }
            for task, agreement in soft.agreement.items()
        }


def wanted(config: Config) -> bool:
    """Whether the run climbs, all the way or to start from there."""
    return gradient.NAME in (config.search.strategy, config.search.warm_start)


def climb(
    config: Config, prepared: Prepared, objective: Objective, individuals: Sequence[Candidate]
) -> Climb:
    """The search along gradients of the soft score.

    Args:
        config: of the run.
        prepared: of the run.
        objective: of the tasks' scores.
        individuals: the single checkpoints, scored.

    Raises:
        JaxmergeError: nothing can be climbed, or the budget is less than a step.
    """
    pool = prepared.pool
    tasks, texts, first = _told(prepared)
    soft = prepared.soften(tasks)
    scores = [one.scores for one in individuals]
    agreement = soft.choose_forms(scores)
    _say(soft, agreement, texts)
    first["read"] = first.get("read", 0) + soft.read
    settings = _within_tokens(config, soft.differentiated, cost(first), individuals)

    def tokens(generation: int) -> Mapping[str, int]:
        every = settings.every
        steps = range(generation * every, min((generation + 1) * every, settings.steps))
        told = {"differentiated": soft.differentiated(steps)}
        return told | (first if generation == 0 else {})

    fields = config.space
    strategy = gradient.gradient(
        soft.slopes,
        settings,
        objective,
        groups=pool.count,
        checkpoints=len(pool.names),
        start=config.search.init,
        constraint=fields.constraint,
        bounds=fields.bounds,
        shrink=fields.shrink,
        # Of tasks that nothing stands for the scores stay what they are on average.
        constant={task: float(np.mean([one[task] for one in scores])) for task in soft.without},
    )
    evaluations = settings.generations * gradient.POPULATION
    return Climb(strategy._replace(tokens=tokens), evaluations, soft, texts)


def warmed(config: Config, prepared: Prepared, warm: Sequence[Candidate]) -> Strategy:
    """The config's strategy, from where gradients have ended.

    It starts at the mean of the late iterates, with the step that was left: the root mean square of
    how far the last iterate is from there, `search.sigma` at most.

    Args:
        config: of the run.
        prepared: of the run.
        warm: the candidates of the search along gradients.
    """
    fields, most = config.space, config.search.sigma
    last, mean = (
        space.genotypes(np.array(one.weights), fields.constraint, fields.bounds, fields.shrink)
        for one in warm[-gradient.POPULATION :]
    )
    left = float(np.sqrt(np.mean((last - mean) ** 2)))
    return build_strategy(
        config,
        len(prepared.pool.names),
        groups=prepared.pool.count,
        start=mean.reshape(-1).astype(np.float32),
        sigma=min(max(left, _LEAST_SIGMA * most), most),
    )


def _told(prepared: Prepared) -> tuple[list[Task], dict[str, int], dict[str, int]]:
    """The tasks with what stands for their scores, of how many examples texts do, and the tokens.

    Where only a judge can tell, the texts stand that single checkpoints write and it accepts.
    """
    judged = [task.name for task in prepared.tasks if wants_texts(task)]
    if not judged:
        return [*prepared.tasks], {}, {}
    evaluator = prepared.evaluators["search"]
    places = {task: np.arange(N if task in judged else 0) for task, N in evaluator.examples.items()}
    K, G = len(prepared.pool.names), prepared.pool.count
    alone = np.repeat(np.eye(K, dtype=np.float32)[:, None], G, axis=1)
    found = evaluator.part(places).accepted(alone if prepared.pool.groups else alone[:, 0])
    tasks = [
        accepting(task, found.texts[task.name]) if task.name in judged else task
        for task in prepared.tasks
    ]
    texts = {task: sum(map(bool, each)) for task, each in found.texts.items()}
    return tasks, texts, found.tokens


def _say(soft: SoftScore, agreement: Mapping[str, float], texts: Mapping[str, int]) -> None:
    if not processes.first():
        return
    for task, correlation in agreement.items():
        said = f", {texts[task]} examples by texts that were accepted" if texts.get(task) else ""
        said += f", {soft.left_out[task]} examples left out" if soft.left_out[task] else ""
        print(
            f"jaxmerge: {task}: soft score {soft.forms[task]}, rank correlation "
            f"{correlation:.2f}{said}",
            file=sys.stderr,
        )
    for task in soft.without:
        print(
            f"jaxmerge: {task}: nothing stands for its score, so no gradient is along it; it "
            "counts where candidates are scored",
            file=sys.stderr,
        )


def _within_tokens(
    config: Config,
    differentiated: Callable[[Iterable[int]], int],
    first: int,
    individuals: Sequence[Candidate],
) -> gradient.Settings:
    """The settings with as many steps as the config's tokens are enough for, true scores included.

    The schedule of the learning rate is that of so many steps. A true score is as dear as that of
    the dearest single checkpoint.

    Args:
        config: of the run.
        differentiated: tokens of some steps; see `SoftScore`.
        first: tokens that were taken before the first step.
        individuals: the single checkpoints.
    """
    settings, budget = configs.settings(config), config.search.budget_tokens
    if config.search.strategy != gradient.NAME:
        budget //= 2  # the other half is the strategy's
    scoring = gradient.POPULATION * max(one.cost for one in individuals)
    took = first
    for step in range(settings.steps if budget else 0):
        took += cost({"differentiated": differentiated([step])})
        took += scoring if step % settings.every == 0 else 0
        if took > budget and not step:
            raise JaxmergeError(
                "the budget is less than one step and its true scores",
                where="search.budget_tokens",
                expected=f"at least {took}",
                found=str(budget),
            )
        if took > budget:
            return settings._replace(steps=step)
    return settings
