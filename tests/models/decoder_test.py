"""The decoder against a NumPy float64 one, and its variants against each other."""

import dataclasses
import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge.errors import JaxmergeError
from jaxmerge.models.architecture import AttentionKind, DecoderConfig
from jaxmerge.models.decoder import decoder, described
from jaxmerge.models.rope import Rope
from jaxmerge.trees import PyTree, named_leaves
from tests import tiny

GROUPED = tiny.DECODER
CONFIGS = {
    "grouped, tied": GROUPED,
    "grouped, untied": dataclasses.replace(GROUPED, tied_embeddings=False),
    "multi-head, tied": dataclasses.replace(GROUPED, kv_heads=4),
    "multi-query, untied": dataclasses.replace(GROUPED, kv_heads=1, tied_embeddings=False),
    "three layers": dataclasses.replace(
        GROUPED, layers=3, attention=(AttentionKind(rope=Rope(100.0)),), norm_epsilon=1e-2
    ),
}
OF_EXPERTS = dataclasses.replace(GROUPED, experts=4, experts_per_token=2)
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
TOKENS_BxT = jax.random.randint(jax.random.key(1), (3, 10), 0, 256)


@functools.cache
def make_params(config: DecoderConfig) -> PyTree:
    """Random parameters of a decoder; the scales of norms are not 1 either."""
    rng = np.random.default_rng(5)
    (params,) = tiny.trees(1, config)
    return jax.tree.map(lambda x: x + np.float32(0.1 * rng.normal(size=x.shape)), params)


@functools.cache
def compiled_apply(config: DecoderConfig) -> Callable[[PyTree, jax.Array], jax.Array]:
    """Compiled once for all tests."""
    return jax.jit(decoder(config).apply)


