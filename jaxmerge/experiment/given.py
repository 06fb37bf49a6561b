"""The numbers of one merge from a file: those that a search found, or a table of one's own."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxmerge import config as configs
from jaxmerge.config import Config
from jaxmerge.durable import read_json
from jaxmerge.errors import JaxmergeError, as_written, check_finite
from jaxmerge.merge.groups import Groups, groups
from jaxmerge.merge.schedules import SCHEDULES, schedule_weights
from jaxmerge.merge.searched import own_name
from jaxmerge.rundir import RunDirectory
from jaxmerge.trees import PyTree


class Given(NamedTuple):
    """The numbers of a merge.

    Attributes:
        weights: `[K]`, or `[G, K]` where groups have their own.
        genes: of a method, by name, each a number, `[G]` where groups have their own, or as
            `merge.genes` has it.
        groups: of leaves that have numbers of their own; None: there is one.
        seed: of draws.
    """

    weights: Float[np.ndarray, "*G K"]
    genes: Mapping[str, Any]
    groups: Groups | None
    seed: int

    @property
    def first(self) -> tuple[Float[np.ndarray, " K"], dict[str, Any]]:
        """Those of the first group."""
        return self.of(next(iter(self.groups.of_leaf)), 0) if self.groups else self.of("", 0)

    @property
    def means(self) -> tuple[float, ...]:
        """One weight per checkpoint: the mean over the groups."""
        return tuple(np.atleast_2d(self.weights).mean(axis=0).tolist())

    def of(self, name: str, layer: int) -> tuple[Float[np.ndarray, " K"], dict[str, Any]]:
        """Weights and genes of a leaf, or of a layer of one that is stacked."""
        if self.groups is None:
            return self.weights, dict(self.genes)
        numbers = self.groups.of_leaf[name]
        g = numbers[layer % len(numbers)]
        own = {
            gene: values[g] if isinstance(values, np.ndarray) else values
            for gene, values in self.genes.items()
        }
        return self.weights[g], own


def weights_of(config: Config, checkpoints: int) -> tuple[Any, ...]:
    """`merge.weights`, or of K checkpoints those of `merge.schedule`; (): neither is given."""
    if not config.merge.schedule:
        return tuple(config.merge.weights)
    return tuple(schedule_weights(config.merge.schedule, checkpoints).tolist())


def check_weights(row: Any, checkpoints: Sequence[str]) -> None:
    """Raises `JaxmergeError` unless a merge has a finite weight for each of the checkpoints."""
    if not isinstance(row, tuple | list) or len(row) != len(checkpoints):
        raise JaxmergeError(
            "needs one weight per checkpoint",
            where="merge.weights",
            expected=f"{len(checkpoints)} numbers, for {', '.join(checkpoints)}",
            found=str(row),
        )
    if not all(isinstance(weight, int | float) and math.isfinite(weight) for weight in row):
        raise JaxmergeError(
            "weights are finite numbers",
            where="merge.weights",
            expected="a number for each checkpoint",
            found=str(row),
        )


def window(config: Config) -> str:
    """A sentence on the steps of a run that are merged, and the schedule; "": there is neither."""
    steps, schedule = config.pool.steps, config.merge.schedule
    said = [f"Members are the steps {steps} of one run."] if steps else []
    if schedule:
        curve = {1.0: "1 - x"}.get(SCHEDULES[schedule], f"1 - x^{SCHEDULES[schedule]:g}")
        said.append(
            f"Weights are those of the schedule `{schedule}`, oldest member first: as if the "
            f"learning rate had decayed by {curve} meanwhile (WSM, arXiv 2507.17634)."
        )
    return " ".join(said)


def from_config(config: Config, weights: Sequence[float]) -> Given:
    """The numbers of a merge that stand in the config.

    Args:
        config: of the merge.
        weights: of the checkpoints; (): the method has none.
    """
    return Given(np.array(weights, np.float32), dict(config.merge.genes), None, config.seed)


def read(config: Config, abstract: PyTree, layers: str, checkpoints: Sequence[str]) -> Given:
    """What `merge.weights_file` says.

    It is the results.json of a search, whose winner is meant, or a table: `{"weights": [w_1, ...]}`
    or, with `space.granularity`, `{"weights": {"layer 0": [w_1, ...], ...}}`; of a method also
    `"genes": {"density": 0.5}`, or `{"density": {"layer 0": 0.5, ...}}`.

    Args:
        config: of the merge.
        abstract: tree of the leaves.
        layers: the entry whose leaves are stacked over layers; "": none is.
        checkpoints: names of the K members.

    Raises:
        JaxmergeError: the file is not there, or not of such a merge.
    """
    path = Path(os.path.expanduser(config.merge.weights_file))
    with as_written(str(path), "this is no table of weights", _TABLE):
        return _read(config, path, abstract, layers, checkpoints)


def _read(
    config: Config, path: Path, abstract: PyTree, layers: str, checkpoints: Sequence[str]
) -> Given:
    said = read_json(path)
    of_search = isinstance(said, dict) and "best" in said
    table = _of_search(config, path, said, checkpoints) if of_search else said
    if not isinstance(table, dict) or "weights" not in table or {*table} - _ENTRIES:
        raise JaxmergeError(
            "this is no table of weights",
            where=str(path),
            expected=_TABLE,
            found=", ".join(table) if isinstance(table, dict) else type(table).__name__,
        )
    if config.merge.method == "linear" and table.get("genes"):
        raise JaxmergeError(
            "a linear merge takes the weights as they are",
            where=f"{path}, genes",
            expected="weights alone; or another merge.method",
            found=", ".join(table["genes"]),
        )
    space = config.space
    # Of a config's "auto" the file says whether it is one merge for all leaves.
    by_group = isinstance(table["weights"], dict) or space.granularity != "auto"
    granularity = configs.granularity(config) if by_group else "model"
    of = groups(abstract, granularity, patterns=space.patterns, layers=layers)
    names = of.names if of else ()
    weights = _by_group(path, "weights", table["weights"], names)
    wanted = (len(names), len(checkpoints)) if names else (len(checkpoints),)
    if weights.shape != wanted:
        raise JaxmergeError(
            "needs one weight per checkpoint" + ", in each group" * bool(names),
            where=f"{path}, weights",
            expected=f"{len(checkpoints)} numbers, for {', '.join(checkpoints)}",
            found=f"shape {weights.shape}",
        )
    genes = {
        name: _by_group(path, name, gene, names) if isinstance(gene, dict) else gene
        for name, gene in table.get("genes", {}).items()
    }
    return Given(weights.astype(np.float32), genes, of, int(table.get("seed", config.seed)))


_TABLE = 'the results.json of a search, or {"weights": ..., "genes": ...}'
_ENTRIES = {"weights", "genes", "seed"}


def _of_search(
    config: Config, path: Path, results: Mapping[str, Any], checkpoints: Sequence[str]
) -> dict[str, Any]:
    """The winner of a search, or a point of its front, as a table."""
    best = _point(config, path, results) if config.merge.point else results["best"]
    # A baseline, which is a weighted sum, may have won a search over a method.
    method = results.get("method", {}) if "genes" in best else {}
    named, own = method.get("name", "linear"), config.merge.method
    for where, expected, found in (
        ("merge.method", named, own),
        ("merge.variant", method.get("variant", config.merge.variant), config.merge.variant),
        ("pool.checkpoints", ", ".join(best["weights"]), ", ".join(checkpoints)),
    ):
        if expected != found:
            raise JaxmergeError(
                f"the search of {path} had another one", where=where, expected=expected, found=found
            )
    names = results.get("groups", ())
    weights = dict(zip(names, best["groups"])) if "groups" in best else [*best["weights"].values()]
    genes = {
        name: dict(zip(names, gene)) if isinstance(gene, list) else gene
        for name, gene in best.get("genes", {}).items()
    }
    for name in {re.sub(r"\[\d+\]$", "", name) for name in genes} - {*genes}:
        own = [genes.pop(own_name(name, k)) for k in range(len(checkpoints))]
        by_group = isinstance(own[0], dict)
        genes[name] = {g: [of[g] for of in own] for g in own[0]} if by_group else tuple(own)
    fixed = {
        name: tuple(gene) if isinstance(gene, list) else gene
        for name, gene in method.get("fixed", {}).items()
    }
    seed = {"seed": method["seed"]} if "seed" in method else {}
    return {"weights": weights, "genes": {**genes, **fixed}, **seed}


def _point(config: Config, path: Path, results: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is said of `merge.point`."""
    points = results.get("front", {}).get("points", [])
    if config.merge.point not in range(1, len(points) + 1):
        raise JaxmergeError(
            "the front has no such point" if points else "the search was for one merge",
            where=f"{path}, merge.point",
            expected=f"from 1 to {len(points)}" if points else "0, for its winner",
            found=str(config.merge.point),
        )
    return points[config.merge.point - 1]


