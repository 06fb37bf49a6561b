"""Plans for slices of TPUs that are not there, with libtpu's compiler."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import jax
import pytest

from jaxmerge import plan as plans
from jaxmerge.plan import plan
from jaxmerge.planning import chips, estimate, work
from jaxmerge.planning.compiled import Program, absent_devices
from jaxmerge.sharding import make_mesh


def _command_r_plus():
    from configs import command_r_plus

    return command_r_plus.get_config()


@pytest.mark.slow
@pytest.mark.tpu
def test_command_r_plus_on_a_slice_of_v5p():
    """The figures of the reference: 48.4 GiB of pool, 3.0 GiB a merged model, on 64 chips.

    No chip holds more than its share of the pool, its share of two merged models and one layer.
    """
    answer = plan(_command_r_plus(), "v5p:4x4x4")
    made = answer.plan
    assert answer.fits
    assert made is not None
    need = made.measured.need
    assert need.pool / 2**30 == pytest.approx(48.4, abs=0.05)
    assert need.merged / 2 / 2**30 == pytest.approx(3.0, abs=0.05)
    assert made.measured.programs[0].collectives == {}
    assert not made.measured.whole
    layer = made.bytes / 64
    assert need.working < layer
    assert need.on_device("device") < made.room.device


@pytest.mark.slow
@pytest.mark.tpu
def test_a_slice_that_is_too_small_is_refused_with_the_smallest_that_suffices():
    config = _command_r_plus()
    answer = plan(config, "v5p:2x2x2")
    assert not answer.fits
    assert answer.slice == "v5p:4x4x4"
    refused = plans.refusal(answer, "v5p:2x2x2")
    assert "v5p:4x4x4, the smallest slice that suffices" in refused.expected


def _merges(topologies: tuple[str, ...]) -> list[Program]:
    """The merge alone of each slice, for a process that may get to know the chips of several."""
    jax.config.update("jax_platforms", "cpu")
    config = _command_r_plus()
    job, made = plans.job_of(config), []
    for of in map(chips.topology, topologies):
        mesh = make_mesh(fsdp=-1, tensor=config.mesh.tensor, devices=absent_devices(of))
        tree = work.placed(job.abstract, job.model.sharding_rules, mesh)
        step = work.Step(tree, job.checkpoints, 1, mesh)
        streamed = estimate.arithmetic(step).on_device("device") > chips.CHIPS[of.kind].memory
        made.append(estimate.compile_merge(step, streamed=streamed))
    return made


@pytest.mark.slow
@pytest.mark.tpu
def test_no_slice_has_a_collective_in_the_merge():
    topologies = ("v5e:8x16", "v6e:8x8", "v6e:16x16", "v5p:4x4x8")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as process:
        merges = process.submit(_merges, topologies).result()
    assert [merge.name for merge in merges].count("merge") == 2  # the pools of the others stream
    for merge in merges:
        assert not merge.refused
        assert merge.collectives == {}


def _merge_of_a_population(dtype: str, storage: str) -> tuple[Program, int]:
    """Four candidates of eight checkpoints on a chip, and the bytes of a leaf."""
    jax.config.update("jax_platforms", "cpu")
    mesh = make_mesh(devices=absent_devices(chips.topology("v5e:1x1"))[:1])
    leaf = jax.ShapeDtypeStruct((4, 2048, 2048), dtype)
    tree = work.placed({"gate": leaf}, ((".*", ()),), mesh)
    step = work.Step(tree, 8, 4, mesh, storage=storage)
    return estimate.compile_merge(step, streamed=False), leaf.size * leaf.dtype.itemsize


@pytest.mark.slow
@pytest.mark.tpu
@pytest.mark.parametrize(
    ("dtype", "storage"),
    [("bfloat16", "exact"), ("float32", "exact"), ("bfloat16", "int8"), ("bfloat16", "int4")],
)
def test_a_population_on_a_chip_has_no_wide_copy_of_the_pool(dtype, storage):
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as process:
        merge, leaf = process.submit(_merge_of_a_population, dtype, storage).result()
    assert not merge.refused
    assert merge.temporaries < leaf / 8  # a copy of all in float32 would be 16 leaves
