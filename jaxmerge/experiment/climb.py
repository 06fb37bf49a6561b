"""Searches along gradients, from a config: what is climbed, by which strategy, at which cost."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxmerge import config as configs
from jaxmerge.config import Config
from jaxmerge.errors import JaxmergeError
from jaxmerge.evaluation.soft import Slope
from jaxmerge.experiment.budget import (
    WARM,
    budget_divisor,
    build_strategy,
    within_tokens,
)
from jaxmerge.experiment.genotypes import genotypes, mapping, start_genotype
from jaxmerge.experiment.prepare import Prepared
from jaxmerge.hosts import processes
from jaxmerge.rundir import Candidate, cost
from jaxmerge.scores.calibration import Line, line
from jaxmerge.scores.objective import Objective
from jaxmerge.search import gradient, space
from jaxmerge.search.archive import Archive
from jaxmerge.search.baselines import UNIFORM, start_of
from jaxmerge.search.strategies import Strategy
from jaxmerge.tasks.common import Task, accepting, wants_texts

_LEAST_SIGMA = 0.05  # of `search.sigma`, that a strategy starts with after gradients


class Climb:
    """What searches along gradients climb: the soft scores, and what is known of them.

    Args:
        config: of the run.
        prepared: of the run.
        objective: of the tasks' scores.
        individuals: the single checkpoints, scored.
        merges: others that were scored, on which soft scores are compared with true ones too; the
            last is where the search starts.

    Attributes:
        evaluations: candidates that a search scores.

    Raises:
        JaxmergeError: nothing can be climbed, or the budget is less than a step.
    """

    def __init__(
        self,
        config: Config,
        prepared: Prepared,
        objective: Objective,
        individuals: Sequence[Candidate],
        merges: Sequence[Candidate],
    ):
        tasks, self._texts, self._first = _told(prepared)
        self._config, self._pool, self._soft = config, prepared.pool, prepared.soften(tasks)
        self._method = prepared.method
        self._objective = objective.over(self._soft.tasks)
        known: dict[object, Candidate] = {}
        for one in [*individuals, *merges]:  # each once, where it comes last
            known.pop(one.coefficients, None)
            known[one.coefficients] = one
        soft = [self._soft.scores(_by_group(one, prepared.pool.count)) for one in known.values()]
        self._soft_NxTxF = np.array([[each[task] for task in self._soft.tasks] for each in soft])
        self._true_NxT, self._start = self._true([*known.values()]), self._true(merges[-1:])
        self._from = merges[-1] if start_of(configs.fields(config)) != UNIFORM else None
        self._lines = self._lines_before = self._lines_of(self._soft_NxTxF, self._true_NxT)
        self._first["read"] = self._first.get("read", 0) + self._soft.read
        self._dearest = max(one.cost for one in individuals)
        budget = config.search.budget_tokens // budget_divisor(config)
        self._settings = self._within(configs.settings(config), budget, cost(self._first))
        if not self._settings.steps:
            raise JaxmergeError(
                "the budget is less than one step and its true scores",
                where="search.budget_tokens",
                expected=f"at least {self._least(cost(self._first)) * budget_divisor(config)}",
                found=str(config.search.budget_tokens),
            )
        self.evaluations = self._settings.generations * gradient.POPULATION

    def strategy(
        self,
        archive: Archive,
        origin: str = "search",
        name: str = "search",
        chosen: Sequence[int] | None = None,
    ) -> Strategy:
        """The strategy of a search, which finds out from its own candidates how soft scores stand.

        Args:
            archive: that scores them.
            origin, name: of its candidates.
            chosen: numbers of the checkpoints that have weights; None: all have.
        """
        chosen = range(len(self._pool.names)) if chosen is None else chosen
        begin = start_genotype(self._config, self._method, self._pool.count, chosen, self._from)
        lines = functools.partial(self._learnt, archive, (origin, name))
        return self._made(chosen, begin, self._settings, self._objective, lines, self._first)

    def toward(
        self, objective: Objective, start: Candidate, steps: int, tokens: int
    ) -> Strategy | None:
        """The strategy of a climb from a scored merge, along another objective of the same tasks.

        It asks for one candidate: the mean of its late iterates. How soft scores stand to true ones
        is what was known before the search, which a run that goes on knows as well.

        Args:
            objective: what is climbed.
            start: where.
            steps: of the optimiser, at most.
            tokens: at most, as `rundir.cost` counts them; 0: any number.

        Returns:
            None where the tokens are not enough for a step.
        """
        settings = configs.settings(self._config)._replace(steps=steps, every=steps)
        differentiated = self._soft.differentiated
        settings = within_tokens(settings, tokens, 0, differentiated, self._dearest)
        if not settings.steps:
            return None
        strategy = self._made(
            range(len(self._pool.names)),
            genotypes(self._config, self._method, self._pool.count, start),
            settings._replace(every=settings.steps),
            objective.over(self._soft.tasks),
            lambda _: self._lines_before,
            {},
        )
        return gradient.mean_alone(strategy)

    def _made(
        self,
        chosen: Sequence[int],
        start: Float[np.ndarray, "G D"],
        settings: gradient.Settings,
        objective: Objective,
        lines: gradient.Lines,
        took: Mapping[str, int],
    ) -> Strategy:
        """The strategy, whose first generation has what it took to know how soft scores stand."""
        K, of = len(self._pool.names), self._method
        inner = functools.partial(
            space.row if of else space.mapped,
            **{"checkpoints": len(chosen), **mapping(self._config, of, self._pool.count)},
        )

        def slopes(
            weights_GxM: np.ndarray, step: int, forms: Mapping[str, str]
        ) -> dict[str, Slope]:
            if [*chosen] == [*range(K)]:
                return self._soft.slopes(weights_GxM, step, forms)
            (weights_GxK,) = space.spread(weights_GxM[None], chosen, K)
            found = self._soft.slopes(weights_GxK, step, forms)
            of_chosen = {task: slope.by_weights[:, [*chosen]] for task, slope in found.items()}
            return {task: Slope(found[task].scores_F, of_chosen[task]) for task in found}

        def tokens(generation: int) -> Mapping[str, int]:
            every = settings.every
            steps = range(generation * every, min((generation + 1) * every, settings.steps))
            told = {"differentiated": self._soft.differentiated(steps)}
            return {**told, **(took if generation == 0 else {})}

        strategy = gradient.gradient(
            slopes,
            lines,
            settings,
            objective,
            start=start,
            mapped=inner,
            summing=0 if configs.constraint(self._config) == "free" else len(chosen),
        )
        return strategy._replace(tokens=tokens)

    def _learnt(
        self, archive: Archive, of_search: tuple[str, str], seen: np.ndarray
    ) -> Mapping[str, Line]:
        """How soft scores stand to true ones, from what was known and a search's own candidates."""
        mine = [one for one in archive.past if (one.origin, one.name) == of_search]
        true_gxT = self._true(mine[:: gradient.POPULATION][: len(seen)])
        # What the steps of a generation saw lies between the scores before and after them.
        before_gxT = np.concatenate([self._start, true_gxT])[: len(seen)]
        between = (true_gxT + before_gxT) / 2 if len(self._start) else true_gxT
        soft = np.concatenate([self._soft_NxTxF, seen.astype(np.float64)])
        found = self._lines_of(soft, np.concatenate([self._true_NxT, between]))
        if of_search[0] in ("search", WARM):
            self._lines = found
        return found

    def _within(self, settings: gradient.Settings, tokens: int, took: int) -> gradient.Settings:
        scoring = gradient.POPULATION * self._dearest
        return within_tokens(settings, tokens, took, self._soft.differentiated, scoring)

    def _least(self, took: int) -> int:
        """Tokens of one step and its true scores, after so many."""
        step = cost({"differentiated": self._soft.differentiated([0])})
        return took + step + gradient.POPULATION * self._dearest

    def findings(self) -> dict[str, Any]:
        """What results.json says of it, by task."""
        return {
            task: {
                "form": found.form,
                "spearman": None if math.isnan(found.spearman) else found.spearman,
                "left_out": self._soft.left_out[task],
                "by_texts": self._texts.get(task, 0),
            }
            for task, found in self._lines.items()
        }

    def say(self) -> None:
        """Says what stands for the score of each task."""
        for task, told in self.findings().items() if processes.first() else ():
            agreement, by_texts, left_out = told["spearman"], told["by_texts"], told["left_out"]
            said = "" if agreement is None else f", rank correlation {agreement:.2f}"
            said += f", {by_texts} examples by texts that were accepted" if by_texts else ""
            said += f", {left_out} examples left out" if left_out else ""
            print(f"jaxmerge: {task}: soft score {told['form']}{said}", file=sys.stderr)
        for task in self._soft.without if processes.first() else ():
            print(
                f"jaxmerge: {task}: nothing stands for its score, so no gradient is along it; it "
                "counts where candidates are scored",
                file=sys.stderr,
            )

    def _true(self, candidates: Sequence[Candidate]) -> Float[np.ndarray, "N T"]:
        rows = [[one.scores[task] for task in self._soft.tasks] for one in candidates]
        return np.array(rows, np.float64).reshape(-1, len(self._soft.tasks))

    def _lines_of(self, soft_NxTxF: np.ndarray, true_NxT: np.ndarray) -> dict[str, Line]:
        return {
            task: line(soft_NxTxF[:, t], true_NxT[:, t]) for t, task in enumerate(self._soft.tasks)
        }


