"""The parts of a plan: topologies, residency, counting, and what compiled programs say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxmerge.errors import JaxmergeError
from jaxmerge.evaluation.generate import log_likelihood
from jaxmerge.merge import linear
from jaxmerge.merge.rematerialised import RematerialisingMerger
from jaxmerge.models.deferred import apart
from jaxmerge.planning import chips, estimate, here, work
from jaxmerge.planning.chips import Topology
from jaxmerge.planning.compiled import collectives, compile_program
from jaxmerge.planning.counting import products
from jaxmerge.planning.residency import Need, Room, choose_residency
from jaxmerge.planning.sizes import Sizes, choose_sizes, per_token
from jaxmerge.sharding import make_mesh
from jaxmerge.trees import byte_count
from tests import tiny


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("this", Topology("this")),
        ("cpu:8", Topology("cpu", (8,))),
        ("v5p:4x4x8", Topology("v5p", (4, 4, 8))),
        ("v5e:16x16", Topology("v5e", (16, 16))),
    ],
)
def test_topologies(text, expected):
    assert chips.topology(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    "text",
    ["", "cpu", "cpu:0", "cpu:2x2", "this:2", "v5e", "v5e:4", "v5e:4x4x4", "v5e:32x8", "v9:2x2"],
)
def test_unknown_topologies_are_refused(text):
    """An axis over 16 too: libtpu would end the process."""
    with pytest.raises(JaxmergeError, match="unknown topology") as caught:
        chips.topology(text)
    assert caught.value.found == text


@pytest.mark.parametrize("kind", chips.CHIPS)
def test_slices_are_ordered(kind):
    """So that the first that suffices is the smallest."""
    counts = [chips.count(each) for each in chips.slices(kind)]
    assert counts == sorted(set(counts))


NEED = Need(pool=100, streamed=10, merged=20, working=5)


@pytest.mark.parametrize(
    ("room", "asked", "expected"),
    [
        (Room(125, 100), "auto", "device"),
        (Room(124, 100), "auto", "host"),
        (Room(124, 99), "auto", "disk"),
        (Room(35, 0), "auto", "disk"),
        (Room(34, 100), "auto", None),
        (Room(124, 100), "device", None),
        (Room(125, 100), "host", "host"),
        (Room(134, 0), "host", None),  # the device's memory is the host's: 20 + 5 + 10 + 100
        (Room(135, 0), "host", "host"),
        (Room(125, 100), "disk", "disk"),
    ],
)
def test_residency(room, asked, expected):
    """The first of device, host and disk that fits to the byte; what is asked for stands."""
    assert choose_residency(asked, NEED, room) == expected


def test_products_are_counted_with_their_loops():
    """A scan as long as it is, loops with ends that depend on data as often as is said in all."""

    def program(x, w):
        def layer(x, w):
            return x @ w, None

        def loop(x):
            return jax.lax.while_loop(lambda y: y.sum() < 0, lambda y: y @ w[0], x)

        x, _ = jax.lax.scan(layer, x, w)
        return loop(loop(loop(x[:1]).repeat(2, axis=0))[:1]).repeat(2, axis=0) @ w[1]

    closed = jax.make_jaxpr(program)(jnp.ones((2, 4)), jnp.ones((3, 4, 4)))
    found = list(products(closed.jaxpr, 7))
    assert sorted((each.times, each.decoding) for each in found) == [
        *((1, False), (3, False), (7, True))  # of the three loops the one with two rows
    ]
    assert {each.flops for each in found} == {2 * 2 * 4 * 4}
    assert {each.bytes for each in found} == {4 * (2 * 4 + 4 * 4 + 2 * 4)}


def test_counted_products_are_those_of_the_compiler():
    """Of the decoder without a loop over layers, where XLA's own figure is right."""
    config = tiny.dataclasses.replace(tiny.DECODER, layers=1, width=64, feed_forward=128)
    model = tiny.model(config)
    (tree,) = tiny.trees(1, config)
    tokens = jnp.zeros((4, 16), jnp.int32)
    counted = products(jax.make_jaxpr(model.apply)(tree, tokens).jaxpr, 1)
    cost = jax.jit(model.apply).lower(tree, tokens).compile().cost_analysis()
    assert cost is not None
    ours = sum(each.times * each.flops for each in counted)
    # XLA adds norms, softmax and activations, which are a small part at this width.
    assert ours <= cost["flops"] <= 1.15 * ours


