"""The decoder as each family against transformers, on random tiny models."""

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from jaxmerge import sharding
from jaxmerge.errors import JaxmergeError
from jaxmerge.evaluation.generate import generate
from jaxmerge.models import families
from jaxmerge.models.architecture import DecoderConfig
from jaxmerge.models.decoder import SHARDING_RULES, decoder
from jaxmerge.trees import named_leaves
from tests import huggingface_models as huggingface

each_variant = pytest.mark.parametrize("variant", huggingface.VARIANTS)

RNG = np.random.default_rng(3)
TOKENS_BxT = RNG.integers(1, huggingface.VOCAB, (3, 24))  # four times as long as the windows
PADDING_B = np.array([0, 7, 3])
PROMPT = 12  # tokens, padding included
STEPS = 64

# Both sides compute in float32, but not in the same order: through 2 to 4 layers of sums of up to
# 64 terms some 100 roundings of 6e-8 add up; 4e-6 of the largest logit was the most that was seen.
TOLERANCE = 1e-5


def assert_close(found, expected) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@functools.cache
def apply_of(config: DecoderConfig):
    return jax.jit(decoder(config).apply)


@each_variant
def test_logits(variant):
    """Of all positions, of every variant of every family."""
    tiny = huggingface.tiny(variant)
    expected = huggingface.logits(tiny.model, TOKENS_BxT)
    assert expected.std() > 0.2  # there is something to be equal to
    assert_close(apply_of(tiny.architecture.config)(tiny.params, TOKENS_BxT), expected)


@pytest.mark.parametrize(
    "variant",
    ["llama biases", "gemma3", "cohere2", "phi3 longrope, long"],
)
def test_logits_with_padding_and_cache(variant):
    """Rows of unequal length, padded on the left: prefill, then one token at a time."""
    tiny = huggingface.tiny(variant)
    model = decoder(tiny.architecture.config)

    @jax.jit
    def logits_from_prompt_on(params, tokens_BxT, padding_B):
        slots = tokens_BxT.shape[1]
        first, state = model.prefill(params, tokens_BxT[:, :PROMPT], padding_B, slots)

        def step(state, tokens_B):
            logits_BxV, state = model.decode(params, tokens_B, state)
            return state, logits_BxV

        _, rest = jax.lax.scan(step, state, tokens_BxT[:, PROMPT:].T)
        return jnp.concatenate([first[None], rest]).swapaxes(0, 1)

    found = logits_from_prompt_on(tiny.params, jnp.asarray(TOKENS_BxT), jnp.asarray(PADDING_B))
    expected = huggingface.logits(tiny.model, TOKENS_BxT, PADDING_B)
    assert_close(found, expected[:, PROMPT - 1 :])


@pytest.mark.parametrize(
    "variant",
    [
        "llama",
        "llama dynamic",
        "llama longrope",
        "mistral",
        "smollm3 windows, biases, untied",
        "qwen2 windows, tied",
        "qwen3 yarn",
        "gemma2",
        "gemma3",
        "cohere",
        "cohere2 multi-head biases",
        "ministral",
        "seed oss",
        "gemma",
        "olmo2",
        "olmo3",
        "granite",
        "granite hybrid",
        "phi3",
        "mixtral",
        "qwen3 moe",
    ],
)
def test_greedy_generation(variant):
    """64 tokens of rows of unequal length, the same as transformers' with its own cache."""
    tiny = huggingface.tiny(variant)
    prompts_BxT = TOKENS_BxT[:, :PROMPT]
    # Where transformers takes the longest text for all, row by row, without padding.
    rows = [[0], [1], [2]] if variant in huggingface.LENGTH_DEPENDENT else [[0, 1, 2]]
    expected = [
        huggingface.greedy(
            tiny.model,
            prompts_BxT[row, PADDING_B[row].min() :],
            PADDING_B[row] - PADDING_B[row].min(),
            STEPS,
        )
        for row in rows
    ]
    found = _generate(tiny, prompts_BxT)
    np.testing.assert_array_equal(found, np.concatenate(expected))
    assert len(np.unique(found)) > 20  # no row that says the same for ever


