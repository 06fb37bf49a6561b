"""A real model: SmolLM2-135M-Instruct, converted from its package, against transformers."""

import fcntl
import functools
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from jaxmerge.checkpoints import huggingface, orbax
from jaxmerge.checkpoints.pool import load
from jaxmerge.evaluation.generate import generate
from jaxmerge.evaluation.tokenizer import Pretrained
from jaxmerge.lm_eval_model import JaxmergeLM
from jaxmerge.models.architecture import DecoderConfig
from jaxmerge.models.decoder import decoder
from jaxmerge.sharding import make_mesh
from jaxmerge.tasks import TASKS
from jaxmerge.tasks.requests import Prompt

ROOT = Path(__file__).parents[2]
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The model as tools/smollm2.py makes it, in bfloat16; made once and kept where pools are."""
    path = ROOT / "pools" / "smollm2-instruct"
    path.parent.mkdir(exist_ok=True)
    # Tests in several processes may come here at the same time.
    with open(path.parent / ".smollm2-instruct.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            command = [sys.executable, str(ROOT / "tools" / "smollm2.py"), f"--out={path}"]
            subprocess.run(command, check=True)
    return str(path)


@pytest.fixture(scope="module")
def ours(directory):
    """Model and float32 parameters, as jaxmerge reads them."""
    source = huggingface.describe("smollm2", orbax.absolute(directory))
    fields = {k: v for k, v in source.architecture.items() if k != "model"}
    model = decoder(DecoderConfig.from_plain(fields))
    mesh = make_mesh(devices=jax.devices()[:1])
    return model, load([source], mesh, model.sharding_rules, dtype="float32").trees[0]


@pytest.fixture(scope="module")
def theirs(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts(directory):
    """50 prompts of three tasks in the chat template, padded on the left."""
    tokenizer = Pretrained(directory, chat=True)
    texts = [
        example.prompt
        for name in ("arithmetic", "instructions", "sorting")
        for example in TASKS[name](train=0, search=17, test=0).splits["search"]
    ][:50]
    rows = [tokenizer.prompt(Prompt(text)) for text in texts]
    T = max(map(len, rows))
    tokens_BxT = np.zeros((len(rows), T), np.int32)
    for row, tokens in zip(tokens_BxT, rows):
        row[T - len(tokens) :] = tokens
    return tokens_BxT, np.array([T - len(tokens) for tokens in rows], np.int32), tokenizer.stops


@pytest.mark.slow
def test_logits_are_those_of_transformers(ours, theirs, prompts):
    model, params = ours
    tokens_BxT, padding_B, _ = prompts
    longest = tokens_BxT[padding_B == 0][:4]
    found = np.asarray(jax.jit(model.apply)(params, jnp.asarray(longest)))
    with torch.no_grad():
        expected = theirs(torch.tensor(longest, dtype=torch.long)).logits.numpy()
    # float32 through 30 layers, sums in another order: 5e-6 of the largest logit (34) was seen.
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_fifty_greedy_continuations_are_those_of_transformers(ours, theirs, prompts):
    """Token for token, up to where each text ends."""
    model, params = ours
    tokens_BxT, padding_B, stops = prompts
    assert len(tokens_BxT) == 50
    program = jax.jit(functools.partial(generate, model, max_new_tokens=NEW_TOKENS, stops=stops))
    found = np.asarray(program(params, jnp.asarray(tokens_BxT), jnp.asarray(padding_B)))
    slots = np.arange(tokens_BxT.shape[1])
    with torch.no_grad():
        out = theirs.generate(
            torch.tensor(tokens_BxT, dtype=torch.long),
            attention_mask=torch.tensor(slots[None] >= padding_B[:, None]).long(),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=stops[0],
        )
    expected = out[:, tokens_BxT.shape[1] :].numpy()
    np.testing.assert_array_equal(found[:, : expected.shape[1]], expected)
    assert len(np.unique(found, axis=0)) > 20


@pytest.mark.slow
def test_lm_eval_hears_what_its_own_model_says(directory):
    """Likelihoods, whole texts and greedy texts, byte-level tokens and special ones among them."""
    rng = random.Random(0)
    words = "the sun, Ünïcode ☃, 42 and\n\nfour <|im_start|>user of a long river 日本 said".split(
        " "
    )
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(98)]
    ends = ["", " ", "\n", "  ", "."]
    pairs = [
        ("" if i % 8 == 0 else text + rng.choice(ends), rng.choice(["", " "]) + rng.choice(words))
        for i, text in enumerate(texts)
    ]
    pairs += [("The capital of France is", " Paris"), ("One, two, three,", " four")]
    writing = [(text, {"until": ["\n", "the"], "max_gen_toks": 16}) for text in texts[:6]]
    torch.set_num_threads(1)
    ours = JaxmergeLM(directory, dtype="float32", data=1)
    hugging_face: Any = HFLM
    theirs = hugging_face(directory, device="cpu", dtype="float32", batch_size=1)

    def ask(model: Any, kind: Any, arguments: list[tuple[Any, ...]]) -> Any:
        return getattr(model, kind)([Instance(kind, {}, each, 0) for each in arguments])

    found, expected = (ask(model, "loglikelihood", pairs) for model in (ours, theirs))
    # float32 through 30 layers: 3e-5 nats were seen for each of a few tokens.
    np.testing.assert_allclose([n for n, _ in found], [n for n, _ in expected], rtol=0, atol=5e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert {greedy for _, greedy in found} == {True, False}
    whole = [(text,) for text in texts[:6]]
    found, expected = (ask(model, "loglikelihood_rolling", whole) for model in (ours, theirs))
    np.testing.assert_allclose(found, expected, rtol=3e-6)
    assert ask(ours, "generate_until", writing) == ask(theirs, "generate_until", writing)