def _sharded(shape, mesh, *spec):
    return jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec))
    )


def test_collectives_are_counted_with_their_loops():
    """Five layers, each with one all-reduce of [4, 8] float32 on every device."""
    mesh = make_mesh(tensor=4)

    def layers(x, up, down):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w[0]) @ w[1], None), x, (up, down))[0]

    arguments = (
        _sharded((4, 8), mesh),
        _sharded((5, 8, 16), mesh, None, None, "tensor"),
        _sharded((5, 16, 8), mesh, None, "tensor", None),
    )
    program = compile_program("layers", jax.jit(layers), *arguments)
    assert program.collectives == {"all-reduce": (5, 5 * 4 * 8 * 4)}
    assert program.arguments == 4 * (4 * 8 + 2 * 5 * 8 * 4)


def test_collectives_of_a_tpu_program():
    """As its compiler writes them: tuples, starts, and loops that call other computations."""
    text = """HloModule m

%body.1 (p: f32[8]) -> f32[8] {
  %a = (bf16[2,4]{1,0:T(8,128)(2,1)}, f32[3]{0}) all-reduce(%x, %y), to_apply=%add
  %b = f32[16]{0} fusion(%p), kind=kLoop, calls=%inner
}

%inner (p: f32[8]) -> f32[16] {
  %g = f32[16]{0:T(128)} all-gather-start(%p), dimensions={0}
  %h = f32[16]{0:T(128)} all-gather-done(%g)
}

%until (p: s32[1]) -> pred[] {
  %n = s32[1]{0:T(128)} constant({6})
  ROOT %lt = pred[] compare(%p, %n), direction=LT
}

ENTRY %main.9 (p: f32[8]) -> f32[8] {
  %w = f32[8]{0} while(%p), condition=%until, body=%body.1
  ROOT %c = f32[8]{0} collective-permute(%w), source_target_pairs={{0,1}}
}
"""
    assert collectives(text) == {
        "all-reduce": (6, 6 * (2 * 2 * 4 + 4 * 3)),
        "all-gather": (6, 6 * 64),
        "collective-permute": (1, 32),
    }


def test_bytes_of_a_device_are_those_of_its_shards():
    """Pool, largest leaf and merged models as they lie on the mesh when they are there."""
    mesh = make_mesh(pop=2, fsdp=2, tensor=2)
    model = tiny.model()
    (tree,) = tiny.trees(1)
    placed = work.placed(tree, model.sharding_rules, mesh)
    there = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), tree, placed)
    merged = linear.linear([there, there], jnp.full((4, 2), 0.5))

    def on_first(arrays):
        shards = [array.addressable_shards[0].data for array in jax.tree.leaves(arrays)]
        return sum(shard.nbytes for shard in shards)

    step = work.Step(placed, 2, 4, mesh)
    need = estimate.arithmetic(step)
    assert need.pool == 2 * on_first(there)
    assert need.merged == on_first(merged)
    # Two leaves, and the sum of a leaf of the device's two candidates.
    assert need.streamed == (2 + 2) * max(map(on_first, jax.tree.leaves(there)))
    late = RematerialisingMerger([there, there], "layers")(np.full((4, 2), 0.5))
    own, _ = apart({name: leaf for name, leaf in late.items() if name != "layers"})
    assert estimate.arithmetic(step._replace(layers="layers")).merged == on_first(own)


