"""What tools/bench_search.py asks: a random tokenizer, a pool of random Llamas, and questions.

Everything follows from seeds; nothing is fetched. The language has some thousand words of a few
syllables, drawn by Zipf's law, so that a byte-level BPE trained on it has words and parts of words.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from reasoning_gym import create_dataset
from safetensors.numpy import save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

_WORDS = 10000
_STOP = "<end>"
_GYM = ("family_relationships", "gsm_symbolic", "letter_counting", "number_sequence")
_NOISE = 0.3  # of a checkpoint's own part, where what all share has 1


class Size(NamedTuple):
    """The size of a Llama; the embedding is the output projection too."""

    layers: int = 12
    width: int = 256
    feed_forward: int = 704
    heads: int = 8
    vocabulary: int = 8192


class Counts(NamedTuple):
    """How many questions there are."""

    choices: int = 200
    texts: int = 200
    new_tokens: int = 32


def make_pool(directory: Path, size: Size, checkpoints: int = 4) -> list[str]:
    """Checkpoints in float32 with a tokenizer; left as they are where all are there."""
    paths = [directory / f"model{k}" for k in range(checkpoints)]
    if all((path / "config.json").exists() for path in paths):
        return [str(path) for path in paths]
    tokenizer = _tokenizer(size.vocabulary)
    for k, path in enumerate(paths):
        tokenizer.save_pretrained(path)
        shared, own = np.random.default_rng(0), np.random.default_rng(k + 1)
        tensors = {
            name: _mixed(name, shape, shared, own) for name, shape in sorted(_shapes(size).items())
        }
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        (path / "config.json").write_text(json.dumps(_config(size)))
    return [str(path) for path in paths]


def twice(model: Path, directory: Path) -> list[str]:
    """A pool of the same model two times, since one checkpoint is no pool."""
    paths = [directory / f"{model.name}-{name}" for name in ("one", "two")]
    for path in paths:
        path.unlink(missing_ok=True)
        path.symlink_to(model)
    return [str(path) for path in paths]


def _shapes(size: Size) -> dict[str, tuple[int, ...]]:
    width, inner = size.width, size.feed_forward
    found = {"model.embed_tokens.weight": (size.vocabulary, width), "model.norm.weight": (width,)}
    for layer in range(size.layers):
        prefix = f"model.layers.{layer}."
        found |= {f"{prefix}self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        found |= {f"{prefix}mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        found[f"{prefix}mlp.down_proj.weight"] = (width, inner)
        for name in ("input", "post_attention"):
            found[f"{prefix}{name}_layernorm.weight"] = (width,)
    return found


def _mixed(
    name: str, shape: tuple[int, ...], shared: np.random.Generator, own: np.random.Generator
) -> np.ndarray:
    """What all checkpoints have in common, and a part of this one's own."""
    common, noise = (each.standard_normal(shape, np.float32) for each in (shared, own))
    random = (common + _NOISE * noise) / np.float32(np.hypot(1, _NOISE))
    if len(shape) == 1:
        return 1 + 0.1 * random
    # A small embedding, since it is the output projection too: a text would else repeat a token.
    return random * np.float32(0.2 if "embed" in name else 1.5 / shape[-1] ** 0.5)


def _config(size: Size) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size.width,
        "intermediate_size": size.feed_forward,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "vocab_size": size.vocabulary,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
        "dtype": "float32",
    }


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the language."""
    rng, trained = np.random.default_rng(0), ByteLevelBPETokenizer()
    sentences = [_text(rng, 60) for _ in range(4000)]
    trained.train_from_iterator(
        sentences, vocab_size=vocabulary, special_tokens=[_STOP], show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, eos_token=_STOP, pad_token=_STOP
    )


def _words() -> list[str]:
    rng = np.random.default_rng(1)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "el")]
    return ["".join(rng.choice(syllables, rng.integers(1, 5))) for _ in range(_WORDS)]


_VOCABULARY = _words()


def _text(rng: np.random.Generator, words: int) -> str:
    ranks = np.minimum(rng.zipf(1.2, words), _WORDS) - 1
    return " ".join(_VOCABULARY[rank] for rank in ranks).capitalize() + "."


def make_questions(directory: Path, counts: Counts) -> None:
    """Questions in the random language, as `choice.jsonl` and `writing.jsonl`.

    Tasks of lm-eval are beside them: `choice.yaml` and `writing.yaml`.
    """
    rng = np.random.default_rng(2)
    choices = [
        {
            "question": f"{_text(rng, int(rng.integers(40, 100)))} What comes next?",
            "options": [_text(rng, int(rng.integers(4, 10))) for _ in range(4)],
            "answer": int(rng.integers(4)),
        }
        for _ in range(counts.choices)
    ]
    texts = [
        {"question": f"{_text(rng, int(rng.integers(40, 100)))} What comes next?", "answer": ""}
        for _ in range(counts.texts)
    ]
    _write_both(directory, choices, texts, counts.new_tokens)


def make_gym_questions(directory: Path, counts: Counts) -> None:
    """The same of reasoning-gym's questions, with wrong options that answer others."""
    rng = np.random.default_rng(3)
    asked = [create_dataset(name, size=counts.choices + counts.texts + 4, seed=4) for name in _GYM]

    def question(i: int) -> dict[str, Any]:
        entries = asked[i % len(asked)]
        answers = list(dict.fromkeys(entry["answer"] for entry in entries))
        right = entries[i]["answer"]
        wrong = [answer for answer in answers if answer != right]
        options = [right, *rng.choice(wrong, 3, replace=False).tolist()]
        order = rng.permutation(4)
        return {
            "question": f"{entries[i]['question']}\nAnswer:",
            "options": [options[place] for place in order],
            "answer": int(np.argmin(order)),
        }

    choices = [question(i) for i in range(counts.choices)]
    texts = [question(counts.choices + i) | {"answer": ""} for i in range(counts.texts)]
    _write_both(directory, choices, texts, counts.new_tokens)


def _write_both(
    directory: Path, choices: Sequence[dict], texts: Sequence[dict], new_tokens: int
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    mean = {"aggregation": "mean", "higher_is_better": True}
    _write(
        directory,
        "choice",
        choices,
        output_type="multiple_choice",
        doc_to_choice="{{options}}",
        doc_to_target="{{answer}}",
        metric_list=[{"metric": "acc", **mean}],
    )
    _write(
        directory,
        "writing",
        texts,
        output_type="generate_until",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": [], "max_gen_toks": new_tokens, "do_sample": False},
        metric_list=[{"metric": "exact_match", **mean}],
    )


def _write(directory: Path, name: str, documents: Sequence[dict], **fields: object) -> None:
    data = directory / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(data)},
            "cache_dir": str(directory / "cache"),
        },
        "test_split": "test",
        "doc_to_text": "{{question}}",
        **fields,
    }
    (directory / f"{name}.yaml").write_text(yaml.safe_dump(task))