def reference(config: DecoderConfig, params: PyTree, tokens_T: np.ndarray) -> np.ndarray:
    """Logits of one sequence in float64, one head and one layer at a time."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    T, C, rope = len(tokens_T), config.head_width, config.attention[0].rope
    assert rope is not None
    angle_TxC = np.arange(T)[:, None] / rope.theta ** (np.arange(C // 2) / (C // 2))
    turn_TxC = np.exp(1j * angle_TxC)

    def norm(x_TxD, scale):
        return x_TxD / np.sqrt((x_TxD**2).mean(-1, keepdims=True) + config.norm_epsilon) * scale

    def turned(x_TxC):
        z = (x_TxC[:, : C // 2] + 1j * x_TxC[:, C // 2 :]) * turn_TxC
        return np.concatenate([z.real, z.imag], axis=1)

    x_TxD = params["embedding"][tokens_T]
    for layer in range(config.layers):
        p = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["layers"])
        y_TxD = norm(x_TxD, p["attention_norm"]["scale"])
        for head in range(config.heads):
            shared = head * config.kv_heads // config.heads
            q_TxC = turned(y_TxD @ p["query"][head].T)
            k_TxC = turned(y_TxD @ p["key"][shared].T)
            logits_TxT = np.where(np.tri(T), q_TxC @ k_TxC.T / np.sqrt(C), -np.inf)
            weights_TxT = np.exp(logits_TxT - logits_TxT.max(1, keepdims=True))
            weights_TxT /= weights_TxT.sum(1, keepdims=True)
            x_TxD = x_TxD + weights_TxT @ (y_TxD @ p["value"][shared].T) @ p["out"][:, head].T
        y_TxD = norm(x_TxD, p["feed_forward_norm"]["scale"])
        gate_TxF = y_TxD @ p["gate"].T
        x_TxD = x_TxD + (gate_TxF / (1 + np.exp(-gate_TxF)) * (y_TxD @ p["up"].T)) @ p["down"].T
    x_TxD = norm(x_TxD, params["final_norm"]["scale"])
    return x_TxD @ params["embedding" if config.tied_embeddings else "unembedding"].T


@each_config
def test_logits_equal_the_reference(config):
    """Every part of the architecture, computed independently."""
    params = make_params(config)
    logits_BxTxV = compiled_apply(config)(params, TOKENS_BxT)
    assert logits_BxTxV.dtype == jnp.float32
    for tokens_T, logits_TxV in zip(np.asarray(TOKENS_BxT), np.asarray(logits_BxTxV)):
        expected = reference(config, params, tokens_T)
        # float32 through 2 or 3 layers of sums of up to 32 terms. Half of all draws of the tokens
        # stay within 4e-6 of the largest logit; where attention is sharp, roundings grow: of 25
        # draws the worst was 4.2e-5.
        np.testing.assert_allclose(logits_TxV, expected, rtol=0, atol=5e-5 * np.abs(expected).max())


@each_config
def test_causal(config):
    """Logits at t do not move when a later token does; those from there on do."""
    apply = compiled_apply(config)
    params = make_params(config)
    before = apply(params, TOKENS_BxT)
    for t in (1, 9):
        after = apply(params, TOKENS_BxT.at[:, t].add(1))
        np.testing.assert_array_equal(before[:, :t], after[:, :t])
        assert (before[:, t:] != after[:, t:]).any(axis=-1).all()


@pytest.mark.parametrize("layerwise", [False, True])
@each_config
def test_prefill_and_decode_give_the_logits_of_apply(config, layerwise):
    """Token by token with a cache, rows padded on the left by different amounts."""
    model, params = decoder(config, layerwise=layerwise), make_params(config)
    B, T = TOKENS_BxT.shape
    expected = np.asarray(compiled_apply(config)(params, TOKENS_BxT))
    start, padding_B = 5, np.array([0, 1, 4])
    # Row b holds its first 5 - padding tokens; what stands in the padding must not matter.
    prompts = np.full((B, start), 99, np.int32)
    for row, tokens, padding in zip(prompts, np.asarray(TOKENS_BxT), padding_B):
        row[padding:] = tokens[: start - padding]
    decode = jax.jit(model.decode)
    logits, state = jax.jit(model.prefill, static_argnums=3)(
        params, jnp.asarray(prompts), jnp.asarray(padding_B), T
    )
    # The sums are the same as in apply but for masked slots: float32 roundings, as above.
    atol = 1e-5 * np.abs(expected).max()
    rows = np.arange(B)
    for t in range(start, T):
        np.testing.assert_allclose(logits, expected[rows, t - 1 - padding_B], rtol=0, atol=atol)
        tokens_B = np.asarray(TOKENS_BxT)[rows, t - padding_B]
        logits, state = decode(params, jnp.asarray(tokens_B), state)
    np.testing.assert_allclose(logits, expected[rows, T - 1 - padding_B], rtol=0, atol=atol)


def test_untied_with_the_embedding_as_unembedding_is_tied():
    """The same bits: the same matrix is used the same way."""
    tied, untied = CONFIGS["grouped, tied"], CONFIGS["grouped, untied"]
    params = make_params(tied)
    both = {**params, "unembedding": params["embedding"]}
    expected = compiled_apply(tied)(params, TOKENS_BxT)
    np.testing.assert_array_equal(compiled_apply(untied)(both, TOKENS_BxT), expected)
    both["unembedding"] = -params["embedding"]
    np.testing.assert_array_equal(compiled_apply(untied)(both, TOKENS_BxT), -expected)


@each_config
def test_init(config):
    """Every parameter of a layer has the leading axis L, and no two layers are alike."""
    init = decoder(config).init
    assert init is not None
    params = jax.jit(init)(jax.random.key(0))
    D, L, H, J, C, F = (
        *(config.width, config.layers, config.heads),
        *(config.kv_heads, config.head_width, config.feed_forward),
    )
    expected = {
        "embedding": (256, D),
        "final_norm/scale": (D,),
        "layers/attention_norm/scale": (L, D),
        "layers/down": (L, D, F),
        "layers/feed_forward_norm/scale": (L, D),
        "layers/gate": (L, F, D),
        "layers/key": (L, J, C, D),
        "layers/out": (L, D, H, C),
        "layers/query": (L, H, C, D),
        "layers/up": (L, F, D),
        "layers/value": (L, J, C, D),
    }
    if not config.tied_embeddings:
        expected["unembedding"] = (256, D)
    leaves = named_leaves(params)
    assert {name: leaf.shape for name, leaf in leaves.items()} == expected
    for name, leaf in leaves.items():
        assert leaf.dtype == jnp.float32
        if not name.endswith("scale"):
            layers = np.asarray(leaf).reshape(len(leaf), -1)
            assert len(np.unique(layers, axis=0)) == len(layers), name


def test_bfloat16_stays_bfloat16():
    """Parameters decide the dtype of the cache; logits are float32 whatever they are."""
    model = decoder(GROUPED)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), make_params(GROUPED))
    logits, state = model.prefill(params, TOKENS_BxT, jnp.zeros(3, jnp.int32), 12)
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(state.cache)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("read", ["apply", "branches", "decode"])
@pytest.mark.parametrize("config", [GROUPED, OF_EXPERTS], ids=["dense", "experts"])
def test_bfloat16_is_summed_in_float32(config, read):
    """Else XLA makes float32 copies of all weights on CPUs."""
    model = decoder(config, layerwise=read == "decode")
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), make_params(config))
    assert model.branches
    branches = functools.partial(model.branches, asked_BxQ=jnp.ones((3, 2), jnp.int32))

    def read_and_written(params):
        logits, state = model.prefill(params, TOKENS_BxT, jnp.zeros(3, jnp.int32), 12)
        return model.decode(params, jnp.argmax(logits, axis=-1), state)

    programs = {
        "apply": lambda params: model.apply(params, TOKENS_BxT),
        "branches": lambda params: branches(params, TOKENS_BxT, TOKENS_BxT * 0),
        "decode": read_and_written,
    }
    text = str(jax.make_jaxpr(programs[read])(params))
    made = re.findall(r"(\w+)\[[\d,]*\] = dot_general\[", text)
    assert len(made) >= 9
    assert set(made) == {"f32"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kv_heads": 3}, "kv_heads must divide heads"),
        ({"kv_heads": 8}, "kv_heads must divide heads"),
        ({"head_width": 5}, "head_width must be even"),
    ],
)
def test_impossible_shapes_are_refused(change, said):
    """When the config is made, with the numbers."""
    with pytest.raises(JaxmergeError, match=said) as caught:
        dataclasses.replace(GROUPED, **change)
    ((name, value),) = change.items()
    assert f"{name}={value}" in caught.value.found


def test_architecture_describes_the_config():
    """What is written beside a checkpoint gives the same decoder again."""
    architecture = dict(decoder(GROUPED).architecture)
    assert described(architecture) is decoder(GROUPED)
    assert architecture.pop("model") == "decoder"
    assert DecoderConfig.from_plain(architecture) == GROUPED


@pytest.mark.parametrize("architecture", [{}, {"model": "mine:build"}, {"model_type": "gpt2"}])
def test_what_describes_no_decoder_is_refused(architecture):
    with pytest.raises(JaxmergeError, match="does not say") as caught:
        described(architecture)
    assert caught.value.found == str(architecture)
