"""What a run will need before it starts, on this machine or on a TPU slice that is not there.

    python -m jaxmerge.plan --config=configs/quickstart.py
    python -m jaxmerge.plan --config=configs/command_r_plus.py --topology=v5p:4x4x4

Compiles the programs of the run for the devices of --topology and prints the memory of each device,
the collectives, the work and the least time that it takes, and where the pool would live. A run
that does not fit is refused (exit code 2), with the smallest change that makes it fit.

--topology is `this` (the devices of this machine), `cpu:N`, or a slice of TPUs by its chips, such
as v5e:4x4, v6e:4x4 or v5p:4x4x4. Compiling for TPUs takes `pip install 'jaxmerge[plan]'`, but no
TPU.

The shapes of the checkpoints are those of pool.model_args where they are given; then the
checkpoints need not be there. The tasks' examples must be: how long they are decides what is
compiled, and no field of the config states it. Any field can be set on the command line.
"""

from __future__ import annotations

from jaxmerge import entry

if __name__ == "__main__":  # before the imports, which take seconds
    entry.begin()

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import NamedTuple

import jax
from absl import flags

from jaxmerge import config as configs
from jaxmerge.checkpoints.source import Source
from jaxmerge.config import Config
from jaxmerge.errors import JaxmergeError
from jaxmerge.evaluation.tokenizer import Bytes, Tokenizer
from jaxmerge.experiment import command_line, methods
from jaxmerge.experiment.budget import build_strategy, evaluations
from jaxmerge.experiment.build import (
    build_groups,
    build_limits,
    build_model,
    build_task,
    build_tokenizer,
)
from jaxmerge.experiment.sources import (
    base_of,
    find_checkpoints,
    model_directories,
    start_jax,
    tokenizer_directory,
)
from jaxmerge.models.model import Model
from jaxmerge.planning import chips, layouts
from jaxmerge.planning.chips import CHIPS, DEVICE_KINDS, THIS, Topology
from jaxmerge.planning.compiled import absent_devices
from jaxmerge.planning.estimate import measured_rates, rates_of
from jaxmerge.planning.here import room_of
from jaxmerge.planning.layouts import Job, Layout, Machine, Plan, draw_up
from jaxmerge.planning.page import page
from jaxmerge.planning.residency import AUTO, RESIDENCIES, Room
from jaxmerge.planning.work import cast
from jaxmerge.search import gradient
from jaxmerge.tasks.common import Task
from jaxmerge.trees import PyTree

_ABSENT = Source("", "", "", {}, "", {}, {})  # a checkpoint that is not at hand says nothing


class Answer(NamedTuple):
    """A plan, and where it does not fit what would.

    Attributes:
        plan: for the topology that was asked for; None where its mesh can't be made there.
        mesh: why it can't be made; "" where it can.
        change: the smallest change that makes it fit; "" where it fits, or nothing does.
        slice: the smallest slice of the same chips that suffices; "" alike.
    """

    plan: Plan | None
    mesh: str
    change: str
    slice: str

    @property
    def fits(self) -> bool:
        """Whether the run can be done as it is."""
        return self.plan is not None and self.plan.residency is not None


def plan(config: Config, topology: str = THIS) -> Answer:
    """What a run will need, found out in a process of its own: compilers can end theirs.

    Args:
        config: of the run.
        topology: see the module.

    Raises:
        JaxmergeError: the topology is unknown, its compiler is not installed, or the config is
            wrong.
    """
    of = chips.topology(topology)
    spawn = multiprocessing.get_context("spawn")  # JAX, here perhaps at work already, starts anew
    # No ProcessPoolExecutor: a process that ends at once complains of a pool's semaphores.
    here, there = spawn.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile("r") as said:
        process = spawn.Process(target=_apart, args=(there, config, of, said.name))
        resource_tracker.ensure_running()  # by `start` it would be, which lets SIGINT in again
        # Ctrl-C reaches both; this one answers it, and the other ends with this one.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        there.close()
        try:
            answer, trace = here.recv()
        except EOFError:
            raise JaxmergeError(
                "the compiler ended its process",
                where=f"--topology={topology}",
                expected="another topology or mesh; if it ends for all of them, please report it",
                found=said.read()[-2000:].strip(),
            ) from None
        except BaseException:
            process.kill()
            raise
        finally:
            process.join()
            here.close()
    if isinstance(answer, Exception):
        raise answer from RuntimeError(trace)
    return answer


