"""Whole plans: for CPU devices and for TPU slices that are not there, and what is refused."""

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxmerge import config as configs
from jaxmerge import plan as plans
from jaxmerge.errors import JaxmergeError
from jaxmerge.experiment.prepare import prepare
from jaxmerge.merge.searched import searched
from jaxmerge.plan import Answer, job_of, layout_of, plan
from jaxmerge.planning import layouts, work
from jaxmerge.planning.estimate import Rates
from jaxmerge.planning.layouts import Layout, Machine, draw_up
from jaxmerge.planning.page import page
from jaxmerge.planning.residency import Room
from jaxmerge.sharding import make_mesh
from jaxmerge.trees import byte_count
from tests import tiny

ROOT = Path(__file__).parents[1]
RATES = Rates(flops=1e12, bandwidth=1e11, links=1e10)
PLENTY = Room(2**40, 2**40)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config on a tiny pool."""
    config = configs.default()
    config.pool.checkpoints = (f"{tiny.pool(tmp_path_factory.mktemp('pool'))}/*",)
    config.tasks.generation = {"builder": "tests.tiny:generation"}
    config.tasks.choice = {"builder": "tests.tiny:choice"}
    config.tasks.unseen = {"builder": "tests.tiny:generation", "seed": 5}
    config.objective.tasks = ("generation", "choice")
    config.heldout = ("unseen",)
    config.objective.search_examples = 10
    config.objective.test_examples = 20
    config.evaluate.batch_size = 8
    config.search.strategy = "CMA_ES"
    config.compilation_cache = ""
    return config


@pytest.fixture(scope="module")
def job(config):
    return job_of(config)


@pytest.fixture(scope="module")
def small(job):
    """A job of one task and one split, which takes less to compile."""
    return job._replace(splits={"search": job.splits["search"][:1]}, evaluations={"search": 20})


def _machine(room: Room = PLENTY, devices: int = 8) -> Machine:
    return Machine("eight", jax.devices()[:devices], room, RATES, "made up")


def _layout(config, **changed) -> Layout:
    layout = dataclasses.replace(layout_of(config), residency="auto")
    return dataclasses.replace(layout, **changed)


@pytest.fixture(scope="module")
def made(config, job):
    return draw_up(job, _layout(config, pop=2, fsdp=2, tensor=2), _machine())


def test_a_plan_has_all_figures(made):
    """On a mesh that splits models: the merge has no collectives, the rest has."""
    assert made.residency == "device"
    assert made.mesh == {"pop": 2, "data": 1, "fsdp": 2, "tensor": 2}
    merge, *calls = made.measured.programs
    assert merge.name == "merge"
    assert not merge.collectives
    assert {name.split()[0] for name in (each.name for each in calls)} == {
        "generate",
        "log-likelihood",
    }
    assert all(each.collectives for each in calls)
    assert merge.arguments == pytest.approx(made.measured.need.pool, rel=0.01)
    assert made.measured.need.working >= max(each.temporaries for each in calls)
    assert 0 < made.measured.cache < made.measured.need.working
    assert set(made.seconds) == {"search", "test", "heldout"}
    for split, seconds in made.seconds.items():
        assert all(part > 0 for part in seconds), split
    assert made.seconds["test"].reading > made.seconds["search"].reading
    assert made.run_seconds == pytest.approx(
        sum(made.seconds[split].total * count for split, count in made.evaluations.items())
    )


def test_a_step_along_the_gradient_is_planned(config, job, made):
    """It is compiled, counted for the memory, and about three passes of work over its examples."""
    climbing = job._replace(minibatch=4, evaluations={**job.evaluations, "step": 10})
    plan = draw_up(climbing, _layout(config, pop=2, fsdp=2, tensor=2), _machine())
    steps = [each for each in plan.measured.programs if each.name.startswith("gradient")]
    assert steps
    assert plan.measured.need.working >= max(each.outputs + each.temporaries for each in steps)
    assert plan.seconds["step"].decoding == 0
    assert all(part > 0 for part in (plan.seconds["step"].merge, plan.seconds["step"].reading))
    assert plan.run_seconds > made.run_seconds
    assert "gradient step" in page(plan)


def test_work_does_not_depend_on_the_mesh(config, job, made):
    """One candidate is as much work however it is spread; only padding of rows may differ."""
    alone = draw_up(job, _layout(config, pop=1), _machine(devices=1))
    for split, amount in made.amounts.items():
        assert amount == pytest.approx(alone.amounts[split])
    assert not any(each.collectives for each in alone.measured.programs)


def test_the_page_says_it(made):
    text = page(made)
    assert "mesh pop 2, data 1, fsdp 2, tensor 2" in text
    assert "pool.residency = auto takes device" in text
    assert "generate 6 after" in text
    for line in text.splitlines():
        assert line == line.rstrip()


def _needed(made, residency: str) -> int:
    return made.measured.need.on_device(residency)


def test_the_residency_is_the_first_that_fits(config, small):
    """Each is chosen in a room of just its size; merges leaf by leaf have no collectives either."""
    layout = _layout(config, pop=1, fsdp=8)
    whole = draw_up(small, layout, _machine())
    assert whole.residency == "device"
    room = Room(_needed(whole, "device") - 1, _needed(whole, "device"))
    hosted = draw_up(small, layout, _machine(room))
    assert hosted.residency == "host"
    on_disk = draw_up(small, layout, _machine(room._replace(host=0)))
    assert on_disk.residency == "disk"
    assert not on_disk.measured.programs[0].collectives
    none = draw_up(small, layout, _machine(Room(on_disk.measured.need.merged, 0)))
    assert none.residency is None
    assert not none.measured.programs  # what can't fit by arithmetic need not be compiled
    assert "takes none: it does not fit" in page(none)


def test_layers_that_are_merged_late_take_no_memory_before(config, small):
    """Embedding and norm of one candidate are there, and each pass reads three checkpoints."""
    layout = _layout(config, pop=1, rematerialise=True, residency="device")
    late = draw_up(small, layout, _machine(devices=1))
    tree = small.abstract
    others = byte_count(tree) - byte_count(tree["layers"])
    assert late.measured.need.merged == others
    assert late.measured.programs[0].name == "merge, but for the layers"
    assert "merged models but for layers: 1 of a step" in page(late)
    passes = 6 * len(small.splits["search"][0].splits["search"]) / 8  # tokens, microbatches of 8
    least = passes * 3 * byte_count(tree["layers"]) / RATES.bandwidth
    assert least < late.seconds["search"].merge < 3 * least  # there are smaller microbatches


def test_the_smallest_change_is_found(config, small):
    """Fewer candidates of a step come before smaller batches, and those before another mesh."""
    wide = _layout(config, pop=8, candidates_per_step=16)
    names = [name for name, _ in layouts.smaller(small, wide, _machine())]
    assert names[0] == "evaluate.candidates_per_step = 8"
    assert names[1] == "evaluate.batch_tokens = 4096, evaluate.batch_size = 4"
    assert names[-4] == "merge.rematerialise = True"
    assert names[-1] == "mesh.pop = 1, mesh.fsdp = 8"

    def change(room: int) -> str | None:
        machine = _machine(Room(room, 0))
        choices = (
            (name, layout, machine) for name, layout in layouts.smaller(small, wide, machine)
        )
        return layouts.fitting(small, choices)

    fewer = draw_up(small, dataclasses.replace(wide, candidates_per_step=8), _machine())
    assert change(_needed(fewer, "disk")) == names[0]
    assert change(10) is None


def _by(job, method: str):
    """The job, of a base and two checkpoints, as a search over a method."""
    return job._replace(method=searched(method, {}, job.checkpoints - 1, with_base=True))


def test_a_method_by_leaf_is_planned_by_its_own_program(config, small):
    """Each candidate reads all checkpoints; changes that the method can't take are not named."""
    layout = _layout(config, pop=2, fsdp=2, tensor=2, candidates_per_step=8, residency="device")
    linear, ties = (draw_up(job, layout, _machine()) for job in (small, _by(small, "ties")))
    merge = ties.measured.programs[0]
    assert merge.name.startswith("ties, leaf by leaf: ")
    assert merge.name in page(ties)
    leaves = work.placed(small.abstract, small.model.sharding_rules, make_mesh(2, 1, 2, 2))
    largest = max(work.shares(leaves).values())
    assert 3 * largest <= merge.arguments < 3.1 * largest + 1000
    assert merge.temporaries > largest
    # K read for each of 4 candidates and not for all of them: (12 + 4) / (3 + 4).
    ratio = ties.seconds["search"].merge / linear.seconds["search"].merge
    assert ratio == pytest.approx(16 / 7)
    changes = [name for name, _ in layouts.smaller(_by(small, "ties"), layout, _machine())]
    assert changes
    assert not [name for name in changes if "residency" in name or "rematerialise" in name]


