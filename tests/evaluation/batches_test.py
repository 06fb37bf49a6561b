"""Tokens, padding and the cut into microbatches, with one token per byte."""

from collections.abc import Sequence

import numpy as np
import pytest

from jaxmerge.errors import JaxmergeError
from jaxmerge.evaluation.batches import Encoded, Limits, Microbatch, Writing, encode
from jaxmerge.evaluation.tokenizer import Bytes
from jaxmerge.tasks.requests import Generate, Likelihood, Prompt, Request, Rolling, Sampling

TOKENIZER = Bytes()


def random_texts(count: int, longest: int) -> list[str]:
    """Texts of many lengths, no two alike."""
    rng = np.random.default_rng(0)
    return [
        "".join(chr(97 + c) for c in rng.integers(26, size=rng.integers(1, longest + 1))) + f"{i}"
        for i in range(count)
    ]


def generations(*texts: str, **options) -> list[Request]:
    return [Generate(Prompt(text), 5, **options) for text in texts]


def read_back(encoded: Encoded) -> dict[int, list[tuple[str, str]]]:
    """By request: what is read and what is scored, of each of its branches."""
    found: dict[int, list[tuple[str, str]]] = {}
    for requests_BxQ, (tokens_BxT, branch_BxT, asked_BxQ, targets_BxQ), _ in encoded.scoring:
        rows = zip(requests_BxQ, tokens_BxT, branch_BxT, asked_BxQ, targets_BxQ)
        for requests, tokens, branch, asked, targets in rows:
            assert (tokens[branch < 0] == 0).all()
            assert (branch[: int((branch >= 0).sum())] >= 0).all()  # padding is at the end
            trunk = TOKENIZER.decode(tokens[branch == 0].tolist())
            for request in dict.fromkeys(requests[requests >= 0].tolist()):
                (places,) = np.nonzero(requests == request)
                # What stands before each token that is scored: the trunk's last, then the others.
                first, *others = asked[places]
                assert branch[first] == 0
                assert branch[first + 1 : first + 2] != 0
                number = set(branch[others].tolist())
                assert len(number) == (len(others) > 0)
                assert not number or (branch == number.pop()).sum() == len(others)
                assert tokens[others].tolist() == targets[places[:-1]].tolist()
                scored = TOKENIZER.decode(targets[places].tolist())
                found.setdefault(request, []).append((trunk, scored))
    return found


def test_prompts_are_padded_on_the_left():
    """Each row of the microbatches is its prompt, after as much padding as is said."""
    texts = random_texts(23, 60)
    seen = []
    (batches,) = encode(generations(*texts), TOKENIZER, Limits(rows=8)).writing.values()
    for requests_B, (tokens_BxT, padding_B, seeds_B), _ in batches:
        assert len(requests_B) == len(tokens_BxT) == len(padding_B) == len(seeds_B)
        for request, tokens, padding in zip(requests_B, tokens_BxT, padding_B):
            if request < 0:
                assert padding == len(tokens)  # filling: nothing but padding
                continue
            seen.append(request)
            assert TOKENIZER.decode(tokens[padding:].tolist()) == texts[request]
            assert (tokens[:padding] == 0).all()
    assert sorted(seen) == list(range(23))


def test_continuations_are_padded_on_the_right():
    """Each row is prompt, continuation and padding; the tokens of the continuation are scored."""
    texts = random_texts(30, 40)
    pairs = [*zip(texts[::2], texts[1::2]), ("é?", "ü"), ("shot answer ", "ß!")]
    requests: list[Request] = [Likelihood(Prompt(one), other) for one, other in pairs[:-1]]
    requests.append(Likelihood(Prompt("answer ", shots=(("shot", " "),)), "ß!", ended=True))
    encoded = encode(requests, TOKENIZER, Limits(rows=4))
    pairs[-1] = (pairs[-1][0], "ß!\n")  # a newline ends a text of bytes
    assert read_back(encoded) == {i: [pair] for i, pair in enumerate(pairs)}
    assert encoded.scored.tolist() == [len(other.encode()) for _, other in pairs]


