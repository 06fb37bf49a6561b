"""Generation and log-likelihoods of the decoder, and of a model that is only an `apply`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge.evaluation.generate import _likeliest, generate, log_likelihood
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


def test_the_likeliest_token():
    """The first of those that are as likely; a token, too, where a logit is no number."""
    nan, inf = float("nan"), float("inf")
    logits_BxV = [[0, 2, 1, 2], [-1, -1, -1, -1], [-inf, -inf, -3, -inf], [inf, 0, inf, 0]]
    found = _likeliest(jnp.asarray(logits_BxV, jnp.float32))
    assert found.tolist() == np.argmax(logits_BxV, axis=-1).tolist() == [1, 0, 2, 0]
    assert found.dtype == jnp.int32
    assert _likeliest(jnp.array([[0, nan, 5, 1]])).tolist() == [3]


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


@pytest.mark.parametrize("parts", [((2, 4), (2, 0)), ((1, 7), (1, 2), (2, 0))], ids=str)
@pytest.mark.parametrize("how", ["scan", "layerwise", "apply"])
def test_rows_read_apart_write_the_same(how, parts):
    """Those of which less padding is read, too, and rows that leave the batch afterwards."""
    name = "grouped, tied"
    model = {
        "scan": MODELS[name],
        "layerwise": decoder(CONFIGS[name], layerwise=True),
        "apply": from_apply(MODELS[name].apply),
    }[how]
    options = {"max_new_tokens": M, "stops": (int(expected(name)[1, 3]),)}
    arguments = make_params(name), *prompts(255)
    whole = jax.jit(functools.partial(generate, MODELS[name], **options))(*arguments)
    apart = jax.jit(functools.partial(generate, model, **options, parts=parts, rows=(3, 1)))
    np.testing.assert_array_equal(apart(*arguments), whole)


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


B, Q = 4, 6
BRANCHES = {  # two trunks with branches of several lengths, one row without, and one all padding
    0: ([0, 0, 0, 1, 1, 2, 2, 2, 3, -1], [2, 3, 2, 5, 7, 8]),
    1: ([0, 1, 2, 2, 2, 2, 2, -1, -1, -1], [0, 1, 0, 6, 4, 0]),
    2: ([0, 0, 0, 0, 0, 0, 0, 0, 0, 0], [0, 1, 4, 4, 9, 3]),
    3: ([-1] * 10, [0] * 6),
}


@functools.cache
def likelihood_rows() -> tuple[jax.Array, ...]:
    """Tokens, their branches, the places that are asked for, and what is looked for there."""
    rng = np.random.default_rng(3)
    tokens_BxT = rng.integers(256, size=(B, 10)).astype(np.int32)
    branch_BxT, asked_BxQ = (np.array(each, np.int32) for each in zip(*BRANCHES.values()))
    targets_BxQ = rng.integers(256, size=(B, Q)).astype(np.int32)
    return tuple(map(jnp.asarray, (tokens_BxT, branch_BxT, asked_BxQ, targets_BxQ)))


@each_config
def test_log_likelihood_equals_float64(name):
    """log softmax of what `apply` says when a token's trunk and branch stand there alone."""
    tokens_BxT, branch_BxT, asked_BxQ, targets_BxQ = map(np.asarray, likelihood_rows())
    params, model = make_params(name), MODELS[name]
    found = jax.jit(functools.partial(log_likelihood, model))(params, *likelihood_rows())
    apply = jax.jit(model.apply)
    for b in range(3):
        for q, (place, target) in enumerate(zip(asked_BxQ[b], targets_BxQ[b])):
            line = [t for t in range(place + 1) if branch_BxT[b, t] in (0, branch_BxT[b, place])]
            alone = np.zeros((1, 10), np.int32)  # padded on the right, which it does not see
            alone[0, : len(line)] = tokens_BxT[b, line]
            logits_V = np.asarray(apply(params, alone)[0, len(line) - 1], np.float64)
            peak = logits_V.max()
            expected = logits_V[target] - peak - np.log(np.exp(logits_V - peak).sum())
            # The logits of two programs differ by at most 1e-5 of the largest (decoder_test), and
            # the difference of two is rounded a few times in float32.
            atol = 3e-5 * np.abs(logits_V).max()
            np.testing.assert_allclose(found.nats_BxQ[b, q], expected, rtol=0, atol=atol)
            assert found.greedy_BxQ[b, q] == (target == logits_V.argmax())
    assert found.nats_BxQ.dtype == jnp.float32


def test_greedy_is_the_likeliest_token():
    """Looked for in the place of each, the likeliest tokens are greedy, all of them."""
    model, params = MODELS["grouped, tied"], make_params("grouped, tied")
    tokens_BxT, branch_BxT, asked_BxQ, _ = likelihood_rows()
    assert model.branches is not None
    best_BxQ = jnp.argmax(model.branches(params, tokens_BxT, branch_BxT, asked_BxQ), axis=-1)
    scored = functools.partial(log_likelihood, model, params, tokens_BxT, branch_BxT, asked_BxQ)
    assert scored(best_BxQ).greedy_BxQ.all()
    assert not scored((best_BxQ + 1) % 256).greedy_BxQ.any()


def test_a_model_made_of_apply_gives_the_same_log_likelihoods():
    """Of rows without branches: it reads whatever stands before."""
    model = MODELS["grouped, tied"]
    tokens_BxT, branch_BxT, asked_BxQ, targets_BxQ = likelihood_rows()
    rows = (tokens_BxT, jnp.zeros_like(branch_BxT), asked_BxQ, targets_BxQ)
    params = make_params("grouped, tied")
    found, expected = (
        log_likelihood(each, params, *rows).nats_BxQ for each in (from_apply(model.apply), model)
    )
    # Two programs, as above; logits are up to 60.
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "apply"])
@pytest.mark.parametrize("rows", [(3,), (3, 1), (2, 0), (0,)], ids=str)
def test_rows_that_are_finished_leave_the_batch(cache, rows):
    """The texts are the same, wherever the rows stand that go on."""
    name = "grouped, tied"
    model = MODELS[name] if cache else from_apply(MODELS[name].apply)
    prompts_BxT, padding_B = prompts()
    # The stop makes rows of different lengths, see test_rows_stop_at_the_stop_token.
    free = expected(name)
    for stop in dict.fromkeys(free[:, 1:].ravel().tolist()):
        lengths = [list(row).index(stop) if stop in row else M for row in free]
        if len(set(lengths)) > 2:
            break
    else:
        pytest.fail("no token ends rows at different times")
    options = {"max_new_tokens": M, "stops": (stop,)}
    whole = jax.jit(functools.partial(generate, model, **options))
    shrinking = jax.jit(functools.partial(generate, model, **options, rows=rows))
    arguments = make_params(name), prompts_BxT, padding_B
    np.testing.assert_array_equal(shrinking(*arguments), whole(*arguments))
