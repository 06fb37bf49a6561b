"""The estimate: bytes of each device, and seconds by the roofline."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmerge.merge import differences, linear
from jaxmerge.merge.by_method import every_place, leaf_program
from jaxmerge.merge.differences import stored_bytes
from jaxmerge.merge.leafwise import adding
from jaxmerge.models.model import Model
from jaxmerge.planning.chips import Chip
from jaxmerge.planning.compiled import Collective, Program, compile_program
from jaxmerge.planning.counting import Product
from jaxmerge.planning.residency import Need
from jaxmerge.planning.work import Call, Step, counted, placed, share, shares, state_bytes
from jaxmerge.trees import PyTree, named_leaves


class Rates(NamedTuple):
    """What a device does per second, at most; links of 0 are not counted."""

    flops: float
    bandwidth: float
    links: float


def rates_of(chip: Chip) -> Rates:
    """The rates that its maker states."""
    return Rates(chip.flops, chip.bandwidth, chip.links)


class Measured(NamedTuple):
    """What the compiled programs of a step say.

    Attributes:
        need: bytes of each device.
        cache: bytes of the key/value cache on each device, part of `need.working`.
        programs: merge first; none where nothing was compiled.
        whole: leaves that an axis of the mesh does not divide, and why.
    """

    need: Need
    cache: int
    programs: tuple[Program, ...]
    whole: tuple[str, ...]

    @property
    def refused(self) -> str:
        """Why the compiler refused a program; "" where it refused none."""
        return next((each.refused for each in self.programs if each.refused), "")


def steps_at_a_time(mesh: Mesh) -> int:
    """Steps whose merged models exist together: one is launched before the last is judged.

    The CPU client takes the memory of a program's outputs when the program starts, that is after
    the last step has run (tools/measure_memory.py); others when it is launched.
    """
    return 1 if mesh.devices.flat[0].platform == "cpu" else 2


def arithmetic(step: Step) -> Need:
    """The part of `Need` that takes no compiler: `working` is 0."""
    of_leaf, leaves = shares(step.tree), jax.tree.leaves(step.tree)
    streamed = [
        size * (2 + step.here * max(4 / leaf.dtype.itemsize, 1))
        for size, leaf in zip(of_leaf.values(), leaves)
    ]
    return Need(
        pool=sum(stored_bytes(leaf, step.checkpoints, step.storage) for leaf in leaves),
        streamed=int(max(streamed)),
        merged=steps_at_a_time(step.mesh) * step.here * sum(shares(step.once).values()),
        working=0,
    )


def measure(
    model: Model,
    step: Step,
    of_step: Sequence[Call],
    climbs: Sequence[Call] = (),
    *,
    streamed: bool,
) -> Measured:
    """Compiles the merge and the largest calls, and adds up what each device holds.

    Args:
        model: whose programs they are.
        step: what is merged.
        of_step: from `work.calls`.
        climbs: from `work.climbing`.
        streamed: the pool is not on the devices, so that leaves are merged one by one.
    """
    need, merged = arithmetic(step), step.merged()
    merge = compile_merge(step, streamed=streamed)
    largest = _largest(of_step)
    compiled = [compile_program(call.name, call.program, merged, *call.arrays) for call in largest]
    inputs = sum(sum(call.times.values()) * sum(map(share, call.arrays)) for call in of_step)
    code = sum(
        of_kind[0].code * sum(bool(call.new_tokens) == writes for call in of_step)
        for writes in (False, True)
        if (of_kind := [p for p, c in zip(compiled, largest) if bool(c.new_tokens) == writes])
    )
    alone = step._replace(candidates=step.mesh.shape["pop"]).merged()
    by_name = {call.name: call for call in climbs}
    up = [
        compile_program(name, each.program, alone, *each.arrays) for name, each in by_name.items()
    ]
    inputs += sum(sum(map(share, call.arrays)) for call in climbs)
    code += sum(each.code for each in up)
    held = (each.outputs + each.temporaries for each in (*compiled, *up))
    return Measured(
        need._replace(working=max([merge.temporaries, *held]) + inputs + code + merge.code),
        max((_cache(model, step, call) for call in largest), default=0),
        (merge, *compiled, *up),
        tuple(whole_leaves(step.tree, model.sharding_rules, step.mesh)),
    )


def uncompiled(model: Model, step: Step) -> Measured:
    """What is known of a step without a compiler, for one whose pool and models are too large."""
    whole = whole_leaves(step.tree, model.sharding_rules, step.mesh)
    return Measured(arithmetic(step), 0, (), tuple(whole))


def compile_merge(step: Step, *, streamed: bool) -> Program:
    """The merge of a step; of its largest leaf where it goes by leaf: as methods with thresholds or
    draws do, and where the pool is streamed, checkpoint by checkpoint.
    """
    leaves, of_leaf = named_leaves(step.tree), shares(step.tree)
    name = max(leaves, key=lambda each: of_leaf[each])
    if step.by_leaf:
        stacked = bool(step.stacked) and name.startswith(f"{step.stacked}/")
        merge, arguments = leaf_program(
            step.by_leaf, leaves[name], step.candidates, stacked=stacked
        )
        return compile_program(f"{step.by_leaf.method}, leaf by leaf: {name}", merge, *arguments)
    # What a method weighs, it weighs layer by layer.
    groups = every_place(step.tree, step.stacked) if step.method else step.groups
    if streamed:
        by_slice = groups is not None and len(groups.of_leaf[name]) > 1
        add, arguments = adding(leaves[name], step.candidates, by_slice=by_slice)
        return compile_program(f"merge, leaf by leaf: {name}", add, *arguments)
    over_pop = NamedSharding(step.mesh, PartitionSpec("pop"))
    of_groups = (len(groups.names),) if groups else ()
    shape = (step.candidates, *of_groups, step.checkpoints)
    weights = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=over_pop)
    if step.storage != "exact":
        held = differences.abstract(step.tree, step.checkpoints, step.storage)
        return compile_program("merge", differences.program(*held, groups), *held, weights)
    jitted = linear.program(step.once, population=True, groups=groups)
    name = "merge, but for the layers" if step.layers else "merge"
    return compile_program(name, jitted, (step.once,) * step.checkpoints, weights)


def whole_leaves(tree: PyTree, rules: Any, mesh: Mesh) -> list[str]:
    """Leaves that lie on a mesh of the same axes in larger parts than the rules ask for."""
    lines = []
    alone = Mesh(mesh.devices.reshape(-1)[:1].reshape((1,) * len(mesh.axis_names)), mesh.axis_names)
    asked = placed(tree, rules, alone)
    for (name, leaf), wanted in zip(named_leaves(tree).items(), named_leaves(asked).values()):
        axes = [axis for axis in wanted.sharding.spec if axis and mesh.shape[axis] > 1]
        split = jax.tree.leaves(tuple(leaf.sharding.spec))
        kept = [axis for axis in axes if axis not in split]
        lines += [
            f"{name}: {leaf.shape[wanted.sharding.spec.index(axis)]} is not a multiple of "
            f"mesh.{axis} = {mesh.shape[axis]}"
            for axis in kept
        ]
    return lines


def _largest(of_step: Sequence[Call]) -> list[Call]:
    """Of generations and of log-likelihoods, those of the most tokens and the most attention."""
    chosen: dict[str, Call] = {}
    for writes in (False, True):
        of_kind = [call for call in of_step if bool(call.new_tokens) == writes]
        for size in (lambda call: call.tokens, lambda call: call.tokens * call.slots):
            if of_kind:
                call = max(of_kind, key=size)
                chosen.setdefault(call.name, call)
    return list(chosen.values())


def _cache(model: Model, step: Step, call: Call) -> int:
    if not call.new_tokens:
        return 0
    heads, mesh = int(model.architecture.get("kv_heads", 1)), step.mesh
    # The compiler splits heads over as much of `tensor` as they are a multiple of.
    split = mesh.shape["data"] * math.gcd(heads, mesh.shape["tensor"])
    side_by_side = step.here if mesh.devices.flat[0].platform != "cpu" else 1
    return state_bytes(model, step.tree, call) * side_by_side // split


class Seconds(NamedTuple):
    """Of one candidate on one split, when all devices are at work."""

    merge: float
    reading: float  # prefill, and log-likelihoods
    decoding: float
    collectives: float

    @property
    def total(self) -> float:
        """All of it."""
        return math.fsum(self)


class Amount(NamedTuple):
    """Work of one candidate on one split, on all its devices."""

    flops: float
    bytes: float


def roofline(
    of_step: Sequence[Call], step: Step, programs: Sequence[Program], rates: Rates
) -> tuple[dict[str, Seconds], dict[str, Amount]]:
    """Seconds and work of one candidate by split: no product takes less than its operations or its
    bytes do at the rates, and nothing overlaps.
    """
    mesh, here, merged = step.mesh, step.here, step.merged()
    read = step.checkpoints * (here if step.by_leaf else 1)
    once = (read + here) * sum(shares(step.once).values()) / step.candidates
    late = _late(step)
    seconds: dict[str, Seconds] = {}
    amounts: dict[str, Amount] = {}
    of_call = [(call, counted(call, merged)) for call in of_step]
    exchanged = _exchanged(of_step, programs)
    for split in sorted({split for call in of_step for split in call.times}):
        reading = decoding = between = flops = moved = passes = 0.0
        for call, found in of_call:
            times = call.times.get(split, 0) / here
            passes += call.times.get(split, 0) * max(call.new_tokens, 1)
            reading += times * _seconds([p for p in found if not p.decoding], mesh, rates)
            decoding += times * _seconds([p for p in found if p.decoding], mesh, rates)
            between += times * exchanged[bool(call.new_tokens)] * call.tokens / mesh.shape["pop"]
            flops += times * sum(each.times * each.flops for each in found)
            moved += times * sum(each.times * each.bytes for each in found)
        links = between / rates.links if rates.links else 0.0
        merge = (once + passes * late) / rates.bandwidth
        seconds[split] = Seconds(merge, reading, decoding, links)
        amounts[split] = Amount(flops, moved)
    return seconds, amounts


def climb(
    climbs: Sequence[Call], step: Step, programs: Sequence[Program], rates: Rates
) -> tuple[Seconds, Amount]:
    """Seconds and work of a step along the gradient, as `roofline` has them of a candidate.

    A merge; of each task a pass forward and one backward, whose products stand in the program with
    those that are made again; and a reading of the pool and the gradient, for the products of both.
    """
    found = [(call, counted(call, step.merged())) for call in climbs]
    model = sum(shares(step.once).values())
    read = (1 + len(climbs)) * (step.checkpoints + 1) * model
    # Layers that are merged late are merged to go forward and again to go backward, and read once
    # more for the products.
    read += len(climbs) * 3 * _late(step) * step.mesh.shape["pop"]
    by_name = {program.name: program for program in programs}
    moved = sum(
        sum(map(_traffic, by_name[call.name].collectives.items()))
        for call in climbs
        if call.name in by_name
    )
    seconds = Seconds(
        read / rates.bandwidth,
        math.fsum(_seconds(each, step.mesh, rates) for _, each in found) * step.mesh.shape["pop"],
        0.0,
        moved / rates.links if rates.links else 0.0,
    )
    each = [product for _, products in found for product in products]
    return seconds, Amount(
        sum(product.times * product.flops for product in each) * step.mesh.shape["pop"],
        sum(product.times * product.bytes for product in each) * step.mesh.shape["pop"],
    )


def _late(step: Step) -> float:
    """Bytes that a pass through one candidate moves on a device to merge its layers."""
    side_by_side = step.here if step.mesh.devices.flat[0].platform != "cpu" else 1
    moved = (step.checkpoints / side_by_side + 1) * step.depth * step.layer
    return moved / step.mesh.shape["pop"]


def _seconds(found: Sequence[Product], mesh: Mesh, rates: Rates) -> float:
    slowest = [max(each.flops / rates.flops, each.bytes / rates.bandwidth) for each in found]
    return math.fsum(each.times * second for each, second in zip(found, slowest)) / mesh.size


def _exchanged(of_step: Sequence[Call], programs: Sequence[Program]) -> Mapping[bool, float]:
    """Bytes that a device exchanges per token, when it generates and when it does not."""
    by_name = {program.name: program for program in programs}
    found = {False: 0.0, True: 0.0}
    for call in of_step:
        if call.name in by_name:
            moved = sum(map(_traffic, by_name[call.name].collectives.items()))
            found[bool(call.new_tokens)] = max(found[bool(call.new_tokens)], moved / call.tokens)
    return found


def _traffic(collective: tuple[str, Collective]) -> int:
    name, (_, bytes) = collective
    return 2 * bytes if name == "all-reduce" else bytes  # there and back


def measured_rates(seconds: float = 0.3) -> Rates:
    """Rates of the device at hand, by a matrix product and a sum that are done for a while."""
    n, length = 1024, 2**24

    def rate(step: Any, amount: float, value: jax.Array) -> float:
        step = jax.jit(step, donate_argnums=0)  # into memory that is there: new pages are slow
        value = jax.block_until_ready(step(value))
        times, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            value = jax.block_until_ready(step(value))
            times += 1
        return times * amount / (time.perf_counter() - started)

    flops = rate(lambda x: x @ x, 2.0 * n**3, jnp.zeros((n, n), jnp.float32))
    bandwidth = rate(lambda x: x + 1, 2.0 * 4 * length, jnp.zeros(length, jnp.float32))
    sharing = len(jax.devices()) if jax.default_backend() == "cpu" else 1  # the same cores
    return Rates(flops / sharing, bandwidth / sharing, 0.0)
