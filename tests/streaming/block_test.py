"""The merge of one block in memory: every dtype, bit for bit, and what it adds to the digests."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge.checkpoints import digest
from jaxmerge.checkpoints.safetensors import DTYPES
from jaxmerge.merge.linear import linear
from jaxmerge.streaming.block import Block, Kind, pages

SIZE, K = 512, 3
WEIGHTS_PxK = np.array([[0.5, -0.75, 0.125], [0, 1, 0], [-0.5, -0.25, -0.125]], np.float32)
F32, BF16, F16 = (np.dtype(each) for each in ("float32", jnp.bfloat16, "float16"))
WITHOUT_ZEROS_PxK = WEIGHTS_PxK[[0, 2]]
# float8 is widened while it is read, and 64 bits are two words.
WIDE = [
    dtype for dtype in DTYPES.values() if not dtype.name.startswith("float8") and dtype.itemsize < 8
]
SAME = [Kind((dtype,) * K, dtype, dtype) for dtype in WIDE]
MIXED = [
    Kind((BF16, F32, BF16), BF16, BF16),
    Kind((BF16, F16, BF16), BF16, F16),
    Kind((BF16,) * K, BF16, F32),
    Kind((F32,) * K, F32, BF16),
]


def _block(kind, weights_PxK):
    return Block(kind, weights_PxK, pages(kind.memory(len(weights_PxK), SIZE)), SIZE)


def _fill(block, kind, count, seed=0):
    """Values in the rows, and rubbish behind them; what is not floating point is alike in all."""
    rng, floating = np.random.default_rng(seed), jnp.issubdtype(kind.merged, jnp.floating)
    drawn = rng.normal(size=(K, SIZE)) if floating else rng.integers(0, 2, SIZE)[None]
    values = np.broadcast_to(drawn, (K, SIZE))
    for row, value in zip(block.rows, values):
        row[:] = value.astype(row.dtype)
    return [row[:count].copy() for row in block.rows]


@pytest.mark.parametrize("weights_PxK", [WEIGHTS_PxK, WITHOUT_ZEROS_PxK], ids=len)
@pytest.mark.parametrize("count", [SIZE, 78])
@pytest.mark.parametrize("kind", [*SAME, *MIXED], ids=str)
def test_results_and_digests(kind, count, weights_PxK):
    """A short block too: its rest must not count, although sums of zeros may be -0."""
    block = _block(kind, weights_PxK)
    stored = _fill(block, kind, count)
    merged = block.merge((count // 2, 2), 0, count)
    trees = [{"x": jnp.asarray(each).astype(kind.merged)} for each in stored]
    expected = [
        np.asarray(linear(trees, weights_K)["x"].astype(kind.written)) for weights_K in weights_PxK
    ]
    for ours, theirs in zip(merged.values_PxC, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.tobytes() == theirs.tobytes()
    leaves = {str(i): each.reshape(-1, 2) for i, each in enumerate([*stored, *expected])}
    found = [digest.checksum(lanes) for lanes in merged.lanes_Rx2]
    assert found == [each.checksum for each in digest.digests(leaves).values()]
    assert merged.finite_R.all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("weights_PxK", [WEIGHTS_PxK, WITHOUT_ZEROS_PxK], ids=len)
@pytest.mark.parametrize("kind", [*SAME[:4], *MIXED], ids=str)
def test_what_is_not_finite(kind, weights_PxK, value):
    block, floating = _block(kind, weights_PxK), jnp.issubdtype(kind.merged, jnp.floating)
    for k in range(K):
        _fill(block, kind, SIZE)
        if floating:
            block.rows[k][-1] = value
        finite_R = block.merge((SIZE,), 0, SIZE).finite_R
        reached_P = weights_PxK[:, k] != 0
        expected_R = ~np.concatenate([np.arange(K) == k, reached_P]) | (not floating)
        assert finite_R.tolist() == expected_R.tolist()


def test_results_that_are_too_large():
    """The checkpoints are finite, and a result is not."""
    kind = Kind((F32,) * K, F32, F16)
    block = _block(kind, WITHOUT_ZEROS_PxK)
    _fill(block, kind, SIZE)
    block.rows[0][3] = 1e6
    assert block.merge((SIZE,), 0, SIZE).finite_R.tolist() == [True] * K + [False] * 2


def test_results_that_are_still_held_stay_as_they_are():
    kind = Kind((BF16,) * K, BF16, BF16)
    block = _block(kind, WEIGHTS_PxK)
    _fill(block, kind, SIZE)
    held = block.merge((SIZE,), 0, SIZE).values_PxC
    before = [each.tobytes() for each in held]
    _fill(block, kind, SIZE, seed=1)
    after = [each.tobytes() for each in block.merge((SIZE,), 0, SIZE).values_PxC]
    assert [each.tobytes() for each in held] == before != after


def test_results_that_were_let_go_give_their_memory():
    kind = Kind((BF16,) * K, BF16, BF16)
    block = _block(kind, WEIGHTS_PxK)
    _fill(block, kind, SIZE)
    places = []
    for _ in range(3):
        merged = block.merge((SIZE,), 0, SIZE)
        places.append([each.ctypes.data for each in merged.values_PxC])
        del merged
    assert places[0] == places[1] == places[2]
