"""Norms and cosines of checkpoints' differences against NumPy, on a mesh."""

import numpy as np
import pytest

from jaxmerge.merge import kinship
from jaxmerge.trees import named_leaves
from tests.merge.by_method_test import made, on_mesh


@pytest.mark.parametrize("with_base", [True, False])
def test_they_are_those_of_the_whole_models(with_base):
    """To the rounding of float32 sums of 144 products."""
    _, (base, *trees) = made("ties")
    whole = [
        np.concatenate([np.asarray(x, np.float64).ravel() for x in named_leaves(tree).values()])
        for tree in (base, *trees)
    ]
    origin = whole[0] if with_base else np.mean(whole[1:], axis=0)
    deltas = np.stack(whole[1:]) - origin
    placed = [on_mesh(tree, pop=2, fsdp=2, tensor=2) for tree in (base, *trees)]
    gram = kinship.products(placed[1:], placed[0] if with_base else None)
    norms, cosines = kinship.norms_and_cosines(gram)
    np.testing.assert_allclose(norms, np.linalg.norm(deltas, axis=1), rtol=1e-5)
    expected = deltas @ deltas.T / np.outer(norms, norms)
    np.testing.assert_allclose(cosines, expected, atol=1e-5)
