"""Compares the layouts of MaxText with what MaxText's own conversion makes of the same tensors.

MaxText needs an environment of its own, so it takes two commands, which meet in a directory:

    python tools/check_maxtext.py write DIR                 # in .venv
    MAXTEXT_VENV/bin/python tools/check_maxtext.py compare DIR

The second prints a line for each family and form, and ends with 1 where something differs. MaxText
0.2.5 names none of its dependencies: its conversion needs jax, transformers, and what
`python -c "import maxtext.checkpoint_conversion.utils.param_mapping"` asks for.
"""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

FORMS = {"maxtext": True, "maxtext_unscanned": False}
# MaxText's tables by our family; mistral has none there.
TABLES = {
    **{"llama": "LLAMA31", "mixtral": "MIXTRAL", "gemma2": "GEMMA2", "gemma3": "GEMMA3"},
    **{"qwen2": "QWEN", "qwen3": "QWEN", "qwen3_moe": "QWEN"},
}


def write(directory: Path) -> None:
    """Random models as Hugging Face's tensors, and as the leaves that we write."""
    from jaxmerge.checkpoints import huggingface, trainers
    from jaxmerge.checkpoints.tables import from_decoder
    from jaxmerge.trees import named_leaves
    from tests.checkpoints import trainers_test

    for family in TABLES:
        untied = {"tie_word_embeddings": False} if family == "qwen2" else {}
        base = trainers_test.directory(directory / family, family, **untied)
        leaves = named_leaves(trainers_test.params(base))
        layout = huggingface.layout(str(base))
        found: Any = {f"hf:{name}": np.zeros(shape) for name, shape in layout.tensors.items()}
        for name, parts in layout.leaves.items():
            values, at = np.asarray(leaves[name]).reshape(-1), 0
            for part in parts:
                rows = found[f"hf:{part.tensor}"][part.start : part.stop]
                rows[...] = values[at : at + rows.size].reshape(rows.shape)
                at += rows.size
        model = trainers.check("maxtext", str(base))
        for form in FORMS:
            for name, leaf in (trainers.table(model, form) or {}).items():
                found[f"{form}:{name}"] = np.asarray(from_decoder(leaves, leaf, model.config))
        np.savez(base / "arrays.npz", allow_pickle=False, **found)


def compare(directory: Path) -> bool:
    """Whether MaxText's conversion makes the same leaves, all of them and no other."""
    mapping = importlib.import_module("maxtext.checkpoint_conversion.utils.param_mapping")
    same = True
    for family, table in TABLES.items():
        config = json.loads((directory / family / "config.json").read_text())
        arrays = dict(np.load(directory / family / "arrays.npz"))
        for form, scanned in FORMS.items():
            ours = {k.split(":")[1]: v for k, v in arrays.items() if k.startswith(f"{form}:")}
            theirs = _converted(mapping, table, config, arrays, ours, scanned)
            wrong = [
                name
                for name in {**ours, **theirs}
                if name not in ours
                or name not in theirs
                or not np.allclose(ours[name], theirs[name], rtol=1e-6, atol=1e-6)
            ]
            print(f"{family} {form}: {len(theirs)} leaves, {len(wrong)} differ", *wrong[:5])
            same = same and not wrong
    return same


def _converted(
    mapping: Any, table: str, config: dict[str, Any], arrays: Any, ours: Any, scanned: bool
) -> dict[str, np.ndarray]:
    """The leaves that MaxText makes of a model's tensors."""
    tensors = {name[3:]: values for name, values in arrays.items() if name.startswith("hf:")}
    experts = config.get("num_local_experts", config.get("num_experts", 1))
    of_maxtext = SimpleNamespace(num_experts=experts, head_dim=config["head_dim"])
    if table == "GEMMA3":  # it has the model with images in mind
        config = {"text_config": config, "vision_config": {"num_hidden_layers": 0}}
        renamed = ((k.replace("model.", "model.language_model.", 1), v) for k, v in tensors.items())
        tensors = dict(renamed)
    names = getattr(mapping, f"{table}_MAXTEXT_TO_HF_PARAM_MAPPING")(config, of_maxtext, scanned)
    hooks = getattr(mapping, f"{table}_MAXTEXT_TO_HF_PARAM_HOOK_FN")(
        config, of_maxtext, scanned, saving_to_hf=False
    )
    found = {}
    for key, of in names.items():
        name = key.removeprefix("params-").replace("-", "/")
        chain = hooks.get(key) or []
        chain = chain if isinstance(chain, list) else [chain]
        first = of
        while isinstance(first, list):
            first = first[0]
        if first in tensors:  # the table has parts that a model need not have
            found[name] = _stacked(of, tensors, chain, ours[name].shape, scanned)
    return found


def _stacked(
    of: Any, tensors: Any, chain: Any, shape: tuple[int, ...], scanned: bool
) -> np.ndarray:
    """One tensor, or those of all layers (second axis) or experts (first), or of both."""

    def one(name: str, shape: tuple[int, ...]) -> np.ndarray:
        values = tensors[name]
        for hook in chain:
            values = np.asarray(hook(values, shape))
        return values

    if isinstance(of, str):
        return one(of, shape)
    if isinstance(of[0], list):
        return np.stack([np.stack([one(each, shape[2:]) for each in row]) for row in of])
    if not scanned:
        return np.stack([one(each, shape[1:]) for each in of])
    return np.stack([one(each, shape[:1] + shape[2:]) for each in of], 1)


if __name__ == "__main__":
    what, where = sys.argv[1], Path(sys.argv[2])
    if what == "write":
        sys.path.insert(0, str(Path(__file__).parents[1]))
        where.mkdir(parents=True, exist_ok=True)
        write(where)
    elif not compare(where):
        sys.exit(1)
