"""Merges of checkpoints that JAX trainers wrote, read by those trainers again: are logits the same?

    python tools/check_trainers.py tunix DIR [--python=VENV/bin/python] [--family=qwen3]

For each family that the trainer and jaxmerge have: two random tiny models are saved by the trainer,
merged by name, and the merge exported to Hugging Face. The trainer's own loader reads the merge.
Its logits are compared with those of the package's decoder and of transformers on the export.
Ends with 1 where they differ.

The trainer runs in an environment of its own, `DIR/env-TRAINER`, which the first run makes with
Python 3.12 (`python3.12`, or what `--make-with` names), unless `--python` is that of one.
"""

import argparse
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from jaxmerge import config as configs
from jaxmerge.checkpoints import trainers
from jaxmerge.checkpoints.survey import find
from jaxmerge.experiment.merge import merge
from jaxmerge.models.decoder import decoder
from tests.checkpoints import trainers_test
from tools.trainer_environments import environment

STORED = {"levanter": "zarr"}  # others than Orbax
_GEMMAS = ("gemma2", "gemma3")
FAMILIES = {
    "levanter": ("llama", "mistral", "qwen2", "qwen3"),
    "tunix": ("llama", "qwen2", "qwen3", "gemma3"),
    **dict.fromkeys(("gemma", "gemma_flat", "gemma_stacked"), _GEMMAS),
    **dict.fromkeys(
        ("maxtext", "maxtext_unscanned"),
        ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", *_GEMMAS),
    ),
}
# What the trainers can be told only so.
_LLAMA31 = {**trainers_test.LLAMA31, "original_max_position_embeddings": 8192}
_PLAIN = {"rope_type": "default", "rope_theta": 1e4}
# Whatever its config says, Tunix 0.1.7 turns Llama and Qwen 3 by this theta.
_MILLION = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    # Its attention of these has heads of D / H, whatever their `head_dim`.
    "levanter": {family: {"hidden_size": 48} for family in ("mistral", "qwen2")},
    "tunix": dict.fromkeys(("llama", "qwen3"), _MILLION),
    "maxtext": {
        "llama": {"rope_parameters": _LLAMA31},
        "mistral": {"rope_parameters": _PLAIN},
        "mixtral": {"rope_parameters": _PLAIN},
        "qwen3_moe": {"norm_topk_prob": True},
    },
}
# Of the largest logit. All compute in float32, in orders of their own: through up to 8 layers some
# hundred roundings of 6e-8 add up.
TOLERANCE = 2e-5


def prepare(trainer: str, family: str, at: Path) -> None:
    """What the trainer makes models by: sizes, and tokens."""
    at.mkdir(parents=True)
    gemma = {"query_pre_attn_scalar": trainers_test.SIZES["head_dim"]} if "gemma" in family else {}
    changes = CHANGES.get(trainer.split("_")[0], {}).get(family, {})
    trainers_test.directory(at / "base", family, **gemma, **changes)
    rows = trainers_test.SIZES["vocab_size"]
    tokens = np.random.default_rng(0).integers(1, rows, (2, 8)).astype(np.int32)
    np.save(at / "tokens.npy", tokens)


def merged(at: Path, stored: str) -> None:
    """The merge of the trainer's checkpoints, by name as it stores them, and for transformers."""
    config = configs.default()
    config.pool.checkpoints = (str(at / "0"), str(at / "1"))
    config.pool.base = str(at / "base")
    # Exact in bfloat16, which MaxText rounds a tied head to, whatever its dtypes are.
    config.merge.weights = (0.25, 0.75)
    config.export.formats = (stored, "huggingface")
    by_name, exported = merge(config, str(at / "run"))
    by_name.rename(at / "merged")
    exported.rename(at / "huggingface")


def check(at: Path) -> bool:
    """Whether the trainer, the decoder and transformers agree on a merge."""
    tokens, theirs = np.load(at / "tokens.npy"), np.load(at / "logits-merged.npy")
    found = {
        "decoder": ours(at / "merged", at / "base", tokens),
        "transformers": reference(at / "huggingface", tokens),
    }
    differences = {
        name: float(np.abs(logits - theirs).max() / np.abs(theirs).max())
        for name, logits in found.items()
    }
    said = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    print(f"{at.parent.name} {at.name}: of {np.abs(theirs).max():.2f}, {said}", flush=True)
    return max(differences.values()) < TOLERANCE


def keep(at: Path, file: Path) -> None:
    """Writes what a test needs of a trainer's checkpoint: it, its config, and its logits."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for each in sorted(path for path in (at / "0").rglob("*") if path.is_file()):
            archive.write(each, Path("checkpoint") / each.relative_to(at / "0"))
        archive.write(at / "base" / "config.json", "config.json")
        archive.write(at / "tokens.npy", "tokens.npy")
        archive.write(at / "logits-0.npy", "logits.npy")


def ours(path: Path, base: Path, tokens: np.ndarray) -> np.ndarray:
    """Logits of the package's decoder, of a trainer's checkpoint."""
    (source,) = find([str(path)], base=str(base))
    params = trainers.restore(source, source.abstract)
    with jax.default_matmul_precision("highest"):
        return np.asarray(decoder(source.view.known.config).apply(params, jnp.asarray(tokens)))


def reference(path: Path, tokens: np.ndarray) -> np.ndarray:
    """Logits of transformers, of a directory of Hugging Face."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trainer", choices=FAMILIES)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--python", help="of an environment that is there")
    parser.add_argument("--make-with", default="python3.12")
    parser.add_argument("--family", action="append")
    parser.add_argument("--keep", type=Path, help="where fixtures for the tests go")
    said = parser.parse_args()
    directory = said.directory.resolve()
    name = said.trainer.split("_")[0]
    python = said.python or environment(name, directory, said.make_with)
    print(json.dumps({"python": python, "jax here": jax.__version__}))
    families = said.family or FAMILIES[said.trainer]
    places = {each: directory / said.trainer / each for each in families}

    def in_trainer(what: str) -> None:
        script = Path(__file__).with_name("in_trainer.py")
        subprocess.run([python, script, what, said.trainer, *places.values()], check=True)

    for family, at in places.items():
        prepare(said.trainer, family, at)
    in_trainer("save")
    for at in places.values():
        merged(at, STORED.get(said.trainer, "orbax"))
    in_trainer("read")
    same = [check(at) for at in places.values()]
    for family, at in places.items() if said.keep else ():
        keep(at, said.keep / f"{said.trainer}-{family}.zip")
    return 0 if all(same) else 1


if __name__ == "__main__":
    sys.exit(main())
