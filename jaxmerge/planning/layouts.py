"""A run laid out on devices: what it needs there, whether it fits, and what would make it fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxmerge.errors import JaxmergeError
from jaxmerge.evaluation.batches import Limits
from jaxmerge.evaluation.respond import Responder
from jaxmerge.evaluation.tokenizer import Tokenizer
from jaxmerge.merge.groups import Groups
from jaxmerge.merge.searched import Searched
from jaxmerge.models.model import Model
from jaxmerge.planning import estimate, work
from jaxmerge.planning.estimate import Amount, Measured, Rates, Seconds
from jaxmerge.planning.residency import (
    AUTO,
    REMATERIALISE,
    Need,
    Room,
    check_layers,
    choose_residency,
)
from jaxmerge.planning.sizes import Sizes, choose_sizes
from jaxmerge.planning.work import Call, Step
from jaxmerge.sharding import make_mesh
from jaxmerge.tasks.common import Task
from jaxmerge.trees import PyTree, byte_count, parameter_count


class Job(NamedTuple):
    """What is to be done, wherever it is.

    Attributes:
        model: of all checkpoints.
        abstract: one checkpoint as it is in memory, as `ShapeDtypeStruct`.
        checkpoints: K.
        tokenizer: text to tokens.
        splits: tasks of `search`, `test` and `heldout`.
        evaluations: candidates that are scored, by split.
        population: candidates of a generation.
        vmap_candidates: see `Responder`.
        storage: how a pool on the devices is held; see `pool.load`.
        groups: of leaves that share their weights; None: all do.
        minibatch: examples of a task in a step of a search by gradients; 0: there is none.
        method: that candidates are merged by; None: they are weighted sums.
    """

    model: Model
    abstract: PyTree
    checkpoints: int
    tokenizer: Tokenizer
    splits: Mapping[str, Sequence[Task]]
    evaluations: Mapping[str, int]
    population: int
    vmap_candidates: int
    storage: str = "exact"
    groups: Groups | None = None
    minibatch: int = 0
    method: Searched | None = None


@dataclasses.dataclass(frozen=True)
class Layout:
    """The fields of a config that say how a job is laid out, by their names there."""

    pop: int
    data: int
    fsdp: int
    tensor: int
    candidates_per_step: int  # 0: see `sizes`; so are rows and tokens of `limits`
    residency: str
    limits: Limits
    rematerialise: bool = False


class Machine(NamedTuple):
    """Devices, there or not.

    Attributes:
        name: of the topology.
        devices: that a mesh can be made of.
        room: bytes of each.
        rates: of each.
        said: where the rates are from.
    """

    name: str
    devices: Sequence[Any]
    room: Room
    rates: Rates
    said: str


class Plan(NamedTuple):
    """A job on a machine.

    Attributes:
        residency: where the pool will live; None: the run does not fit.
        candidates: of a step.
        limits: of microbatches.
        rematerialised: whether layers are merged when the model comes to them.
        steps: whose candidates exist together.
        most_candidates: that a step could have, estimated from those it has.
        seconds: of one candidate, by split; of a step along the gradient, as `step`.
    """

    machine: str
    kind: str
    said: str
    mesh: dict[str, int]
    room: Room
    rates: Rates
    checkpoints: int
    parameters: int
    bytes: int
    dtype: str
    measured: Measured
    residency: str | None
    asked: str
    candidates: int
    limits: Limits
    rematerialised: bool
    steps: int
    most_candidates: int
    calls: int
    seconds: dict[str, Seconds]
    amounts: dict[str, Amount]
    evaluations: dict[str, int]

    @property
    def run_seconds(self) -> float:
        """Of all evaluations."""
        each = (self.evaluations[split] * one.total for split, one in self.seconds.items())
        return math.fsum(each)


def draw_up(job: Job, layout: Layout, machine: Machine) -> Plan:
    """Compiles the programs of a job for a machine, and adds up what they need.

    Raises:
        JaxmergeError: the mesh has more places than the machine has devices, or a prompt does not
            fit the model.
    """
    step, limits = _sized(job, layout, machine)
    mesh = step.mesh
    responder = Responder(
        job.model, job.tokenizer, mesh, limits, vmap_candidates=job.vmap_candidates
    )
    of_step = work.calls(responder, job.splits, mesh)
    least = estimate.arithmetic(step)
    streamed = least.on_device("device") > machine.room.device
    streamed = (streamed or layout.residency in ("host", "disk")) and not step.layers
    climbs = _climbs(job, step, limits)
    if choose_residency(layout.residency, least, machine.room):
        measured = estimate.measure(job.model, step, of_step, climbs, streamed=streamed)
    else:
        measured = estimate.uncompiled(job.model, step)
    refused = bool(measured.refused)
    residency = choose_residency(layout.residency, measured.need, machine.room)
    seconds, amounts = estimate.roofline(of_step, step, measured.programs, machine.rates)
    if climbs:
        alone = step._replace(candidates=mesh.shape["pop"])
        found = estimate.climb(climbs, alone, measured.programs, machine.rates)
        seconds["step"], amounts["step"] = found
    return Plan(
        machine=machine.name,
        kind=f"{len(machine.devices)} x {machine.devices[0].device_kind}",
        said=machine.said,
        mesh=dict(mesh.shape),
        room=machine.room,
        rates=machine.rates,
        checkpoints=job.checkpoints,
        parameters=parameter_count(job.abstract),
        bytes=byte_count(job.abstract),
        dtype=", ".join(sorted({str(leaf.dtype) for leaf in jax.tree.leaves(job.abstract)})),
        measured=measured,
        residency=None if refused else residency,
        asked=layout.residency,
        candidates=step.candidates,
        limits=limits,
        rematerialised=bool(step.layers),
        steps=estimate.steps_at_a_time(mesh),
        most_candidates=_most(measured.need, machine.room, residency, step, job),
        calls=len(of_step),
        seconds=seconds,
        amounts=amounts,
        evaluations=dict(job.evaluations),
    )


def _climbs(job: Job, step: Step, limits: Limits) -> list[Call]:
    """The calls of a step along gradients; none where the search is of another kind."""
    if not job.minibatch:
        return []
    tasks, mesh = job.splits["search"], step.mesh
    return work.climbing(job.model, job.tokenizer, tasks, limits, job.minibatch, mesh)


def need_of(job: Job, layout: Layout, machine: Machine) -> Need:
    """What a job needs at the least: `working` is 0, nothing is compiled."""
    return estimate.arithmetic(_least(job, layout, machine))


def _least(job: Job, layout: Layout, machine: Machine) -> Step:
    """A step of as few candidates as the layout allows."""
    mesh = _mesh(layout, machine)
    if layout.rematerialise:
        check_layers(job.model)
    return Step(
        work.placed(job.abstract, job.model.sharding_rules, mesh),
        job.checkpoints,
        _candidates(layout, machine),
        mesh,
        job.model.layers if layout.rematerialise else "",
        job.storage,
        job.groups,
        job.method,
        job.model.layers,
    )


def _sized(job: Job, layout: Layout, machine: Machine) -> tuple[Step, Limits]:
    """The step of a run and its limits, as a run takes them; see `sizes`."""
    step, limits = _least(job, layout, machine), layout.limits
    need = estimate.arithmetic(step)
    sizes = choose_sizes(
        Sizes(layout.candidates_per_step, limits.rows, limits.tokens),
        job.model,
        step,
        machine.room,
        residency=choose_residency(layout.residency, need, machine.room) or "device",
        population=job.population,
        vmap_candidates=job.vmap_candidates,
    )
    sized = limits._replace(rows=sizes.rows, tokens=sizes.tokens)
    return step._replace(candidates=sizes.candidates), sized


def fitting(job: Job, choices: Iterable[tuple[str, Layout, Machine]]) -> str | None:
    """The name of the first layout that fits; what can't fit by arithmetic is not compiled.

    Args:
        job: to be laid out.
        choices: by name.
    """
    for name, layout, machine in choices:
        try:
            least = need_of(job, layout, machine)
            if not choose_residency(layout.residency, least, machine.room):
                continue
            if draw_up(job, layout, machine).residency:
                return name
        except JaxmergeError as error:
            # Not that this mesh can't be made of these devices, or this model can't be merged so.
            if error.where not in ("mesh", REMATERIALISE):
                raise
    return None


def smaller(job: Job, layout: Layout, machine: Machine) -> Iterator[tuple[str, Layout]]:
    """Layouts on the same machine that need less of its devices, those that cost least first."""
    mesh = dict(_mesh(layout, machine).shape)
    if layout.residency not in (AUTO, "disk") and (not job.method or job.method.summed):
        yield f'pool.residency = "{AUTO}"', dataclasses.replace(layout, residency=AUTO)
    if layout.candidates_per_step == 0 or _candidates(layout, machine) > mesh["pop"]:
        yield (
            f"evaluate.candidates_per_step = {mesh['pop']}",
            dataclasses.replace(layout, candidates_per_step=mesh["pop"]),
        )
    layout = dataclasses.replace(layout, candidates_per_step=mesh["pop"])
    limits = layout.limits
    while limits.tokens > 256 and limits.rows > 1:
        limits = limits._replace(tokens=limits.tokens // 2, rows=max(limits.rows // 2, 1))
        yield (
            f"evaluate.batch_tokens = {limits.tokens}, evaluate.batch_size = {limits.rows}",
            dataclasses.replace(layout, limits=limits),
        )
    if layout.residency in (AUTO, "device") and not layout.rematerialise and not job.method:
        yield (
            f"{REMATERIALISE} = True",
            dataclasses.replace(layout, rematerialise=True, residency="device"),
        )
    pop, fsdp = mesh["pop"], mesh["fsdp"]
    while pop % 2 == 0:
        pop, fsdp = pop // 2, fsdp * 2
        yield (
            f"mesh.pop = {pop}, mesh.fsdp = {fsdp}",
            dataclasses.replace(layout, pop=pop, fsdp=fsdp, candidates_per_step=pop),
        )


def spread(layout: Layout) -> Iterator[tuple[str, Layout]]:
    """Layouts for another slice: as it is, and with all its devices for one candidate."""
    yield "", layout
    yield "mesh.pop = 1, mesh.fsdp = -1", dataclasses.replace(layout, pop=1, fsdp=-1)


def _mesh(layout: Layout, machine: Machine) -> Any:
    sizes = (layout.pop, layout.data, layout.fsdp, layout.tensor)
    return make_mesh(*sizes, devices=machine.devices)


def _candidates(layout: Layout, machine: Machine) -> int:
    pop = _mesh(layout, machine).shape["pop"]
    return -(-(layout.candidates_per_step or pop) // pop) * pop


def _most(need: Need, room: Room, residency: str | None, step: Step, job: Job) -> int:
    if residency is None:
        return 0
    pop, here = step.mesh.shape["pop"], step.here
    fixed = need.on_device(residency) - need.merged - need.working
    side_by_side = job.vmap_candidates == 0 and step.mesh.devices.flat[0].platform != "cpu"
    grows = need.merged + (need.working if side_by_side else 0)
    left = room.device - fixed - (0 if side_by_side else need.working)
    useful = -(-job.population // pop)
    return max(min(int(left * here // max(grows, 1)), useful), here) * pop
