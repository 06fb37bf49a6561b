"""The mesh, and where the rules place each leaf on it."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from jaxmerge.errors import JaxmergeError
from jaxmerge.sharding import make_mesh, shardings


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (1, 1, 1, 1)),
        ({"pop": -1}, (8, 1, 1, 1)),
        ({"pop": 2, "fsdp": 2, "tensor": 2}, (2, 1, 2, 2)),
        ({"pop": 2, "data": 2, "tensor": -1}, (2, 2, 1, 2)),
        ({"data": 3, "tensor": -1}, (1, 3, 1, 2)),  # 8 // 3: two devices stay idle
        ({"data": 8, "fsdp": -1}, (1, 8, 1, 1)),
        ({"fsdp": 3}, (1, 1, 3, 1)),
    ],
)
def test_mesh_shapes(sizes, shape):
    """-1 takes what is left; the mesh may be smaller than the machine."""
    mesh = make_mesh(**sizes)
    assert mesh.axis_names == ("pop", "data", "fsdp", "tensor")
    assert mesh.devices.shape == shape
    assert len(set(mesh.devices.flat)) == mesh.devices.size


def test_mesh_of_given_devices():
    """Only the devices that are given count, for -1 too."""
    devices = jax.devices()[4:]
    mesh = make_mesh(tensor=-1, devices=devices)
    assert set(mesh.devices.flat) == set(devices)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"pop": 9}, "at most 8"),
        ({"pop": 3, "data": 3}, "at most 8"),
        ({"pop": 9, "data": -1}, "at most 8"),
        ({"pop": -1, "fsdp": -1}, "at most one is -1"),
        ({"tensor": 0}, "at least 1"),
        ({"data": -2}, "at least 1"),
    ],
)
def test_refused_meshes(sizes, said):
    """Too many places, and sizes that mean nothing; the message shows the sizes."""
    with pytest.raises(JaxmergeError, match=said) as caught:
        make_mesh(**sizes)
    for name, size in sizes.items():
        assert f"'{name}': {size}" in str(caught.value)


def _specs(tree, rules, **sizes):
    mesh = make_mesh(**sizes)
    placed = shardings(tree, rules, mesh)
    assert all(sharding.mesh == mesh for sharding in jax.tree.leaves(placed))
    return jax.tree.map(lambda sharding: sharding.spec, placed)


def _leaf(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_first_matching_rule_holds():
    """Rules are searched in order in the whole name; a leaf that none matches is repeated."""
    tree = {"layers": {"query": _leaf(4, 8), "up": _leaf(4, 8)}, "query": _leaf(4, 8)}
    tree["other"] = _leaf(4, 8)
    rules = (
        (r"layers/query$", ("fsdp", "tensor")),
        (r"query", ("tensor", None)),
        (r"layers/", ("fsdp",)),
    )
    assert _specs(tree, rules, fsdp=2, tensor=4) == {
        "layers": {"query": PartitionSpec("fsdp", "tensor"), "up": PartitionSpec("fsdp")},
        "query": PartitionSpec("tensor", None),
        "other": PartitionSpec(),
    }


def test_an_axis_that_does_not_divide_goes_to_another_dimension():
    """Beside the axis there; where it divides none, the leaf is repeated over it."""
    tree = {"x": _leaf(6, 8), "y": _leaf(8, 6), "z": _leaf(1, 0), "w": _leaf(6, 6)}
    rules = ((".", ("fsdp", "tensor")),)
    specs = _specs(tree, rules, fsdp=2, tensor=4)
    assert specs == {
        "x": PartitionSpec("fsdp", "tensor"),
        "y": PartitionSpec(("fsdp", "tensor"), None),
        "z": PartitionSpec(None, ("tensor", "fsdp")),
        "w": PartitionSpec("fsdp", None),
    }
    placed = shardings(tree, rules, make_mesh(fsdp=2, tensor=4))
    for name, shape in (("y", (1, 6)), ("w", (3, 6))):
        array = jax.device_put(jnp.ones(tree[name].shape), placed[name])
        assert array.addressable_shards[0].data.shape == shape
    alone = _specs({"x": _leaf(2, 3, 8)}, ((".", (None, "tensor", None)),), tensor=4)
    assert alone == {"x": PartitionSpec(None, None, None)}  # no other dimension is for an axis


def test_a_rule_with_too_many_axes_is_refused():
    """The leaf, the rule and the shape are named; fewer axes than dimensions are fine."""
    mesh = make_mesh(fsdp=2)
    with pytest.raises(JaxmergeError, match="layers/scale") as caught:
        shardings({"layers": {"scale": _leaf(4)}}, ((".", ("fsdp", "tensor")),), mesh)
    assert "('fsdp', 'tensor')" in str(caught.value)
    assert "(4,)" in str(caught.value)
    assert shardings(_leaf(4, 4), ((".*", ("fsdp",)),), mesh).spec == PartitionSpec("fsdp")


@pytest.mark.parametrize("named", ["tpu", ""])
def test_no_device_of_what_jax_is_told_to_run_on(monkeypatch, named):
    def devices():
        raise RuntimeError("Unable to initialize backend 'tpu': not found")

    monkeypatch.setattr("jax.devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", named)
    with pytest.raises(JaxmergeError, match="no device to run on") as raised:
        make_mesh()
    assert "JAX_PLATFORMS" in raised.value.expected
    assert named in raised.value.where
