"""Rotary positions: what they are for, and their scalings against transformers' at full size."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from jaxmerge.errors import JaxmergeError
from jaxmerge.models import families
from jaxmerge.models.rope import SCALINGS, Rope, rotate, turns

# As the checkpoints named have them: (longest text, rope_parameters).
AT_FULL_SIZE = {
    "Llama 3.1 8B": (
        131072,
        {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "Qwen3 8B at 128k": (
        40960,
        {
            "rope_type": "yarn",
            "rope_theta": 1_000_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
        },
    ),
    "Phi-3.5 mini": (
        131072,
        {
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "factor": 32.0,
            "short_factor": [1 + 0.03 * w for w in range(64)],
            "long_factor": [1.1 + w for w in range(64)],
            "original_max_position_embeddings": 4096,
        },
    ),
    "linear": (16384, {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}),
    "dynamic": (4096, {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}),
}


def _config(longest: int, parameters: dict) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        hidden_size=256,
        num_attention_heads=2,
        num_hidden_layers=1,
        max_position_embeddings=longest,
        rope_parameters=dict(parameters),
    )


@pytest.mark.parametrize("length", [100, 9000])
@pytest.mark.parametrize(("longest", "parameters"), AT_FULL_SIZE.values(), ids=AT_FULL_SIZE)
def test_frequencies_at_full_size(longest, parameters, length):
    """Of 64 pairs, for a text within the trained length and for one beyond it."""
    config = _config(longest, parameters)
    compute = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
    frequency_W, magnitude = compute(config, "cpu", seq_len=length)
    architecture = families.from_config(config, "here")
    assert architecture is not None
    rope = architecture.config.attention[0].rope
    # At position 1 the angle is the frequency; the last position gives the length.
    cos, sin = turns(rope, jnp.array([[1, length - 1]]), 64)
    np.testing.assert_allclose(np.hypot(cos, sin), magnitude, rtol=1e-6)
    # float32: a frequency is a power and a few products, each rounded by 6e-8.
    found_W = np.arctan2(sin, cos)[0, 0]
    np.testing.assert_allclose(found_W, frequency_W.numpy(), rtol=2e-6)


@pytest.mark.parametrize("interleaved", [False, True])
def test_products_depend_on_the_distance_alone(interleaved):
    """q at position t times k at position s is the same for all t with the same t - s."""
    q_C, k_C = jax.random.normal(jax.random.key(0), (2, 8))
    cos, sin = turns(Rope(theta=30.0), jnp.arange(20)[None], 4)

    def turned(x_C):
        x = jnp.broadcast_to(x_C, (1, 20, 1, 8))
        return rotate(x, cos, sin, interleaved)[0, :, 0]

    products = np.asarray(turned(q_C) @ turned(k_C).T)
    for distance in range(20):
        same = np.diagonal(products, -distance)
        np.testing.assert_allclose(same, same[0], atol=1e-5)  # float32, sums of 8 terms of about 1
    assert np.ptp(products[:, 0]) > 0.5


def test_interleaved_pairs_are_the_same_pairs_elsewhere():
    cos, sin = turns(Rope(), jnp.arange(5)[None], 4)
    x = jax.random.normal(jax.random.key(1), (1, 5, 2, 8))
    apart = jnp.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)
    halves = rotate(apart, cos, sin)
    expected = jnp.stack(jnp.split(halves, 2, axis=-1), axis=-1).reshape(x.shape)
    np.testing.assert_array_equal(rotate(x, cos, sin, interleaved=True), expected)


def test_the_rest_of_a_head_stays():
    cos, sin = turns(Rope(width=4), jnp.arange(5)[None], 2)
    x = jax.random.normal(jax.random.key(1), (1, 5, 2, 8))
    turned = rotate(x, cos, sin)
    np.testing.assert_array_equal(turned[..., 4:], x[..., 4:])
    assert (turned[:, 1:, :, :4] != x[:, 1:, :, :4]).all()


def test_no_rope_turns_nothing():
    x = jax.random.normal(jax.random.key(1), (1, 5, 2, 8))
    np.testing.assert_array_equal(rotate(x, *turns(None, jnp.arange(5)[None], 4)), x)


def test_length_is_that_of_the_row():
    """Dynamic frequencies of a short row do not move because another row is long."""
    rope = Rope(scaling="dynamic", parameters=(("factor", 2.0), ("max_position_embeddings", 8.0)))
    positions_BxT = jnp.array([[0, 0, 0, 1], [17, 18, 19, 20]])
    together = turns(rope, positions_BxT, 4)
    alone = turns(rope, positions_BxT[:1], 4)
    plain = turns(Rope(), positions_BxT, 4)
    for both, one, unscaled in zip(together, alone, plain):
        np.testing.assert_array_equal(both[:1], one)
        # A base that grew by a factor of 1.0: the same but for the rounding of the power.
        np.testing.assert_allclose(both[0], unscaled[0], atol=1e-6)
        assert (both[1] != unscaled[1]).any()


@pytest.mark.parametrize(
    ("scaling", "parameters", "said"),
    [
        ("wave", (), "unknown scaling"),
        ("linear", (), "missing a required .*argument: 'factor'"),  # Python words it in two ways
        ("linear", (("factor", 2.0), ("offset", 1.0)), "unexpected keyword argument 'offset'"),
    ],
)
def test_unknown_scalings_are_refused(scaling, parameters, said):
    with pytest.raises(JaxmergeError, match=said):
        Rope(scaling=scaling, parameters=parameters)


def test_through_json():
    rope = Rope(
        scaling="longrope",
        parameters=(
            ("factor", 4.0),
            ("long_factor", (2.0, 3.0)),
            ("original_max_position_embeddings", 16.0),
            ("short_factor", (1.0, 1.5)),
        ),
    )
    plain = json.loads(json.dumps(vars(rope)))
    assert Rope.from_plain(plain) == rope
    assert hash(Rope.from_plain(plain)) == hash(rope)
    assert set(SCALINGS) == {"default", "linear", "dynamic", "yarn", "longrope", "llama3"}
