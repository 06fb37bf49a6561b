"""Generation and log-likelihoods of the decoder, and of a model that is only an `apply`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge.generate import generate, log_likelihood
from jaxmerge.models.decoder import decoder
from jaxmerge.models.model import Model, from_apply
from tests import tiny

CONFIGS = {
    "grouped, tied": tiny.DECODER,
    "multi-head, untied": dataclasses.replace(tiny.DECODER, kv_heads=4, tied_embeddings=False),
}
each_config = pytest.mark.parametrize("name", CONFIGS)
MODELS = {name: decoder(config) for name, config in CONFIGS.items()}
LENGTHS = (1, 4, 7, 8)
T, M = 8, 10  # prompts and new tokens at most
NEVER = -1  # a stop token that no model writes


@functools.cache
def make_params(name: str):
    """Random parameters, scaled so that the best token is clear."""
    return tiny.trees(1, CONFIGS[name])[0]


def prompts(padding: int = 0, width: int = T) -> tuple[jax.Array, jax.Array]:
    """Random prompts of the lengths above, padded on the left with a token."""
    rng = np.random.default_rng(0)
    tokens = np.full((len(LENGTHS), width), padding, np.int32)
    for row, length in zip(tokens, LENGTHS):
        row[width - length :] = rng.integers(256, size=length)
    return jnp.asarray(tokens), width - jnp.asarray(LENGTHS)


def run(
    model: Model, params, prompts_BxT, padding_B, *, max_new_tokens=M, stops=(NEVER,)
) -> np.ndarray:
    """The generated tokens."""
    program = jax.jit(
        functools.partial(generate, model, max_new_tokens=max_new_tokens, stops=stops)
    )
    return np.asarray(program(params, prompts_BxT, padding_B))


@functools.cache
def expected(name: str) -> np.ndarray:
    """What argmax over `apply` of everything so far writes, without a cache and without padding."""
    apply = jax.jit(MODELS[name].apply)
    tokens_BxT, padding_B = prompts()
    out = np.empty((len(LENGTHS), M), np.int32)
    for row, tokens, padding, length in zip(out, tokens_BxT, padding_B, LENGTHS):
        # Padded on the right, which a causal model does not see: one shape for all steps.
        text = np.zeros((1, T + M), np.int32)
        text[0, :length] = tokens[padding:]
        for step in range(M):
            logits_V = np.asarray(apply(make_params(name), jnp.asarray(text)))[0, length + step - 1]
            # The cache moves logits by at most 1e-5 of the largest (decoder_test): not the argmax.
            second, first = np.sort(logits_V)[-2:]
            assert first - second > 1e-4 * np.abs(logits_V).max()
            row[step] = text[0, length + step] = logits_V.argmax()
    return out


@each_config
def test_a_cache_gives_the_tokens_of_no_cache(name):
    """Prefill and decode, rows of different lengths side by side."""
    np.testing.assert_array_equal(run(MODELS[name], make_params(name), *prompts()), expected(name))
    assert len(np.unique(expected(name))) > 5  # the texts are not one token again and again


@each_config
def test_a_model_made_of_apply_gives_the_same_tokens(name):
    """`from_apply` reads everything again for each token."""
    model = from_apply(MODELS[name].apply)
    np.testing.assert_array_equal(run(model, make_params(name), *prompts()), expected(name))


@pytest.mark.parametrize(("padding", "width"), [(255, T), (0, T + 5), (17, T + 5)])
@pytest.mark.parametrize("cache", [True, False], ids=["cache", "apply"])
def test_left_padding_changes_nothing(padding, width, cache):
    """Neither how much there is nor which token it is."""
    name = "grouped, tied"
    model = MODELS[name] if cache else from_apply(MODELS[name].apply)
    found = run(model, make_params(name), *prompts(padding, width))
    np.testing.assert_array_equal(found, expected(name))


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "apply"])
def test_rows_stop_at_the_stop_token(cache):
    """Each on its own: what comes before is unchanged, the token and all after it are the stop."""
    name = "grouped, tied"
    model = MODELS[name] if cache else from_apply(MODELS[name].apply)
    free = expected(name)
    # A token that is neither the first of any row nor in all of them.
    stop = next(
        token
        for token in free[:, 1:].ravel().tolist()
        if token not in free[:, 0] and not (free == token).any(axis=1).all()
    )
    found = run(model, make_params(name), *prompts(), stops=(stop,))
    ends = [list(row).index(stop) if stop in row else M for row in free]
    assert 0 < min(ends) < max(ends) == M
    for row, unstopped, end in zip(found, free, ends):
        np.testing.assert_array_equal(row[:end], unstopped[:end])
        assert (row[end:] == stop).all()


def test_the_first_token_may_be_the_stop():
    """Then the row is all stop, and one token more changes nothing."""
    name = "grouped, tied"
    stop = int(expected(name)[2, 0])
    found = run(MODELS[name], make_params(name), *prompts(), stops=(stop,))
    assert (found[2] == stop).all()
    one = run(MODELS[name], make_params(name), *prompts(), stops=(stop,), max_new_tokens=1)
    np.testing.assert_array_equal(one, found[:, :1])


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "apply"])
def test_rows_that_are_all_padding_write_nothing(cache):
    """Whatever the padding holds; their neighbours are as they would be without them."""
    name = "grouped, tied"
    model = MODELS[name] if cache else from_apply(MODELS[name].apply)
    tokens_BxT, padding_B = prompts()
    stop = int(expected(name)[1, 3])
    filled = run(
        model,
        make_params(name),
        tokens_BxT.at[0].set(65),
        padding_B.at[0].set(T),
        stops=(stop,),
    )
    assert (filled[0] == stop).all()
    full = run(model, make_params(name), tokens_BxT, padding_B, stops=(stop,))
    np.testing.assert_array_equal(filled[1:], full[1:])


def countdown(calls: list[int]) -> Model:
    """A model whose row writes the last token of its prompt, one less each time, down to 0."""

    def logits(tokens_B):
        return jax.nn.one_hot(tokens_B, 256)

    def prefill(params, tokens_BxT, padding_B, slots):
        return logits(tokens_BxT[:, -1]), tokens_BxT[:, -1]

    def decode(params, tokens_B, state):
        jax.debug.callback(lambda step: calls.append(int(step)), jnp.max(state))
        return logits(jnp.maximum(state - 1, 0)), state - 1

    return Model(
        apply=lambda *_: jnp.zeros(()),
        prefill=prefill,
        decode=decode,
        rows=lambda state, rows_N: state[rows_N],
    )


@pytest.mark.parametrize(
    ("last", "max_new_tokens", "decodes"),
    [
        ([0, 0], 6, 0),  # the first tokens are stops: no token is decoded
        ([1, 0], 6, 1),
        ([2, 3], 6, 3),  # 3, 2, 1, 0: the slowest row decides
        ([9, 0], 6, 5),  # the first token comes from prefill
        ([9, 9], 1, 0),
    ],
)
def test_it_ends_when_every_row_has_stopped(last, max_new_tokens, decodes):
    """Counted in a model that says when it decodes."""
    calls: list[int] = []
    tokens_BxT = jnp.array([[7, 7, token] for token in last])
    found = run(
        countdown(calls),
        {},
        tokens_BxT,
        jnp.zeros(2, int),
        max_new_tokens=max_new_tokens,
        stops=(0,),
    )
    jax.effects_barrier()
    assert len(calls) == decodes
    for row, token in zip(found, last):
        assert row.tolist() == [max(token - step, 0) for step in range(max_new_tokens)]


@functools.cache
def likelihood_rows() -> tuple[jax.Array, jax.Array]:
    """Tokens, and which are scored: some, all of a row, none of a row, position 0 too."""
    rng = np.random.default_rng(3)
    tokens_BxT = rng.integers(256, size=(4, 9)).astype(np.int32)
    scored_BxT = rng.random((4, 9)) < 0.5
    scored_BxT[1], scored_BxT[2] = True, False
    return jnp.asarray(tokens_BxT), jnp.asarray(scored_BxT)


@each_config
def test_log_likelihood_equals_float64(name):
    """The sum of log softmax over the scored tokens, from the model's own logits."""
    tokens_BxT, scored_BxT = likelihood_rows()
    params, model = make_params(name), MODELS[name]
    scored = jax.jit(functools.partial(log_likelihood, model))(params, tokens_BxT, scored_BxT)
    found_B = scored.nats_B
    logits = np.asarray(jax.jit(model.apply)(params, tokens_BxT[:, :-1]), np.float64)
    peak = logits.max(axis=-1, keepdims=True)
    log_p = logits - peak - np.log(np.exp(logits - peak).sum(axis=-1, keepdims=True))
    exact_B = [
        sum(log_p[b, t - 1, tokens_BxT[b, t]] for t in range(1, 9) if scored_BxT[b, t])
        for b in range(4)
    ]
    # 8 terms, each a difference of two numbers as large as the logits, rounded a few times in
    # float32; and the logits of two programs, which differ by some 10 roundings.
    atol = 8 * 16 * 2**-24 * np.abs(logits).max()
    np.testing.assert_allclose(found_B, exact_B, rtol=0, atol=atol)
    assert found_B[2] == 0
    assert found_B.dtype == jnp.float32


def test_what_is_not_scored_does_not_count():
    """Position 0, which nothing comes before; and right padding, whatever it holds."""
    name = "grouped, tied"
    scored = jax.jit(functools.partial(log_likelihood, MODELS[name]))

    def program(*arguments):
        return scored(*arguments).nats_B

    tokens_BxT, scored_BxT = likelihood_rows()
    found_B = program(make_params(name), tokens_BxT, scored_BxT)
    first = scored_BxT.at[:, 0].set(~scored_BxT[:, 0])
    np.testing.assert_array_equal(program(make_params(name), tokens_BxT, first), found_B)
    ends = scored_BxT.at[:, 6:].set(False)
    short_B = program(make_params(name), tokens_BxT, ends)
    other = tokens_BxT.at[:, 6:].add(1) % 256
    np.testing.assert_array_equal(program(make_params(name), other, ends), short_B)
    assert (short_B[:2] != found_B[:2]).all()