def _generate(tiny: huggingface.Tiny, prompts_BxT: np.ndarray) -> np.ndarray:
    model = decoder(tiny.architecture.config)
    never = (huggingface.VOCAB,)  # an id that no token has
    run = jax.jit(functools.partial(generate, model, max_new_tokens=STEPS, stops=never))
    return np.asarray(run(tiny.params, jnp.asarray(prompts_BxT), jnp.asarray(PADDING_B)))


@each_variant
def test_names(variant):
    """Every row of every tensor on disk is in one leaf, and the leaves are those of the decoder."""
    tiny = huggingface.tiny(variant)
    config, layout = tiny.architecture
    assert {name: t.shape for name, t in tiny.tensors.items()} == layout.tensors
    used = {name: np.zeros(shape[0], int) for name, shape in layout.tensors.items()}
    for parts in layout.leaves.values():
        for part in parts:
            used[part.tensor][part.start : part.stop] += 1
    assert all((rows == 1).all() for rows in used.values())
    init = decoder(config).init
    assert init is not None
    abstract = named_leaves(jax.eval_shape(init, jax.random.key(0)))
    assert {name: leaf.shape for name, leaf in abstract.items()} == layout.shapes
    assert layout.leaves.keys() == layout.shapes.keys()


@each_variant
def test_config_through_json(variant):
    """What is written beside a checkpoint gives the same decoder again."""
    config = huggingface.tiny(variant).architecture.config
    assert DecoderConfig.from_plain(json.loads(json.dumps(config.plain()))) == config
    assert hash(config) == hash(dataclasses.replace(config))


@pytest.mark.parametrize(
    ("variant", "replicated"),
    [
        ("qwen3 windows, biases, tied", {"out_bias"}),
        ("cohere norms, biases, untied", {"out_bias"}),
        ("mixtral", {"router"}),
    ],
)
def test_sharded(variant, replicated):
    """The same logits with parameters over fsdp and tensor; what is large is split."""
    tiny = huggingface.tiny(variant)
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    where = sharding.shardings(tiny.params, SHARDING_RULES, mesh)
    whole = {name for name, place in named_leaves(where).items() if place.is_fully_replicated}
    assert {name.removeprefix("layers/") for name in whole if "norm" not in name} == replicated
    sharded = jax.device_put(tiny.params, where)
    apply = apply_of(tiny.architecture.config)
    # A sum over D or F is now two sums: other roundings, of the same size.
    assert_close(apply(sharded, TOKENS_BxT), apply(tiny.params, TOKENS_BxT))


# Attributes as files on the Hub have them, which the decoder may not pass over.
REFUSED = {
    "quantised": ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    "activation": ("llama", {"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu'"),
    "unknown": ("llama", {"frobnicate": 3}, "frobnicate=3"),
    "partial rotary": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "rope": (
        "llama",
        {"rope_parameters": {"rope_type": "proportional", "rope_theta": 9.0}},
        "proportional",
    ),
    "rope parameter": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 9.0, "mrope_section": [2]}},
        "mrope_section",
    ),
    "layer type": ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, "chunked"),
    "no window": ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    "both directions": ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional"),
    "softcap": ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
    "dense layers": ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]"),
    "sparse step": ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
    "recurrent layers": (
        "granitemoehybrid",
        {"layer_types": ["mamba", "attention"], "num_local_experts": 0, "mamba_n_heads": 8}
        | {"mamba_d_head": 8},
        "layer_types=.*linear_attention",
    ),
    "experts": (
        "granitemoehybrid",
        {"layer_types": ["attention", "attention"], "mamba_n_heads": 8, "mamba_d_head": 8},
        "num_local_experts=8",
    ),
    "all at once": ("llama", {"a_b": 1, "c_d": "x"}, "a_b=1, c_d='x'"),
}


