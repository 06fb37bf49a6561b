"""Requests answered by several models at once, against one model and one request at a time."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmerge.evaluation.batches import Limits, Microbatch
from jaxmerge.evaluation.generate import Draw, generate, stop_states
from jaxmerge.evaluation.respond import Responder
from jaxmerge.evaluation.tokenizer import Bytes
from jaxmerge.sharding import make_mesh, shardings
from jaxmerge.tasks.requests import (
    Generate,
    Likelihood,
    Likely,
    Prompt,
    Response,
    Rolling,
    Sampling,
)
from tests import tiny


class Latin(Bytes):
    """One token per character of Latin-1, so that whatever is written is a text."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode("latin-1"))

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode("latin-1")

    def pieces(self, first: bool = False) -> list[bytes]:
        return [chr(token).encode() for token in range(256)]


MODEL, TREES, TOKENIZER = tiny.model(), tiny.trees(3), Latin()
UNSURE = jax.tree.map(lambda leaf: leaf / 3, TREES[0])  # many tokens have some probability
MERGED = jax.tree.map(lambda *leaves: jnp.stack(leaves), *TREES)


def responder(**limits) -> Responder:
    return Responder(MODEL, TOKENIZER, make_mesh(), Limits(rows=4)._replace(**limits))


apply = jax.jit(MODEL.apply)


def logits(tree, tokens: list[int]) -> np.ndarray:
    """After each token; all in one shape, which is compiled once."""
    row = jnp.array([tokens + [0] * (64 - len(tokens))])
    return np.asarray(apply(tree, row)[0, : len(tokens)], np.float64)