def choices(question: str, *options: str) -> list[Request]:
    return [Likelihood(Prompt(question), option) for option in options]


def test_options_share_their_question():
    """It is read once; and all that is scored comes out as from rows of their own."""
    requests = [
        *choices("what is it? ", "a", "bcd", "ef"),
        *choices("and what is that? ", "gh", "ij", "klm"),
        *choices("what is it? ", "nop"),
    ]
    together = encode(requests, TOKENIZER, Limits())
    alone = encode(requests, TOKENIZER, Limits(), branching=False)
    assert read_back(together) == read_back(alone)
    assert together.scored.tolist() == alone.scored.tolist() == [1, 3, 2, 2, 2, 3, 3]
    assert together.read == 12 + (0 + 2 + 1 + 2) + 18 + (1 + 1 + 2)
    assert alone.read == 4 * 12 + (0 + 2 + 1 + 2) + 3 * 18 + (1 + 1 + 2)
    ((requests_BxQ, *_),) = together.scoring
    assert (requests_BxQ >= 0).any(axis=1).sum() == 2


def test_branches_do_not_outgrow_their_trunk():
    """Many continuations of next to nothing are several rows; so are more than go together."""
    requests = choices("?", *(f"{i:03}" for i in range(40)))
    encoded = encode(requests, TOKENIZER, Limits())
    rows = [row for batch in encoded.scoring for row in batch.requests if (row >= 0).any()]
    # A trunk of 1 token takes 8 tokens of branches: 4 branches, each read up to its last token.
    assert [len(set(row[row >= 0])) for row in rows] == [4] * 10
    long = choices("x" * 20, *("y" * 30 for _ in range(4)))
    rows = [row for batch in encode(long, TOKENIZER, Limits(tokens=64)).scoring for row in batch[0]]
    assert [len(set(row[row >= 0])) for row in rows] == [1] * 4


def test_generations_that_differ_in_how_they_are_written_are_apart():
    """Each kind has its program; seeds go with their rows."""
    requests = [
        *generations("a", "bb", until=("x", "")),
        *generations("c", sampling=Sampling(0.5, 0.9, seed=7)),
        *generations("d", sampling=Sampling(0.5, 0.9, seed=8)),
        Generate(Prompt("e"), 6),
    ]
    writing = encode(requests, TOKENIZER, Limits(rows=2)).writing
    assert set(writing) == {
        Writing(5, ("x",), 0.0, 1.0),
        Writing(5, (), 0.5, 0.9),
        Writing(6, (), 0.0, 1.0),
    }
    ((requests_B, (_, _, seeds_B), _),) = writing[Writing(5, (), 0.5, 0.9)]
    assert dict(zip(requests_B.tolist(), seeds_B.tolist())) == {2: 7, 3: 8}


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_only_the_last_rows_fill_up(rows):
    """No microbatch is larger than asked for, and filling stands at its end."""
    (batches,) = encode(
        generations(*random_texts(10, 20)), TOKENIZER, Limits(rows)
    ).writing.values()
    real = [int((requests_B >= 0).sum()) for requests_B, *_ in batches]
    assert sum(real) == 10
    for count, (requests_B, *_) in zip(real, batches):
        assert len(requests_B) <= rows
        assert (requests_B[:count] >= 0).all()


def test_rows_are_a_multiple_of_the_devices():
    (batches,) = encode(
        generations(*random_texts(50, 80)), TOKENIZER, Limits(rows=10, multiple=4)
    ).writing.values()
    assert all(len(requests_B) % 4 == 0 for requests_B, *_ in batches)


def test_a_microbatch_has_no_more_tokens_than_asked_for():
    """Unless a single row has."""
    limits = Limits(rows=64, tokens=512)
    (batches,) = encode(generations(*random_texts(200, 700)), TOKENIZER, limits).writing.values()
    shapes = {arrays[0].shape for _, arrays, _ in batches}
    assert all(B * T <= 512 or B == 1 for B, T in shapes)
    assert any(B == 1 and T > 512 for B, T in shapes)
    assert any(B > 4 for B, T in shapes)


