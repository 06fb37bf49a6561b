"""The embedding's lookup on meshes: the bits of a plain gather, and its derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxmerge.models.layers import looked_up
from jaxmerge.sharding import make_mesh, shardings

SIZES = [
    {"fsdp": 2, "tensor": 4},
    {"pop": 2, "fsdp": 2, "tensor": 2},
    {"pop": 2, "data": 2, "tensor": 2},  # 3 rows: data does not divide them
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("vocab", [64, 63])  # tensor divides it or not
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_looked_up_on_a_mesh(sizes, vocab, dtype):
    """Each row comes from one place, so a sum with zeros changes no bit."""
    C, B, T, D = 2, 3, 5, 8
    rng = np.random.default_rng(0)
    table_CxVxD = jnp.asarray(rng.normal(size=(C, vocab, D)), dtype)
    tokens_BxT = jnp.asarray(rng.integers(0, vocab, (B, T)), jnp.int32).at[0, 0].set(vocab - 1)
    towards_BxTxD = jnp.asarray(rng.normal(size=(B, T, D)), "float32")
    mesh = make_mesh(**sizes)

    def of_each(own_CxVxD, tokens_BxT):
        def one(table_VxD):
            found = looked_up(table_VxD, tokens_BxT)
            return jnp.sum(found.astype("float32") * towards_BxTxD), found

        def both(table_VxD):
            return jax.value_and_grad(one, has_aux=True)(table_VxD)

        return jax.lax.map(both, own_CxVxD)

    spread = jax.shard_map(
        of_each,
        mesh=mesh,
        in_specs=(PartitionSpec("pop"), PartitionSpec()),
        out_specs=PartitionSpec("pop"),
        axis_names={"pop"},
        check_vma=False,
    )
    rules = [("", ("pop", "tensor", "fsdp"))]
    placed = jax.device_put(table_CxVxD, shardings(table_CxVxD, rules, mesh))
    (_, found), slopes = jax.jit(spread)(placed, tokens_BxT)
    np.testing.assert_array_equal(found, table_CxVxD[:, tokens_BxT])
    # A row's derivative is the sum over its tokens, at most 15 of them, each rounded to the dtype.
    exact_VxD = np.zeros((vocab, D))
    np.add.at(exact_VxD, np.asarray(tokens_BxT), np.asarray(towards_BxTxD, np.float64))
    atol = 15 * float(jnp.finfo(dtype).eps) * np.abs(exact_VxD).max()
    for slope_VxD in np.asarray(slopes, np.float64):
        np.testing.assert_allclose(slope_VxD, exact_VxD, rtol=0, atol=atol)
