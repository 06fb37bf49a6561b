"""Generation and log-likelihoods of the decoder, and of a model that is only an `apply`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge.generate import generate, log_likelihood
from jaxmerge.models.model import from_apply
from tests import tiny

MODEL = tiny.model()
PARAMS = tiny.trees(1)[0]
TOKENS = jax.random.randint(jax.random.key(1), (5, 12), 0, 256)


def test_causal():
    """Logits at t do not move when a later token does."""
    before = MODEL.apply(PARAMS, TOKENS)
    after = MODEL.apply(PARAMS, TOKENS.at[:, 7].add(1))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert not np.allclose(before[:, 7:], after[:, 7:])