def realistic_lengths() -> dict[str, np.ndarray]:
    """Lengths of prompts as tasks have them: sums, chats, code, few-shot questions."""
    rng = np.random.default_rng(0)
    return {
        "short": rng.integers(12, 20, size=192),
        "chat": np.exp(rng.normal(4.2, 0.5, size=200)).astype(int) + 30,
        "code": np.exp(rng.normal(5.0, 0.4, size=164)).astype(int),
        "few-shot": rng.normal(600, 40, size=100).astype(int),
        "all": np.exp(rng.normal(4.5, 0.9, size=1000)).astype(int) + 1,
    }


@pytest.mark.parametrize("mix", realistic_lengths())
def test_little_is_spent_on_padding(mix):
    """Under 15% of the tokens of a task are padding, rows that fill up included."""
    lengths = realistic_lengths()[mix]
    prompts = [Prompt(f"{i}".ljust(length, "x")) for i, length in enumerate(lengths)]
    batches = encode([Likelihood(prompt, "y") for prompt in prompts], TOKENIZER, Limits()).scoring
    spent = sum(arrays[0].size for _, arrays, _ in batches)
    assert 1 - lengths.sum() / spent < 0.15
    # Each shape is a program to compile.
    assert len({arrays[0].shape for _, arrays, _ in batches}) <= 6 * 8


def written_after(
    lengths: Sequence[int], new_tokens: int, *, joining: bool = True
) -> list[Microbatch]:
    """The microbatches of prompts of these lengths."""
    requests = [Generate(Prompt("x" * length), new_tokens) for length in lengths]
    (batches,) = encode(requests, TOKENIZER, Limits(), joining=joining).writing.values()
    return batches


def test_long_texts_are_written_in_few_microbatches():
    """Each step of a microbatch reads all parameters: rather padding than more steps."""
    lengths = range(40, 104)
    assert len(written_after(lengths, 1, joining=False)) > 2
    ((_, (tokens_BxT, *_), _),) = written_after(lengths, 512, joining=False)
    assert tokens_BxT.shape == (64, 104)


@pytest.mark.parametrize("new_tokens", [1, 512])
def test_joined_texts_are_written_in_one_microbatch(new_tokens):
    """Long ones pad no short ones, so that however few tokens are written, all are together."""
    ((_, (tokens_BxT, *_), parts),) = written_after(range(40, 104), new_tokens)
    assert tokens_BxT.shape == (64, 104)
    assert len(parts) > 1


