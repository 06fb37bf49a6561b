"""Genotypes as a config has them: what they are mapped to, and where searches start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxmerge import config as configs
from jaxmerge.config import Config
from jaxmerge.experiment import methods
from jaxmerge.experiment.budget import start_of
from jaxmerge.merge.searched import Searched
from jaxmerge.rundir import Candidate
from jaxmerge.search import space

_UNIFORM = 0.05  # of the uniform merge in a start


def mapping(config: Config, of: Searched | None, groups: int) -> dict[str, Any]:
    """What `space.mapped` and `space.genotypes` are told, or of a method `row` and its inverse."""
    fields = config.space
    shrink = fields.shrink if groups > 1 else 0.0
    told = {"constraint": configs.constraint(config), "bounds": fields.bounds, "shrink": shrink}
    if of is None:
        return told
    parts = {"checkpoints": of.checkpoints, "ranges": methods.ranges(of), "weighted": of.weighted}
    return told | parts


def start_genotype(
    config: Config,
    of: Searched | None,
    groups: int,
    chosen: Sequence[int],
    merge: Candidate | None = None,
) -> Float[np.ndarray, "G D"]:
    """The genotype that a search starts from.

    Args:
        config: of the run.
        of: the method that candidates are merged by; None: they are weighted sums.
        groups: G.
        chosen: numbers of the checkpoints that are searched over.
        merge: the weighted sum to start from; None: as `search.init` says.
    """
    if merge is not None:
        return genotypes(config, of, groups, merge, chosen)
    own = start_of(config, chosen)
    values = of.numbers if of else space.dimension(configs.constraint(config), len(chosen))
    start_GxD = np.zeros((groups, values), np.float32)
    start_GxD[:, : len(own)] = own
    return start_GxD


def genotypes(
    config: Config,
    of: Searched | None,
    groups: int,
    one: Candidate,
    chosen: Sequence[int] | None = None,
) -> Float[np.ndarray, "G D"]:
    """A genotype of a scored merge, to start from.

    One of those that it can have come from; of a single checkpoint or a baseline one of a mixture
    with a twentieth of the uniform merge: a weight of 0 has no derivative.

    Args:
        config: of the run.
        of: the method that candidates are merged by; None: they are weighted sums.
        groups: G.
        one: the merge.
        chosen: checkpoints that are left of a weighted sum, with weights that sum to 1; None: all.
    """
    row, K = np.array(one.coefficients, np.float64), len(one.by_checkpoint)
    if one.origin == "individual" or one.origin.startswith("baseline:"):
        row = (1 - _UNIFORM) * row + _UNIFORM / K
    if chosen is not None:
        row = row[..., [*chosen]]
        row = row / row.sum(axis=-1, keepdims=True)
    inverse = space.row_genotypes if of else space.genotypes
    found = inverse(row, **mapping(config, of, groups))
    return np.broadcast_to(found, (groups, found.shape[-1])).astype(np.float32)
