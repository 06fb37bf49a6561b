"""Merges small random models with mergekit, for tests that compare (tests/merge/parity_test.py).

It runs in an environment of its own, and writes into the directory of the tests:

    python -m venv /tmp/mergekit-env
    /tmp/mergekit-env/bin/pip install torch==2.13.0
    /tmp/mergekit-env/bin/pip install mergekit==0.1.5
    HF_HUB_OFFLINE=1 /tmp/mergekit-env/bin/python tools/mergekit_fixtures.py

Draws: torch.bernoulli is replaced, so that a value is drawn where a fixed number for its place is
below its probability; the test does the same. mergekit's own draws have no seed for each tensor.
"""

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file

OUT = Path(__file__).parents[1] / "tests" / "merge" / "fixtures" / "mergekit.npz"
TENSORS = (  # that are compared
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.mlp.up_proj.weight",
)
DRAWN: list[int] = []  # how many values each call drew

THREE = {"models": "abc", "base": "base"}
TWO = {"models": "ab"}
WEIGHTS, DENSITIES = [0.5, 0.3, 0.4], [0.5, 0.2, 0.7]
# By name: method, models, base, and genes; those of a model are lists.
CASES = {
    "linear": {"models": "abc", "genes": {"weight": WEIGHTS}},
    "linear free": {"models": "abc", "genes": {"weight": [1.5, -0.9, 0.4], "normalize": False}},
    "linear bf16": {"models": "abc", "genes": {"weight": WEIGHTS}, "dtype": "bfloat16"},
    "slerp": {"models": "ab", "base": "a", "genes": {"t": 0.3}},
    "slerp alike": {"models": "dg", "base": "d", "genes": {"t": 0.3}},
    "slerp bf16": {"models": "ab", "base": "a", "genes": {"t": 0.3}, "dtype": "bfloat16"},
    "nuslerp": {**TWO, "genes": {"weight": [0.5, 0.3]}},
    "nuslerp base": {**TWO, "base": "base", "genes": {"weight": [0.5, 0.3]}},
    "nuslerp rows": {**TWO, "genes": {"weight": [0.5, 0.3], "nuslerp_flatten": False}},
    "nuslerp columns": {
        **TWO,
        "base": "base",
        "genes": {"weight": [1, 3], "nuslerp_flatten": False, "nuslerp_row_wise": True},
    },
    "multislerp": {"models": "abc", "genes": {"weight": WEIGHTS}},
    "multislerp base": {**THREE, "genes": {"weight": WEIGHTS, "normalize_weights": False}},
    "karcher": {"models": "abc", "genes": {}},
    "task_arithmetic": {**THREE, "genes": {"weight": [0.5, 0.3, -0.4], "lambda": 1.3}},
    "task_arithmetic mean": {**THREE, "genes": {"weight": WEIGHTS, "normalize": True}},
    "task_arithmetic bf16": {**THREE, "genes": {"weight": WEIGHTS}, "dtype": "bfloat16"},
    "ties": {**THREE, "genes": {"weight": WEIGHTS, "density": DENSITIES, "lambda": 1.3}},
    "ties negative": {
        **THREE,
        "genes": {"weight": [0.5, 0.3, -0.4], "density": [0.4, 0.4, 0.4], "rescale": True},
    },
    "ties bf16": {**THREE, "genes": {"weight": WEIGHTS}, "dtype": "bfloat16"},
    "dare_linear": {**THREE, "genes": {"weight": WEIGHTS, "density": DENSITIES}},
    "dare_ties": {**THREE, "genes": {"weight": WEIGHTS, "density": DENSITIES}},
    "dare_ties plain": {
        **THREE,
        "genes": {"weight": WEIGHTS, "density": DENSITIES, "rescale": False, "normalize": True},
    },
    "della": {
        **THREE,
        "genes": {"weight": WEIGHTS, "density": DENSITIES, "epsilon": [0.15, 0.1, 0.2]},
    },
    "della_linear": {**THREE, "genes": {"weight": WEIGHTS, "density": [0.5, 0.3, 0.7]}},
    "della all": {**THREE, "genes": {"weight": WEIGHTS}},
    "breadcrumbs": {
        **THREE,
        "genes": {"weight": WEIGHTS, "density": DENSITIES, "gamma": [0.1, 0.1, 0.2]},
    },
    "breadcrumbs_ties": {
        **THREE,
        "genes": {"weight": WEIGHTS, "density": DENSITIES, "gamma": [0.1, 0.1, 0.2]},
    },
    "sce": {**THREE, "genes": {"select_topk": 0.3}},
    "sce all": {**THREE, "genes": {}},
    "sce small": {"models": "de", "base": "base", "genes": {"select_topk": 0.5}},
    "ram": {**THREE, "genes": {"epsilon": 0.05}},
    "ramplus_tl": {**THREE, "genes": {"epsilon": 0.1, "r": 0.5, "alpha": 0.9}},
    "model_stock": {**THREE, "genes": {}},
    "model_stock apart": {"models": "af", "base": "base", "genes": {}},
    "model_stock rows": {**THREE, "genes": {"filter_wise": True}},
    "nearswap": {"models": "a", "base": "base", "genes": {"t": 0.05}},
    "nearswap tiny": {"models": "d", "base": "base", "genes": {"t": 3e-7}},
    "arcee_fusion": {"models": "a", "base": "base", "genes": {}},
    "passthrough": {"models": "a", "genes": {"scale": [1.25]}},
}