def test_a_leaf_that_is_not_split_is_told():
    """Of a feed-forward of 32 and a width of 16 neither is a multiple of 3."""
    mesh, model = make_mesh(tensor=3), tiny.model()
    (tree,) = tiny.trees(1)
    lines = estimate.whole_leaves(
        work.placed(tree, model.sharding_rules, mesh), model.sharding_rules, mesh
    )
    assert "layers/up: 32 is not a multiple of mesh.tensor = 3" in lines
    assert not any("norm" in line for line in lines)  # that is not to be split
    mesh = make_mesh(tensor=4)  # more than the 2 key/value heads
    assert not estimate.whole_leaves(
        work.placed(tree, model.sharding_rules, mesh), model.sharding_rules, mesh
    )


def _abstract():
    init = tiny.model().init
    assert init is not None
    return jax.eval_shape(init, jax.random.key(0))


def _step(checkpoints: int, pop: int = 1) -> work.Step:
    """Of the tiny model; `candidates` is what the config leaves open."""
    mesh = make_mesh(pop)
    tree = work.placed(_abstract(), tiny.model().sharding_rules, mesh)
    return work.Step(tree, checkpoints, mesh.shape["pop"], mesh)


def test_what_cannot_fit_is_refused_before_it_is_loaded():
    """By bytes of pool and merged models; the message has the figures and what would fit."""
    size, step = byte_count(_abstract()), _step(8, pop=2)
    enough, less = Room((8 + 1) * size, 0), Room((8 + 1) * size - 1, 0)
    assert here.residency_here(step, enough, "device") == "device"
    for residency, said in (("device", 'pool.residency = "disk"'), ("host", '"disk"')):
        with pytest.raises(JaxmergeError, match="do not fit") as caught:
            here.residency_here(step, less, residency)
        assert said in caught.value.expected
    assert here.residency_here(step, less, "auto") == "disk"
    with pytest.raises(JaxmergeError, match=r"jaxmerge\.plan says which") as caught:
        here.residency_here(step, Room(size, 0), "auto")
    assert "pool.residency" not in caught.value.expected


OPEN = Sizes(0, 0, 0)


def _sizes(step, room, residency="device", asked=OPEN, vmap_candidates=0):
    return choose_sizes(
        asked,
        tiny.model(),
        step,
        Room(room, room),
        residency=residency,
        population=12,
        vmap_candidates=vmap_candidates,
    )


def test_sizes_that_are_left_open_are_the_largest_that_help_and_fit():
    """By the byte, a tenth kept free; what is asked for stands."""
    step = _step(3, pop=2)
    assert _sizes(step, 2**40) == Sizes(2, 64, 8192)  # on a CPU more candidates are not faster
    assert _sizes(step, 2**40, "disk") == Sizes(12, 64, 8192)  # but fewer passes over the pool
    assert _sizes(step, 2**40, "disk", Sizes(4, 5, 0)) == Sizes(4, 5, 8192)
    assert _sizes(step, 2**40, vmap_candidates=8) == Sizes(2, 64, 8192)
    fixed = estimate.arithmetic(step).on_device("device")
    working = 1024 * per_token(tiny.model(), step)
    just = -(-(fixed + working) * 10 // 9)
    assert _sizes(step, just) == Sizes(2, 8, 1024)
    assert _sizes(step, just - 2).tokens == 512
    for candidates in (2, 6):
        need = estimate.arithmetic(step._replace(candidates=candidates)).on_device("disk")
        just = -(-(need + working) * 10 // 9)
        assert _sizes(step, just, "disk", Sizes(0, 0, 1024)).candidates == candidates


def test_a_token_takes_what_is_compiled():
    """Logits are most of it; what arithmetic says is at least what a program takes, and no more
    than three times that.
    """
    model, step = tiny.model(), _step(3)
    each = jax.ShapeDtypeStruct((8, 64), np.int32)  # tokens, branches, places, targets
    score = jax.jit(functools.partial(log_likelihood, model))
    compiled = score.lower(step.tree, each, each, each, each)
    memory = compiled.compile().memory_analysis()
    assert memory is not None
    held = memory.temp_size_in_bytes
    assert held <= 8 * 64 * per_token(model, step) <= 3 * held
