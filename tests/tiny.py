"""Random tiny models, pools and tasks, made in a moment."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

from jaxmerge.checkpoints import orbax
from jaxmerge.models.architecture import DecoderConfig
from jaxmerge.models.decoder import decoder
from jaxmerge.models.model import Model
from jaxmerge.tasks import kinds
from jaxmerge.tasks.common import Example, Task
from jaxmerge.trees import PyTree

DECODER = DecoderConfig(
    vocab=256, width=16, layers=2, heads=4, kv_heads=2, head_width=4, feed_forward=32
)


def model(config: DecoderConfig = DECODER) -> Model:
    return decoder(config)


def trees(count: int, config: DecoderConfig = DECODER, scale: float = 3.0) -> list[PyTree]:
    """Parameters of a few models; scaled up, so that their outputs differ from each other."""
    made = decoder(config).init
    assert made is not None
    init = jax.jit(made)
    return [
        jax.tree.map(lambda leaf: leaf * scale, init(jax.random.key(seed))) for seed in range(count)
    ]


def pool(directory: Path, count: int = 3) -> Path:
    """Saves a pool of random models."""
    for k, tree in enumerate(trees(count)):
        orbax.save(directory / f"model{k}", tree, architecture=model().architecture)
    return directory


def letters(seed: int, count: int) -> list[str]:
    """Random lower-case strings of 3 to 12 letters."""
    rng = np.random.default_rng(seed)
    return [
        "".join(chr(97 + c) for c in rng.integers(26, size=rng.integers(3, 13)))
        for _ in range(count)
    ]


def _vowels(example: Example, output: str) -> float:
    """A score that moves with every byte, even for a model that was never trained."""
    return sum(ord(character) % 7 == 0 for character in output) / max(len(output), 1)


def generation(*, search: int = 12, test: int = 20, seed: int = 0) -> Task:
    prompts = letters(seed, search + test)
    examples = [Example(prompt, "aeiou") for prompt in prompts]
    splits = {"search": examples[:search], "test": examples[search:]}
    return kinds.generation("generation", splits, _vowels, max_new_tokens=6)


def choice(*, search: int = 12, test: int = 20, seed: int = 1) -> Task:
    prompts, options = letters(seed, search + test), letters(seed + 1, 4 * (search + test))
    examples = [
        Example(prompt, options[4 * i], tuple(options[4 * i : 4 * i + 2 + i % 3]))
        for i, prompt in enumerate(prompts)
    ]
    splits = {"search": examples[:search], "test": examples[search:]}
    return kinds.multiple_choice("choice", splits, normalize="bytes")


def text(*, search: int = 12, test: int = 20, seed: int = 2) -> Task:
    """Perplexity, whose scores have no least one; and it warns."""
    examples = [Example(text) for text in letters(seed, search + test)]
    splits = {"search": examples[:search], "test": examples[search:]}
    return dataclasses.replace(kinds.perplexity("text", splits), warning="it is public")


def plain_apply():
    """A model that is only a causal `apply`, as a user's own would be: no cache, no description."""
    return model().apply


def run_config(config, pool: Path):
    """Any config, cut down to the tiny pool and a handful of examples."""
    config.pool.checkpoints = (f"{pool}/*",)
    config.pool.base, config.pool.chat, config.pool.dtype = "", False, ""
    config.pool.model, config.pool.model_args = "", {}
    config.mesh = {"pop": 1, "data": 1, "fsdp": 1, "tensor": 1, "cpu_devices": 0}
    config.tasks.generation = {"builder": "tests.tiny:generation"}
    config.tasks.choice = {"builder": "tests.tiny:choice"}
    config.tasks.unseen = {"builder": "tests.tiny:generation", "seed": 5}
    config.objective.tasks = ("generation", "choice")
    config.objective.weights = ()
    config.heldout = ("unseen",)
    config.objective.search_examples = 10
    config.objective.test_examples = 20
    config.front.search_examples = 0
    config.evaluate.batch_size = 8
    config.search.strategy = "CMA_ES"
    config.search.population, config.search.init = 4, ()
    config.search.budget = 14
    config.search.save_seconds = 0.0
    config.export.speech_bytes = 0  # two programs more
    config.compilation_cache = ""
    return config


def log(workdir: Path) -> list[dict]:
    """The log without times."""
    lines = [json.loads(line) for line in (workdir / "candidates.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