def main() -> None:
    torch.bernoulli = torch.Tensor.bernoulli = drawn
    torch.Tensor.bernoulli_ = lambda self, p=0.5, **_: self.copy_(drawn(torch.full_like(self, p)))
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)  # mergekit takes other paths for names on the hub
        arrays = {
            f"{name}/{tensor}": values
            for name in make_models()
            for tensor, values in read(Path(name)).items()
        }
        for case in CASES:
            DRAWN.clear()
            for tensor, values in merge(case).items():
                arrays[f"{case}/{tensor}"] = values
            print(f"{case}: {len(DRAWN)} draws", flush=True)
    described = {case: {"method": case.split()[0], **row} for case, row in CASES.items()}
    OUT.parent.mkdir(exist_ok=True)
    np.savez_compressed(OUT, cases=np.array(json.dumps(described)), **arrays)
    print(f"{OUT}: {OUT.stat().st_size / 1000:.0f} kB")


def make_models() -> list[str]:
    """base; a, b, c fine-tuned in part alike; d and e very near to base, g near; f away from a."""
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).float()
    rng = np.random.default_rng(0)
    shapes = {name: tuple(each.shape) for name, each in model.state_dict().items()}
    base, common, own = (
        {name: rng.normal(size=shape) for name, shape in shapes.items()} for _ in range(3)
    )

    def change(name: str, model: str) -> np.ndarray:
        noise = np.random.default_rng(ord(model[0])).normal(size=(100, *shapes[name]))[-1]
        if model in "de":
            return 1e-6 * noise
        if model == "g":
            return 0.01 * noise
        return 0.1 * (-common[name] - own[name] if model == "f" else common[name] + noise)

    for model_name in ("base", *"abcdefg"):
        state = {
            name: torch.tensor(
                base[name] + (0 if model_name == "base" else change(name, model_name)),
                dtype=torch.float32,
            )
            for name in shapes
        }
        model.load_state_dict(state)
        model.save_pretrained(model_name)
    return ["base", *"abcdefg"]


def merge(case: str) -> dict[str, np.ndarray]:
    row = CASES[case]
    genes, models = row["genes"], row["models"]
    config = {
        "merge_method": case.split()[0],
        "dtype": row.get("dtype", "float32"),
        "parameters": {name: gene for name, gene in genes.items() if not isinstance(gene, list)},
        "models": [
            {
                "model": f"./{model}",
                "parameters": {
                    name: gene[k] for name, gene in genes.items() if isinstance(gene, list)
                },
            }
            for k, model in enumerate(models)
        ],
    }
    if "base" in row:
        config["base_model"] = f"./{row['base']}"
    # Through YAML, as users write it.
    checked = MergeConfiguration.model_validate(yaml.safe_load(yaml.safe_dump(config)))
    run_merge(checked, "merged", options=MergeOptions(copy_tokenizer=False))
    return read(Path("merged"))


def read(directory: Path) -> dict[str, np.ndarray]:
    """The tensors that are compared; of bfloat16 the bits."""
    (file,) = directory.glob("*.safetensors")
    tensors = load_file(file)
    return {
        name: tensors[name].view(torch.uint16).numpy()
        if tensors[name].dtype == torch.bfloat16
        else tensors[name].numpy()
        for name in TENSORS
    }


def drawn(probability: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    """1 where a fixed number for the place is below the probability."""
    DRAWN.append(probability.numel())
    numbers = np.random.default_rng(1).uniform(size=tuple(probability.shape))
    return (torch.tensor(numbers).to(probability.dtype) < probability).to(probability.dtype)


if __name__ == "__main__":
    main()