def _apart(there: Connection, config: Config, of: Topology, said: str) -> None:
    """Sends the answer, or the error and its trace; complaints of this process go to `said`."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(said, "w") as file:
        os.dup2(file.fileno(), 2)
    try:
        message = _answer(config, of), ""
    except Exception as error:  # any: `plan` raises it again, in the process that asked
        message = error, traceback.format_exc()
    there.send(message)


def _answer(config: Config, of: Topology) -> Answer:
    """`plan`, in this process."""
    configs.check(config)
    _set_up(config, of)
    job, layout, machine = job_of(config), layout_of(config), _machine(of)
    made, mesh = None, ""
    try:
        made = draw_up(job, layout, machine)
    except JaxmergeError as error:
        if error.where != "mesh":
            raise
        mesh = str(error)
    if made is not None and made.residency:
        return Answer(made, "", "", "")
    smaller = layouts.smaller(job, layout, machine) if made is not None else ()
    change = layouts.fitting(job, ((name, each, machine) for name, each in smaller))
    larger = layouts.fitting(job, _larger(layout, of))
    return Answer(made, mesh, change or "", larger or "")


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


def _larger(layout: Layout, of: Topology) -> Iterator[tuple[str, Layout, Machine]]:
    """The layout on the known slices of the same chips."""
    for each in chips.slices(of.kind) if of.kind in CHIPS else ():
        machine = _machine(each)
        for change, changed in layouts.spread(layout):
            yield f"{each}{change and f' with {change}'}", changed, machine


def _set_up(config: Config, of: Topology) -> None:
    """The devices of this machine; what is compiled for in absence needs its CPU only."""
    if of.kind == THIS:
        start_jax(config)
        # What comes from there does not tell how much memory it takes.
        jax.config.update("jax_compilation_cache_dir", None)
        return
    jax.config.update("jax_platforms", "cpu")
    if of.kind == "cpu":
        jax.config.update("jax_num_cpu_devices", chips.count(of))


def _machine(of: Topology) -> Machine:
    if of.kind in CHIPS:
        chip, devices = CHIPS[of.kind], absent_devices(of)
        return Machine(str(of), devices, Room(chip.memory, chip.host), rates_of(chip), chip.source)
    devices = jax.devices()
    kind = DEVICE_KINDS.get(devices[0].device_kind)
    rates, said = measured_rates(), "measured here, in float32"
    if kind:
        rates, said = rates_of(CHIPS[kind]), CHIPS[kind].source
    return Machine(str(of), devices, room_of(devices), rates, said)


def layout_of(config: Config) -> Layout:
    """How the config lays a run out."""
    mesh, evaluate = config.mesh, config.evaluate
    return Layout(
        mesh.pop,
        mesh.data,
        mesh.fsdp,
        mesh.tensor,
        evaluate.candidates_per_step,
        "device" if config.merge.rematerialise else config.pool.residency,
        build_limits(config, base_of(config) if os.path.isdir(_named_base(config)) else ""),
        config.merge.rematerialise,
    )


def job_of(config: Config) -> Job:
    """What the config asks for.

    The shapes of the checkpoints are those of the model where pool.model_args describe it, else
    those of the checkpoints.

    Raises:
        JaxmergeError: the checkpoints are neither described nor there, or a task is not.
    """
    described = bool(config.pool.model and config.pool.model_args)
    with_base = methods.takes_base(config)
    sources = () if described else find_checkpoints(config, with_base=with_base)
    model = build_model(config, sources[0] if sources else _ABSENT)
    if sources:
        abstract, checkpoints = sources[0].abstract, len(sources) - with_base
        directories = model_directories(config, sources)
        named = tokenizer_directory(config, sources)
        tokenizer = build_tokenizer(config, named, model, directories)
    else:
        abstract, checkpoints = _described(config, model), len(config.pool.checkpoints)
        tokenizer = _tokenizer(config, model)
    tasks = [_task(config, name) for name in config.objective.tasks]
    heldout = [_task(config, name) for name in config.heldout]
    groups = build_groups(config, model, abstract)
    G = len(groups.names) if groups else 1
    return Job(
        model,
        cast(abstract, config.pool.dtype),
        checkpoints + with_base,
        tokenizer,
        {"search": tasks, "test": tasks, "heldout": heldout},
        evaluations(config, checkpoints, G) | _steps(config),
        build_strategy(config, checkpoints, groups=G).population,
        config.evaluate.vmap_candidates,
        config.pool.storage,
        groups,
        config.search.minibatch if config.search.strategy == gradient.NAME else 0,
        methods.searched(config, checkpoints),
    )


def _steps(config: Config) -> dict[str, int]:
    """How many steps along the gradient there are, where there are any."""
    return {"step": config.search.steps} if config.search.strategy == gradient.NAME else {}


def _task(config: Config, name: str) -> Task:
    try:
        return build_task(config, name)
    except JaxmergeError as error:
        raise JaxmergeError(
            "the task's examples can't be had, and their lengths are what a plan compiles for",
            where=f"tasks.{name}",
            expected="its data here; or, for the plan alone, another task of such lengths",
            found=str(error),
        ) from error


def _described(config: Config, model: Model) -> PyTree:
    patterns = [path for path in config.pool.checkpoints if any(mark in path for mark in "*?[")]
    patterns += [f"pool.steps {config.pool.steps}"] if config.pool.steps else []
    if model.init is None or patterns:
        raise JaxmergeError(
            "checkpoints that are only described must be listed, and their model must know its "
            "parameters",
            where="pool.checkpoints" if patterns else "pool.model",
            expected="paths without patterns" if patterns else "a Model with init",
            found=", ".join(patterns) or config.pool.model,
        )
    return jax.eval_shape(model.init, jax.random.key(0))


def _tokenizer(config: Config, model: Model) -> Tokenizer:
    """The tokenizer of checkpoints that are only described: where it is not there either, bytes."""
    named = os.path.expanduser(config.pool.tokenizer) or _named_base(config)
    if named and not os.path.exists(named) and "/" in named:
        return Bytes()
    return build_tokenizer(config, _named_base(config), model)


def _named_base(config: Config) -> str:
    """What `pool.base` names, which need not be here."""
    return os.path.expanduser(config.pool.base)


def main(_: Sequence[str]) -> None:
    """Prints the plan that the flags ask for.

    Raises:
        JaxmergeError: the run does not fit.
    """
    of = flags.FLAGS.topology
    print(f"jaxmerge: compiling for {of} ...", file=sys.stderr, flush=True)
    answer = plan(flags.FLAGS.config, of)
    if answer.plan is not None:
        print(page(answer.plan))
    if not answer.fits:
        raise refusal(answer, of)


def refusal(answer: Answer, topology: str) -> JaxmergeError:
    """What is said of a run that does not fit."""
    enough = [f"{answer.change} on {topology}"] if answer.change else []
    enough += [f"{answer.slice}, the smallest slice that suffices"] if answer.slice else []
    return JaxmergeError(
        answer.mesh or "the run does not fit",
        where=topology,
        expected="; or ".join(enough) or "less: no slice of these chips that is known suffices",
        found=_lacking(answer.plan) if answer.plan else "",
    )


def _lacking(made: Plan) -> str:
    if made.measured.refused:
        return made.measured.refused
    return (
        ", ".join(
            f"{made.measured.need.on_device(each) / 2**30:.1f} GiB with pool.residency = {each}"
            for each in RESIDENCIES
            if made.asked in (AUTO, each)
        )
        + f", of {made.room.device / 2**30:.1f} GiB of each device"
    )


def console() -> None:
    """The command line: `jaxmerge plan`, or `python -m jaxmerge.plan`."""
    flags.DEFINE_string("topology", THIS, "this, cpu:N, or a TPU slice such as v5p:4x4x8.")
    command_line.start(main, __doc__ or "", required=("config",))


if __name__ == "__main__":
    console()
