"""A config whose sizes are all chosen: those that it leaves to the memory that there is."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxmerge.checkpoints.source import Source
from jaxmerge.config import Config
from jaxmerge.durable import read_json
from jaxmerge.errors import as_written
from jaxmerge.hosts import processes
from jaxmerge.merge.groups import Groups
from jaxmerge.models.model import Model
from jaxmerge.planning.residency import Room, check_layers
from jaxmerge.planning.sizes import Sizes, choose_sizes
from jaxmerge.planning.work import Step, cast, placed

_FIELDS = ("candidates_per_step", "batch_size", "batch_tokens")  # of `evaluate`; 0: to be chosen


def least_step(
    config: Config,
    sources: Sequence[Source],
    model: Model,
    mesh: Mesh,
    groups: Groups | None = None,
) -> Step:
    """A step of as few candidates as the config allows.

    Raises:
        JaxmergeError: layers are to be merged late, and the model can't.
    """
    if config.merge.rematerialise:
        check_layers(model)
    return Step(
        placed(cast(sources[0].abstract, config.pool.dtype), model.sharding_rules, mesh),
        len(sources),
        config.evaluate.candidates_per_step or mesh.shape["pop"],
        mesh,
        model.layers if config.merge.rematerialise else "",
        config.pool.storage,
        groups,
    )


def sized(
    config: Config,
    workdir: str,
    model: Model,
    step: Step,
    room: Room,
    *,
    residency: str,
    population: int,
) -> Config:
    """The config with every size that it leaves open, as its run directory has it or else chosen.

    Results may depend on them in their last bits: so a run that goes on keeps them.

    Args:
        config: of the run.
        workdir: its run directory, which need not exist.
        model: of all candidates.
        step: see `sizes.choose_sizes`; `room`, `residency` and `population` too.
    """
    asked = {name: config.evaluate[name] for name in _FIELDS}
    if all(asked.values()):
        return config

    def choose() -> bytes:
        chosen = choose_sizes(
            Sizes(*asked.values()),
            model,
            step,
            room,
            residency=residency,
            population=population,
            vmap_candidates=config.evaluate.vmap_candidates,
        )
        known = _recorded(Path(workdir).expanduser() / "config.json")
        return json.dumps(
            [asked[n] or known.get(n) or size for n, size in zip(_FIELDS, chosen)]
        ).encode()

    sizes = json.loads(processes.from_first(choose))  # the memory that is left differs
    made = config.copy_and_resolve_references()
    for name, size in zip(_FIELDS, sizes):
        made.evaluate[name] = size
    if processes.first():
        said = ", ".join(f"{name} = {size}" for name, size in zip(_FIELDS, sizes))
        print(f"jaxmerge: evaluate.{said}", file=sys.stderr)
    return made


def _recorded(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    with as_written(str(path)):
        return {**read_json(path).get("evaluate", {})}
