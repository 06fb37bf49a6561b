"""Every method in the variant "mergekit" against mergekit 0.1.5; tools/mergekit_fixtures.py."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge.merge import draws
from jaxmerge.merge.methods import METHODS, merge_tensor

FIXTURES = dict(np.load(Path(__file__).parent / "fixtures" / "mergekit.npz"))
CASES = json.loads(str(FIXTURES.pop("cases")))
TENSORS = sorted({name.partition("/")[2] for name in FIXTURES})


@pytest.fixture(autouse=True, scope="module")
def fixed_draws():
    """A value is drawn where a fixed number for its place is below the probability, as there."""

    def drawn(probability: Any, key: Any, checkpoint: Any, shape: tuple[int, ...]) -> Any:
        return jnp.asarray(np.random.default_rng(1).uniform(size=shape), jnp.float32) < probability

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(draws, "drawn", drawn)
        jax.clear_caches()  # of programs with other draws
        yield
    jax.clear_caches()


def read(model: str, tensor: str, dtype: str) -> Any:
    values = FIXTURES[f"{model}/{tensor}"]
    stored = jnp.bfloat16 if values.dtype == np.uint16 else np.float32
    return jnp.asarray(values.view(stored), dtype)


def merged(case: str, tensor: str, variant: Any = "mergekit") -> Any:
    row = CASES[case]
    dtype = row.get("dtype", "float32")
    base = row.get("base", "")
    with_base = METHODS[row["method"]].base != "none" and base
    return merge_tensor(
        row["method"],
        [read(model, tensor, dtype) for model in row["models"]],
        read(base, tensor, dtype) if with_base else None,
        row["genes"],
        name=tensor,
        variant=variant,
    )


def roundings(case: str) -> float:
    """How far the two may be apart, in units of the largest value that goes into a place.

    In float32 both round up to 16 times, in another order. mergekit works in bfloat16 where models
    are stored in it: but for a linear merge, which it adds up in float32 from 0.1.5 on, and slerp,
    every product and sum of three deltas is rounded to 8 bits, where here the result alone is.
    """
    if "dtype" not in CASES[case]:
        return 16 * 2.0**-24
    return (1 if case.startswith(("linear", "slerp")) else 6) * 2.0**-8


@pytest.mark.parametrize("case", CASES)
def test_equals_mergekit(case):
    for tensor in TENSORS:
        found = np.asarray(merged(case, tensor), np.float64)
        expected = np.asarray(read(case, tensor, "float32"), np.float64)
        largest = max(
            np.abs(read(model, tensor, "float32")).max() for model in CASES[case]["models"]
        )
        apart = np.abs(found - expected).max() / max(largest, np.abs(expected).max())
        assert apart <= roundings(case), tensor


def test_every_method_of_mergekit_is_compared():
    assert {row["method"] for row in CASES.values()} == set(METHODS) - {"metagpt"}


@pytest.mark.parametrize(
    "case", ["slerp alike", "ties negative", "sce small", "model_stock apart", "nearswap tiny"]
)
def test_the_variants_differ_where_they_say_so(case):
    """Else the comparison above could not tell them apart."""
    (tensor,) = [name for name in TENSORS if "up_proj" in name]
    assert not np.array_equal(merged(case, tensor), merged(case, tensor, "paper"))
