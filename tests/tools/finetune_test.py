"""Fine-tuning: what is learnt, that it is learnt, and that others can read what is written."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmerge.checkpoints import huggingface, orbax
from jaxmerge.errors import JaxmergeError
from jaxmerge.evaluation.tokenizer import Bytes
from jaxmerge.models.architecture import DecoderConfig
from jaxmerge.models.decoder import decoder
from jaxmerge.tasks import TASKS
from jaxmerge.trees import map_named
from tests import huggingface_models
from tools import finetune, finetune_lora

SCHEDULE = finetune.Schedule(steps=30, batch=8, learning_rate=1e-2, seed=0)


class Ascii(Bytes):
    """One token per printable character; `~` ends a text."""

    vocabulary = huggingface_models.VOCAB
    stops: tuple[int, ...] = (94,)

    def prompt(self, prompt):
        return [0, *self.encode(prompt.text)]

    def encode(self, text):
        return [ord(character) - 32 for character in text]

    def decode(self, tokens):
        return "".join(chr(token + 32) for token in tokens)


@pytest.fixture(scope="module")
def tiny():
    return huggingface_models.tiny("smollm2")


@pytest.fixture(scope="module")
def sums():
    return TASKS["arithmetic"](train=50, search=0, test=0)


def model_of(tiny):
    architecture = dict(huggingface.describe("tiny", orbax.absolute(tiny.directory)).architecture)
    assert architecture.pop("model") == "decoder"
    config = DecoderConfig.from_plain(architecture)
    return config, decoder(config)


def test_answer_and_stop_are_predicted_from_the_token_before_them(sums):
    sequences = finetune.pad(finetune.encode(sums, Ascii()))
    assert sequences.tokens.shape[1] % 8 == 0
    for row, example in enumerate(sums.splits["train"]):
        learnt = sequences.learnt[row]
        assert Ascii().decode(sequences.answers[row, learnt].tolist()) == example.target + "~"
        for n, source in enumerate(sequences.sources[row, learnt]):
            read = Ascii().decode(sequences.tokens[row, 1 : source + 1].tolist())
            assert read == example.prompt + example.target[:n]


def test_the_loss_is_that_of_all_logits_at_the_answers(tiny, sums):
    config, model = model_of(tiny)
    batch = finetune.pad(finetune.encode(sums, Ascii())[:4])
    logits = model.apply(tiny.params, jnp.asarray(batch.tokens))
    losses = [
        optax.softmax_cross_entropy_with_integer_labels(logits[row, source], answer)
        for row in range(4)
        for source, answer, learnt in zip(*(array[row] for array in batch[1:]))
        if learnt
    ]
    # Float32 in another order of summation.
    np.testing.assert_allclose(
        jax.jit(finetune.make_loss(config))(tiny.params, batch), np.mean(losses), rtol=1e-5
    )


def test_rows_follow_the_shares_and_none_comes_twice_before_all_came_once():
    sizes = {"small": 10, "large": 1000}
    rows = finetune.draw({"small": 3, "large": 1}, sizes, 1000, np.random.default_rng(0))
    small = rows[rows < 10]
    # 1000 draws of probability 3/4: standard deviation 14; five of them either way.
    assert 680 < len(small) < 820
    counts = np.bincount(small)
    assert counts.max() - counts.min() <= 1
    assert len(set(rows[rows >= 10])) == len(rows) - len(small)


def test_full_fine_tuning_learns_and_writes_a_checkpoint_with_its_architecture(
    tiny, sums, tmp_path
):
    config, model = model_of(tiny)
    out = tmp_path / "new" / "sums"
    finetune.finetune(tiny.directory, out, [sums], {"arithmetic": 1}, Ascii(), SCHEDULE)
    source = orbax.describe("sums", orbax.absolute(out))
    assert source.architecture == model.architecture
    assert {leaf.dtype for leaf in jax.tree.leaves(source.abstract)} == {jnp.dtype("bfloat16")}
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
        ),
        source.abstract,
    )
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), orbax.restore(source, placed))
    loss = jax.jit(finetune.make_loss(config))
    batch = finetune.pad(finetune.encode(sums, Ascii()))
    # Random parameters know nothing; after 30 steps the digits' frequencies at least are known.
    assert loss(params, batch) < 0.7 * loss(tiny.params, batch)


# Of transformers, when peft asks it.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_lora_learns_and_peft_reads_it_as_the_same_model(tiny, sums, tmp_path):
    import peft
    import torch

    config, model = model_of(tiny)
    schedule = SCHEDULE._replace(steps=3)
    out = tmp_path / "lora"
    finetune.finetune(
        tiny.directory, out, [sums], {"arithmetic": 1}, Ascii(), schedule, lora_rank=2
    )
    tokens = np.arange(20, dtype=np.int32).reshape(2, 10)
    adapted = peft.PeftModel.from_pretrained(tiny.model, str(out)).eval()
    with torch.no_grad():
        found = adapted(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    adapted.unload()

    layout = huggingface.layout(tiny.directory)
    sequences = finetune.pad(finetune.encode(sums, Ascii()))
    rows = finetune.draw(
        {"arithmetic": 1}, {"arithmetic": 50}, 3 * schedule.batch, np.random.default_rng(0)
    )
    loss = jax.jit(finetune.make_loss(config))
    adapters = finetune.train(
        lambda trained, frozen, batch: loss(finetune_lora.adapt(frozen, trained), batch),
        finetune_lora.make_adapters(layout, 2, jax.random.key(schedule.seed)),
        tiny.params,
        sequences,
        rows,
        schedule,
    )
    params = finetune_lora.adapt(tiny.params, adapters)
    expected = model.apply(params, jnp.asarray(tokens))
    # The tolerance of float32 in two libraries; three steps move the logits by far more.
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert np.abs(expected - model.apply(tiny.params, jnp.asarray(tokens))).max() > 0.05
    assert loss(params, sequences) < loss(tiny.params, sequences)


def test_adapters_begin_as_nothing_and_cover_every_projection(tiny):
    adapters = finetune_lora.make_adapters(huggingface.layout(tiny.directory), 2, jax.random.key(0))
    names = "query key value out gate up down".split()
    assert sorted(adapters) == sorted(f"layers/{name}" for name in names)

    def same(name, leaf):
        np.testing.assert_array_equal(leaf, before[name])
        return leaf

    before = {}
    map_named(lambda name, leaf: before.setdefault(name, leaf), tiny.params)
    map_named(same, finetune_lora.adapt(tiny.params, adapters))


def test_fused_projections_are_refused():
    layout = huggingface.layout(huggingface_models.tiny("phi3").directory)
    with pytest.raises(JaxmergeError, match=r"qkv_proj\.weight: a projection shares its tensor"):
        finetune_lora.make_adapters(layout, 2, jax.random.key(0))


def test_a_mixture_is_read_and_mistakes_in_it_are_named():
    assert finetune.parse_mixture(["sums:2", "words"]) == {"sums": 2.0, "words": 1.0}
    for wrong in (["sums:x"], ["sums:0"], ["sums:-1"], []):
        with pytest.raises(JaxmergeError, match="--mixture"):
            finetune.parse_mixture(wrong)


def test_nothing_is_overwritten(tiny, sums, tmp_path):
    with pytest.raises(JaxmergeError, match="something here already"):
        finetune.finetune(tiny.directory, tmp_path, [sums], {"arithmetic": 1}, Ascii(), SCHEDULE)