def test_a_weighted_sum_by_a_method_is_planned_as_one(config, small):
    layout = _layout(config, pop=2, fsdp=2, tensor=2)
    merge, *_ = draw_up(_by(small, "task_arithmetic"), layout, _machine()).measured.programs
    assert merge.name == "merge"
    assert not merge.collectives


def test_the_method_is_that_of_the_config(config):
    config = config.copy_and_resolve_references()
    config.merge.method = "dare_ties"
    base, *config.pool.checkpoints = (
        config.pool.checkpoints[0].replace("*", f"model{number}") for number in range(3)
    )
    config.pool.base = base
    of = job_of(config).method
    assert of
    assert (of.method, of.with_base) == ("dare_ties", True)


@pytest.mark.slow
def test_evaluations_are_those_of_a_run(config, tmp_path):
    """Every candidate that a run scores was planned, split by split."""
    from jaxmerge.experiment.search import search as run

    config = config.copy_and_resolve_references()
    config.search.population, config.search.budget = 4, 14
    with_analyses = job_of(config).evaluations
    config.analyses.leave_one_out = config.analyses.transfer = False
    run(config, str(tmp_path))
    lines = (tmp_path / "candidates.jsonl").read_text().splitlines()
    counts = job_of(config).evaluations
    for split in ("search", "test", "heldout"):
        assert sum(f'"split": "{split}"' in line for line in lines) == counts[split]
    # Analyses may find what they want scored already: the plan has what they need at most.
    checkpoints, pairs = 3, 1
    assert with_analyses["test"] - counts["test"] == checkpoints + pairs