def free_text(tree, prompt: str, count: int) -> list[int]:
    """Greedy tokens, each from the whole text before it; a newline does not end it."""
    tokens = list(prompt.encode())
    for _ in range(count):
        tokens.append(int(logits(tree, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def log_p(tree, tokens: list[int], count: int) -> list[float]:
    """Log-probabilities of the last tokens."""
    rated = logits(tree, tokens)
    each = rated - np.log(np.exp(rated).sum(-1, keepdims=True))
    return [each[t - 1, tokens[t]] for t in range(len(tokens) - count, len(tokens))]


def test_requests_of_all_kinds_at_once():
    """Each response stands in the place of its request, for each model."""
    requests = [
        Likelihood(Prompt("abc"), "de"),
        Generate(Prompt("hello"), 5),
        Rolling("the end"),
        Generate(Prompt("hi"), 5),
        Likelihood(Prompt("q"), "r", ended=True),
    ]
    for tree, answers in zip(TREES, responder()(MERGED, requests)):
        scored = [
            (log_p(tree, list(b"abcde"), 2), 2),
            (log_p(tree, list(b"\nthe end"), 7), 7),
            (log_p(tree, list(b"qr\n"), 2), 2),
        ]
        found = [answers[0], answers[2], answers[4]]
        for (nats, tokens), likely in zip(scored, found):
            assert isinstance(likely, Likely)
            assert likely.tokens == tokens
            # A few roundings of logits of size 30 in each term.
            assert likely.nats == pytest.approx(sum(nats), abs=tokens * 1e-4)
        for place, prompt in ((1, "hello"), (3, "hi")):
            assert answers[place] == TOKENIZER.decode(free_text(tree, prompt, 5)).split("\n")[0]


def test_a_text_of_several_windows_is_summed():
    text = "abcdefghijklm"
    (answer,) = responder(context=5)(MERGED, [Rolling(text)])[0]
    rows = [("\n", text[:5]), (text[4], text[5:10]), (text[7:10], text[10:])]
    expected = sum(
        sum(log_p(TREES[0], list((read + scored).encode()), len(scored))) for read, scored in rows
    )
    assert isinstance(answer, Likely)
    assert answer.nats == pytest.approx(expected, abs=13e-4)
    assert answer.tokens == 13


def test_greedy_says_whether_each_token_is_the_likeliest():
    best = TOKENIZER.decode(free_text(TREES[1], "abc", 3)[:1])
    other = chr((ord(best) + 1) % 128)
    answers = responder()(MERGED, [Likelihood(Prompt("abc"), text) for text in (best, other)])[1]
    assert [likely.greedy for likely in answers if isinstance(likely, Likely)] == [True, False]


def test_a_model_whose_logits_are_not_finite_is_the_worst():
    """Infinite parameters, as of weights far outside the simplex: a number that loses."""
    broken = jax.tree.map(lambda leaf: leaf * jnp.inf, MERGED)
    ((likely,), *_) = responder()(broken, [Likelihood(Prompt("abc"), "de")])
    assert likely == Likely(-1e9, False, 2)


@functools.cache
def long_text() -> str:
    """What the first model writes in 40 tokens, up to a newline."""
    (text,) = responder()(MERGED, [Generate(Prompt("once"), 40)])[0]
    assert isinstance(text, str)
    assert len(text) > 20
    return text


def test_a_stop_text_ends_a_generation():
    """Wherever it stands, also several tokens long; the text ends before it."""
    text = long_text()
    for begin, length in ((0, 1), (3, 2), (7, 5), (11, 9)):
        stop = text[begin : begin + length]
        for until in ((stop,), ("never there", stop), (stop, stop[:1] + "never")):
            (cut,) = responder()(MERGED, [Generate(Prompt("once"), 40, until)])[0]
            assert cut == text[: text.index(stop)]


def test_a_stop_text_ends_the_work_too():
    """After the token that completes it, a row has nothing but stops."""
    text = long_text()
    prompt = jnp.array([list(b"once")])
    following = jnp.asarray(stop_states([text[4:7]], *2 * [TOKENIZER.pieces()]))
    end = text.index(text[4:7]) + 3
    run = functools.partial(generate, MODEL, max_new_tokens=40, stops=(10,))
    row = jax.jit(run)(TREES[0], prompt, jnp.zeros(1, int), None, following)[0].tolist()
    assert row == [*TOKENIZER.encode(text[:end]), *[10] * (40 - end)]


def test_tokens_are_counted_without_padding():
    """Read: prompts, and all of a scored row but its last. Written: what comes before the end."""
    requests = [
        *(Generate(Prompt(text), 9, until=("e",)) for text in ("hello", "a", "question")),
        Likelihood(Prompt("abc"), "de"),
        Rolling("the end"),
    ]
    asked = responder()
    prepared = asked.prepare(requests)
    assert prepared.read == (5 + 1 + 8) + (5 - 1) + (1 + 7 - 1)
    answers = asked.answers(prepared, asked.launch(prepared, MERGED), 3)
    for tree, written in zip(TREES, answers.written_C):
        expected = 0
        for text in ("hello", "a", "question"):
            tokens = free_text(tree, text, 9)
            ends = [i for i, t in enumerate(tokens) if t in TOKENIZER.stops]
            stops = [i + 1 for i, t in enumerate(tokens) if t == ord("e")]  # it is written itself
            expected += min([9, *ends, *stops])
        assert written == expected


def test_the_automaton_finds_what_python_finds():
    """Random texts over three letters, cut into random tokens of 0 to 3 letters."""
    rng = np.random.default_rng(0)
    pieces = [b""] + [bytes(p) for n in (1, 2, 3) for p in np.ndindex(*[3] * n)]
    pieces = [bytes(97 + c for c in piece) for piece in pieces]
    until = ["abcab", "ccab", "bacac"]
    following = stop_states(until, pieces, pieces)
    last = len(following) - 1
    found = 0
    for _ in range(500):
        tokens = rng.integers(len(pieces), size=5)
        state, text = 0, ""
        for token in tokens:
            state, text = following[state, token], text + pieces[token].decode()
            assert (state == last) == any(stop in text for stop in until)
        found += state == last
    assert 50 < found < 450


def test_a_space_that_is_dropped_at_the_beginning_is_no_part_of_a_stop_text():
    pieces = [b" a", b"a", b"b"]
    following = stop_states([" ab"], pieces, [piece.removeprefix(b" ") for piece in pieces])
    last = len(following) - 1
    for tokens, stopped in (([0, 2], False), ([0, 0, 2], True), ([1, 0, 2], True), ([1, 2], False)):
        state = 0
        for token in tokens:
            state = following[state, token]
        assert (state == last) == stopped


def draw(seeds: list[int], count: int = 5, **options) -> np.ndarray:
    B = len(seeds)
    prompts = jnp.tile(jnp.array([list(b"once")]), (B, 1))
    options = {"temperature": 1.0, "top_p": 1.0, **options}
    run = functools.partial(
        generate, MODEL, max_new_tokens=count, stops=(10,), draw=Draw(**options)
    )
    tokens = jax.jit(run)(UNSURE, prompts, jnp.zeros(B, int), jnp.array(seeds, jnp.int32))
    return np.asarray(tokens)


def probabilities() -> np.ndarray:
    """Of the first token, by the model that `draw` draws from."""
    return np.asarray(jax.nn.softmax(logits(UNSURE, list(b"once"))[-1]))


def test_a_seed_writes_the_same_text_whatever_else_is_in_the_batch():
    alone = [draw([seed])[0].tolist() for seed in (5, 6, 7)]
    together = draw([6, 7, 5, 9]).tolist()
    assert together[:3] == [alone[1], alone[2], alone[0]]
    assert len({tuple(row) for row in together}) == 4


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_are_drawn_by_their_probability(temperature):
    p_V = probabilities() ** (1 / temperature)
    p_V /= p_V.sum()
    counts_V = np.bincount(draw(list(range(4000)), 1, temperature=temperature)[:, 0], minlength=256)
    # Each count is binomial: six standard deviations for each of 256.
    assert (np.abs(counts_V - 4000 * p_V) < 6 * np.sqrt(4000 * p_V * (1 - p_V)) + 1).all()


def test_top_p_keeps_the_likeliest():
    """The fewest tokens whose probabilities reach it, drawn among themselves as before."""
    p_V = probabilities()
    order = np.argsort(-p_V)
    kept = order[: int(np.searchsorted(np.cumsum(p_V[order]), 0.3)) + 1]
    drawn = draw(list(range(4000)), 1, top_p=0.3)[:, 0]
    assert set(drawn.tolist()) == set(kept.tolist())
    share = p_V[kept] / p_V[kept].sum()
    counts = np.array([(drawn == token).sum() for token in kept])
    assert (np.abs(counts - 4000 * share) < 6 * np.sqrt(4000 * share * (1 - share)) + 1).all()


def test_sampling_goes_through():
    """The request's seed decides, and a temperature near 0 is greedy."""
    asked = [Generate(Prompt("once"), 8, (), Sampling(1.0, 1.0, seed)) for seed in (1, 2, 1)] + [
        Generate(Prompt("once"), 8, (), Sampling(1e-4, 1.0, 3)),
        Generate(Prompt("once"), 8),
    ]
    flat = jax.tree.map(lambda leaf: leaf / 3, MERGED)
    one, other, again, cold, greedy = responder()(flat, asked)[0]
    assert one == again != other
    assert cold == greedy


@pytest.mark.parametrize(
    "sizes", [{"tensor": 2}, {"fsdp": 2}, {"pop": 2, "tensor": 2, "fsdp": 2}], ids=str
)
def test_prompts_that_are_read_apart_on_a_mesh(sizes):
    """The caches of the parts are joined where they lie: the same texts as on one device."""
    short_and_long = [
        Generate(Prompt(f"{i}".ljust(width, "x")), 6) for width in (24, 80) for i in range(8)
    ]

    def texts(mesh: Mesh) -> list[tuple[Response, ...]]:
        everywhere = Responder(MODEL, Bytes(), mesh, Limits())
        (group,) = everywhere.encode(short_and_long).groups
        assert [len(each.parts) for each in group.microbatches if isinstance(each, Microbatch)] == [
            2
        ]
        merged = jax.tree.map(
            lambda where, *leaves: jax.device_put(
                np.stack(leaves), NamedSharding(mesh, PartitionSpec("pop", *where.spec))
            ),
            shardings(TREES[0], MODEL.sharding_rules, mesh),
            *TREES[:2],
        )
        return everywhere(merged, short_and_long)

    assert texts(make_mesh(**sizes)) == texts(make_mesh())