def scored_together(cached: int) -> list[Microbatch]:
    """The microbatches of 64 questions of 100 characters and more."""
    requests = [Likelihood(Prompt(f"{i}".ljust(99 + i // 8, "x")), "y" * 20) for i in range(64)]
    return encode(requests, TOKENIZER, Limits(cached=cached)).scoring


def test_likelihoods_go_through_in_what_the_caches_hold():
    """Rather smaller microbatches than tokens that are slow to read; none where it is alike."""
    assert max(arrays[0].size for _, arrays, _ in scored_together(cached=0)) > 4096
    assert max(arrays[0].size for _, arrays, _ in scored_together(cached=1024)) <= 2 * 1024


def test_microbatches_of_one_width_ask_for_as_many_tokens():
    """Each shape is compiled; what is asked is padded by as little as the width is."""
    continuations = [3, 5, 9, 9, 30, 37, 38, 41]
    requests = [
        Likelihood(Prompt(f"{i}".ljust(60 - count, "x")), "y" * count)
        for i, count in enumerate(continuations)
    ]
    batches = encode(requests, TOKENIZER, Limits(rows=2)).scoring
    assert len(batches) == 4
    assert {arrays[2].shape[1] for _, arrays, _ in batches} == {44}


def read_in_parts(lengths: Sequence[int], new_tokens: int) -> int:
    """Tokens that are read before texts are written together, padding included."""
    spent, ((_, (tokens_BxT, padding_B, _), parts),) = 0, written_after(lengths, new_tokens)
    B, T = tokens_BxT.shape
    assert sum(part.rows for part in parts) == B
    end = 0
    for rows, skipped in parts:
        assert (padding_B[end : end + rows] >= skipped).all()  # nothing of a prompt is left out
        assert skipped < T
        end += rows
        spent += rows * (T - skipped)
    return spent


def test_prompts_of_unlike_length_are_read_apart():
    """And written together: of 16 that are padded to 320 tokens, 4 are read in 20."""
    lengths = [*range(300, 310), *range(16, 22)]
    assert read_in_parts(lengths, 256) == 12 * 320 + 4 * 20
    lengths = [300, *range(28, 15, -1)]  # and two rows that fill up
    assert read_in_parts(lengths, 256) == 4 * 320 + 12 * 28


def test_what_would_spare_little_is_read_together():
    """Another reading counts as 128 tokens; and a model that can't join what it read has none."""
    assert written_after([40] * 8 + [32] * 8, 256)[0].parts == ()
    assert written_after([80] * 8 + [32] * 8, 256)[0].parts == ((8, 0), (8, 48))
    assert written_after([80] * 8 + [32] * 8, 256, joining=False)[0].parts == ()


def test_few_lengths():
    """At most 8 for every doubling."""
    texts = ["x" * length for length in range(1, 513)]
    (batches,) = encode(generations(*texts), TOKENIZER, Limits(rows=1)).writing.values()
    # 4, 8, ..., 64 by 4; then 8 in each of 64-128, 128-256, 256-512.
    assert len({arrays[0].shape for _, arrays, _ in batches}) == 16 + 3 * 8


@pytest.mark.parametrize(
    "request_", [*generations(""), Likelihood(Prompt("a"), ""), Rolling("")], ids=str
)
def test_an_empty_text_is_refused(request_):
    """Nothing would be read, or nothing scored; whose it is stands in the message."""
    with pytest.raises(JaxmergeError, match="empty") as caught:
        encode([request_], TOKENIZER, Limits(), "task holes")
    assert caught.value.where == "task holes"


def test_an_empty_prompt_is_the_token_before_every_text():
    rows = read_back(encode([Likelihood(Prompt(""), "ab")], TOKENIZER, Limits()))
    assert rows == {0: [("\n", "ab")]}


def test_a_text_longer_than_the_context_is_scored_in_windows():
    """Each token once, and each but the first window's after as much as the context holds."""
    text = random_texts(1, 60)[0]
    limits = Limits(context=7)
    (rows,) = read_back(encode([Rolling(text)], TOKENIZER, limits)).values()
    rows.sort(key=lambda row: text.index(row[1]))
    assert "".join(scored for _, scored in rows) == text
    assert rows[0] == ("\n", text[:7])
    for read, scored in rows[1:]:
        assert text.index(read + scored) == text.index(scored) - len(read)
        assert len(read) + len(scored) == 8  # the last token is not read
    assert encode([Rolling(text)], TOKENIZER, limits).scored.tolist() == [len(text)]


def test_a_prompt_that_is_too_long():
    """Refused, or cut on the left, so that all that is to be written or scored has room."""
    requests = [*generations("0123456789"), Likelihood(Prompt("0123456789"), "ab")]
    for request in requests:
        with pytest.raises(JaxmergeError, match="too long") as caught:
            encode([request], TOKENIZER, Limits(context=8), "task long")
        assert "truncate" in caught.value.expected
        encode([request], TOKENIZER, Limits(context=15))
    encoded = encode(requests, TOKENIZER, Limits(context=8, truncate=True))
    ((_, (tokens_BxT, padding_B, _), _),) = next(iter(encoded.writing.values()))
    assert TOKENIZER.decode(tokens_BxT[0, padding_B[0] :].tolist()) == "789"  # and 5 are written
    assert read_back(encoded) == {1: [("3456789", "ab")]}  # 8 are read
    with pytest.raises(JaxmergeError, match="too long"):
        encode(requests, TOKENIZER, Limits(context=5, truncate=True))