@pytest.mark.parametrize(
    ("room", "elsewhere", "residency", "tokens"),
    [(2**40, 130_000, "device", 8192), (130_000, 2**40, "disk", 256)],
)
def test_a_run_takes_what_fits_and_keeps_its_sizes(
    config, tmp_path, monkeypatch, room, elsewhere, residency, tokens
):
    """As the plan says; three tiny models and a merged one are 141 kB. It goes on elsewhere."""
    config = config.copy_and_resolve_references()
    config.mesh.pop, config.pool.residency, config.evaluate.batch_tokens = 1, "auto", 0
    for there in (room, elsewhere):
        monkeypatch.setattr(
            "jaxmerge.experiment.prepare.room_of", lambda _, there=there: Room(there, 0)
        )
        prepared = prepare(config, str(tmp_path))
        prepared.directory.close()
        assert (prepared.pool.residency == residency) == (there == room)
        recorded = json.loads((tmp_path / "config.json").read_text())["evaluate"]
        assert recorded["batch_tokens"] == tokens
        assert recorded["candidates_per_step"] == 1


def test_described_checkpoints_need_not_be_there(config, job):
    """The same need as that of the checkpoints that are there."""
    described = config.copy_and_resolve_references()
    described.pool.checkpoints = tuple(f"gs://nowhere/{k}" for k in range(3))
    described.pool.base = "gs://nowhere/base"
    described.pool.model = "decoder"
    described.pool.model_args = tiny.DECODER.plain()
    found = job_of(described)
    assert found.model is job.model
    assert found.checkpoints == job.checkpoints == 3
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), found.abstract) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), job.abstract
    )
    described.pool.checkpoints = ("gs://nowhere/*", "gs://nowhere/b")
    with pytest.raises(JaxmergeError, match="must be listed"):
        job_of(described)


def test_plan_in_a_process_of_its_own(config):
    """With as many devices as are asked for, whatever this process has."""
    config = config.copy_and_resolve_references()
    config.mesh.tensor = 2
    answer = plan(config, "cpu:6")
    assert answer.fits
    assert answer.plan is not None
    assert answer.plan.mesh == {"pop": 3, "data": 1, "fsdp": 1, "tensor": 2}
    assert answer.plan.rates.flops > 1e6


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jaxmerge.plan", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_command(config, tmp_path):
    """A mesh that has no place is refused with code 2; an unknown topology before anything else."""
    file = tmp_path / "mine.py"
    pool = config.pool.checkpoints[0]
    file.write_text(
        "from jaxmerge.config import default\n"
        "def get_config():\n"
        "    config = default()\n"
        f"    config.pool.checkpoints = ({pool!r},)\n"
        "    config.tasks.letters = {'builder': 'tests.tiny:generation'}\n"
        "    config.objective.tasks = ('letters',)\n"
        "    return config\n"
    )
    good = _command(f"--config={file}", "--topology=cpu:2")
    assert good.returncode == 0, good.stderr
    assert good.stdout.startswith("Plan for cpu:2: 2 x cpu, mesh pop 2")
    crowded = _command(f"--config={file}", "--topology=cpu:2", "--config.mesh.tensor=4")
    assert crowded.returncode == 2
    assert "more places than there are devices" in crowded.stderr
    unknown = _command(f"--config={file}", "--topology=v5e:64x4")
    assert unknown.returncode == 2
    assert "unknown topology" in unknown.stderr


def test_refusals_say_what_would_suffice():
    """The mesh, the change and the slice, each where there is one."""
    error = plans.refusal(Answer(None, "the mesh has no place", "x = 1", "v5e:2x2"), "v5e:1x1")
    assert "the mesh has no place" in str(error)
    assert error.expected == "x = 1 on v5e:1x1; or v5e:2x2, the smallest slice that suffices"
    assert "no slice" in plans.refusal(Answer(None, "m", "", ""), "v5e:1x1").expected


def ends_its_process(**_):
    """A task's builder, in place of a compiler that aborts."""
    os.write(2, b"F0000 layouts do not fit")
    os._exit(134)


def test_a_compiler_that_ends_its_process(config):
    config = copy.deepcopy(config)
    config.tasks.generation = {"builder": "tests.plan_test:ends_its_process"}
    with pytest.raises(JaxmergeError, match="the compiler ended its process") as caught:
        plan(config)
    # Where libtpu is installed, it has said lines of its own before.
    assert str(caught.value.found).splitlines()[-1] == "F0000 layouts do not fit"