def _by_group(one: Candidate, groups: int) -> Float[np.ndarray, "G K"]:
    row = np.array(one.coefficients, np.float32)
    return np.broadcast_to(row, (groups, row.shape[-1]))


def losses(prepared: Prepared) -> tuple[Float[np.ndarray, " K"], int]:
    """How far each checkpoint is from the targets of the search examples, and the tokens it took.

    Nats for a token of the target, or -log of the mean probability of the right choice; averaged
    over the tasks that have either.
    """
    tasks, _, took = _told(prepared)
    soft, K, G = prepared.soften(tasks), len(prepared.pool.names), prepared.pool.count
    alone_KxGxK = np.repeat(np.eye(K, dtype=np.float32)[:, None], G, axis=1)
    losses_KxT = [[*soft.losses(weights_GxK).values()] for weights_GxK in alone_KxGxK]
    return np.mean(losses_KxT, axis=1), cost({**took, "read": took.get("read", 0) + soft.read})


def wanted(config: Config) -> bool:
    """Whether the run climbs, all the way or to start from there."""
    return gradient.NAME in (config.search.strategy, config.search.warm_start)


def warmed(config: Config, prepared: Prepared, warm: Sequence[Candidate]) -> Strategy:
    """The config's strategy, from where gradients have ended.

    It starts at the mean of the late iterates, with the step that was left: the root mean square of
    how far the last iterate is from there, `search.sigma` at most.

    Args:
        config: of the run.
        prepared: of the run.
        warm: the candidates of the search along gradients.
    """
    of, most = prepared.method, config.search.sigma
    of_late = functools.partial(genotypes, config, of, prepared.pool.count)
    last, mean = (of_late(one) for one in warm[-gradient.POPULATION :])
    left = float(np.sqrt(np.mean((last - mean) ** 2)))
    return build_strategy(
        config,
        len(prepared.pool.names),
        groups=prepared.pool.count,
        start=mean.reshape(-1),
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