def _write(directory: Path, model_type: str, **changes) -> str:
    tiny = {name: value for name, value in huggingface.TINY.items() if value is not None}
    config = {"model_type": model_type, **tiny, **changes}
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


@pytest.mark.parametrize(("model_type", "changes", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_heeded_is_refused(tmp_path, model_type, changes, said):
    """By name and with the value; the error names the file."""
    directory = _write(tmp_path, model_type, **changes)
    with pytest.raises(JaxmergeError, match=said) as caught:
        families.read(directory)
    assert caught.value.where == str(tmp_path / "config.json")


# What trainers and loaders write down for themselves.
HARMLESS = {
    "Unsloth": {
        **{"unsloth_fixed": True, "unsloth_version": "2026.4.5", "unsloth_tokenizer": "fixed"},
        "unsloth_training_tiled_mlp": True,
    },
    "transformers": {
        **{"_attn_implementation_autoset": True, "use_cache": False, "torchscript": False},
        **{"architectures": ["Mine"], "auto_map": {"AutoModel": "m.M"}, "output_attentions": True},
        **{"torch_dtype": "bfloat16", "attention_dropout": 0.3, "problem_type": "other"},
    },
    "others": {
        **{"rope_interleaved": False, "pretraining_tp": 2, "tokenizer_class": "LlamaTokenizer"},
        **{"transformers.js_config": {"dtype": "q4"}, "max_sequence_length": 2048, "tags": ["x"]},
    },
    "lengths": {"max_position_embeddings": 4096, "model_max_length": 100},
}


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "gemma3_text", "phi3", "cohere2"])
@pytest.mark.parametrize("written", HARMLESS.values(), ids=HARMLESS)
def test_what_is_harmless_is_passed_over(tmp_path, model_type, written):
    plain = families.read(_write(tmp_path, model_type))
    assert plain is not None
    assert families.read(_write(tmp_path, model_type, **written)) == plain


def test_lengths_by_which_positions_are_scaled_are_heeded(tmp_path):
    rope = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 9.0, "factor": 2.0}}
    short, long = (
        families.read(_write(tmp_path, "llama", **rope, max_position_embeddings=longest))
        for longest in (64, 128)
    )
    assert short != long


def test_no_decoder_for_other_models(tmp_path):
    assert families.read(_write(tmp_path, "gpt2")) is None
    assert families.from_config(transformers.BertConfig(), "bert") is None


ROPE_OF_ZERO = {"rope_type": "linear", "rope_theta": 9.0, "factor": 0.0}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "can't be read"),
        ("{", "is no JSON"),
        ("[]", "no JSON object"),
        ('{"model_type": "llama", "hidden_size": 33}', "refuses the config"),
        ('{"model_type": "llama", "num_key_value_heads": 5}', "kv_heads must divide heads"),
        ('{"model_type": "llama", "num_hidden_layers": 4000000000}', "more than any model has"),
        (json.dumps({"model_type": "llama", "intermediate_size": 10**400}), "sizes must be whole"),
        ('{"model_type": "qwen2", "head_dim": 0}', "sizes must be whole"),
        ('{"model_type": "llama", "rms_norm_eps": "x"}', "of another kind|refuses the config"),
        (json.dumps({"model_type": "llama", "rope_parameters": ROPE_OF_ZERO}), "rope_parameters"),
    ],
)
def test_unusable_configs(tmp_path, text, said):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(JaxmergeError, match=said):
        families.read(str(tmp_path))


@pytest.mark.parametrize("said", [[2], float("inf"), "x"])
def test_a_context_that_is_no_number(tmp_path, said):
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": said}))
    with pytest.raises(JaxmergeError, match="of another kind"):
        families.context(str(tmp_path))


def test_without_torch():
    """Reading needs transformers' configs alone."""
    directory = huggingface.tiny("llama").directory
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from jaxmerge.models import families\n"
        f"print(families.read({directory!r}).config.layers)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.stdout.strip() == "2", ran.stderr
