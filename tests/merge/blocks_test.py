"""Tensors on the host go through programs of one shape, block by block, to the same bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge.merge import blocks, geometry
from jaxmerge.merge.methods import METHODS, merge_tensor
from tests.merge.methods_test import full_genes, make_tensors

SHAPE = (7, 5)
COMBINATIONS = [name for name, row in METHODS.items() if row.kind == "combination"]


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Blocks that the tensors here have several of, and a part of one."""
    monkeypatch.setattr(blocks, "SIZE", 16)


def make(seed: int, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_cauchy(size=SHAPE), dtype)


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_geometry_is_that_of_the_whole(with_base, scale):
    """Bit for bit: also of opposed vectors, whose blocks have products of both signs, and of 0."""
    one, two, base = (scale * make(seed) for seed in range(3))
    tensors = (one, two, -one + 0.01 * two, jnp.zeros(SHAPE))
    given = base if with_base else None
    found = geometry.geometry(tensors, given, axis=None)
    whole = geometry._anywhere(tensors, given, axis=None)
    np.testing.assert_array_equal(found.norms, whole.norms)
    np.testing.assert_array_equal(found.cosines, whole.cosines)


def test_the_geometry_of_what_is_not_finite():
    """It shows in the norms, wherever it is."""
    one, two = make(0), make(1).at[6, 4].set(jnp.inf)
    found = geometry.geometry((one, two), None, axis=None)
    np.testing.assert_array_equal(np.isnan(found.norms), [False, True])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", COMBINATIONS)
def test_the_merge_is_that_of_the_whole(monkeypatch, method, dtype):
    """Bit for bit."""
    tensors, base = make_tensors(method, dtype)
    found = merge_tensor(method, tensors, base, full_genes(method), name="x")
    monkeypatch.setattr(blocks, "fit", lambda arrays: False)
    whole = merge_tensor(method, tensors, base, full_genes(method), name="x")
    assert found.dtype == whole.dtype == dtype
    np.testing.assert_array_equal(found, whole)


def test_other_shapes_compile_nothing(compilations):
    genes = {"t": 0.3}
    merge_tensor("slerp", [make(0), make(1)], None, genes, name="x")
    before = compilations()
    for shape in ((), (3,), (4, 4), (2, 3, 50)):
        values = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
        found = merge_tensor("slerp", list(map(jax.device_put, values)), None, genes, name="x")
        assert found.shape == shape
    assert compilations() == before


def test_the_merge_lies_where_the_tensors_do():
    last = jax.devices()[-1]
    tensors = [jax.device_put(make(seed), last) for seed in range(2)]
    found = merge_tensor("slerp", tensors, None, {"t": 0.3}, name="x")
    assert found.devices() == {last}
    expected = merge_tensor("slerp", [make(0), make(1)], None, {"t": 0.3}, name="x")
    assert expected.devices() == {jax.devices()[0]}
    np.testing.assert_array_equal(found, expected)