def expect_pool(config: Config, directory: RunDirectory) -> None:
    """Has a merge refused whose checkpoints are not those that the search of its weights had.

    Args:
        config: of the merge.
        directory: of the merge; it gets the search's record of the checkpoints, if there is one.
    """
    if not config.merge.weights_file or directory.read_json("pool.json") is not None:
        return
    of_search = Path(os.path.expanduser(config.merge.weights_file)).with_name("pool.json")
    if of_search.exists() and of_search.with_name("candidates.jsonl").exists():
        directory.write_json("pool.json", read_json(of_search))


def _by_group(path: Path, what: str, values: Any, names: Sequence[str]) -> np.ndarray:
    """Numbers of all groups, in their order."""
    given = list(values) if isinstance(values, dict) else []
    if {*given} != {*names}:
        raise JaxmergeError(
            "needs numbers of each group, which space.granularity makes"
            if names
            else "these are numbers of groups, and there are none",
            where=f"{path}, {what}",
            expected=", ".join(names) or 'space.granularity, such as "layer"; or one list',
            found=", ".join(given) or "one for all",
        )
    rows = [values[name] for name in names] if names else values
    try:
        found = np.array(rows, np.float64)
    except (OverflowError, TypeError, ValueError) as error:
        raise JaxmergeError(
            "these are no numbers", where=f"{path}, {what}", expected="numbers"
        ) from error
    check_finite(f"{path}, {what}", found.ravel().tolist())
    return found
