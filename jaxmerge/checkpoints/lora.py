"""LoRA adapters in PEFT's format, as whole models: W = base + scale * B A (arXiv 2106.09685).

The sum is formed row by row in float32 as the leaves are read, and rounded once to the base's
dtype. What is merged later are these weights, never the factors: a sum of B's times a sum of A's is
not the sum of the products.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from jaxmerge.checkpoints import directory
from jaxmerge.checkpoints.directory import read_values
from jaxmerge.checkpoints.leaves import Keep, Values, as_read, restore_leaves
from jaxmerge.checkpoints.safetensors import Tensor, parse_json, read_header
from jaxmerge.checkpoints.source import Source
from jaxmerge.errors import JaxmergeError
from jaxmerge.trees import PyTree

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

# Fields of the config that are heeded, or that say how the adapter was made and not what it means.
# Any other must be off: null, false or empty.
_UNDERSTOOD = frozenset(
    """
    peft_type r lora_alpha use_rslora rank_pattern alpha_pattern base_model_name_or_path
    target_modules exclude_modules modules_to_save bias layers_to_transform layers_pattern
    task_type auto_mapping peft_version revision inference_mode lora_dropout init_lora_weights
    megatron_core loftq_config eva_config corda_config lora_ga_config qalora_group_size
    runtime_config ensure_weight_tying
    """.split()
)
_LINEAR = ("lora_B.weight", "lora_A.weight")  # left and right factor
_EMBEDDING = ("lora_embedding_B", "lora_embedding_A")
_PAIRS = (_LINEAR, _EMBEDDING)
# Multiplications at once: what BLAS does in the thread that asks, so that threads do not pile up.
_PRODUCT = 2**18
_KINDS = "|".join(map(re.escape, ("weight", "bias", *_LINEAR, *_EMBEDDING)))


class Change(NamedTuple):
    """What an adapter does to a tensor of its base."""

    whole: Tensor | None = None  # takes the tensor's place
    factors: tuple[Tensor, Tensor] | None = None  # scale times their product is added
    scale: float = 0.0
    transposed: bool = False  # an embedding: the product is [D, V]


class Adapter(NamedTuple):
    """An adapter whose headers are read, and the model that it is laid upon."""

    base: directory.Checkpoint
    changes: Mapping[str, Change]  # by the base's tensor


def recognises(path: epath.Path) -> bool:
    """Whether there is an adapter here, be it one that is refused."""
    return path.is_dir() and (path / CONFIG).exists()


def describe(
    name: str, path: epath.Path, subtree: str = "", base: str = "", item: str = ""
) -> Source:
    """Reads configs and headers of the adapter and of its base.

    Args:
        name: unique in the pool.
        path: the adapter's directory.
        subtree: not heeded: a directory holds parameters alone.
        base: directory of the base; "": the one that the adapter names.
        item: not heeded, as `subtree`.

    Raises:
        JaxmergeError: there is no base here; the adapter is of a kind, or has tensors, that are not
            understood.
    """
    base = str(epath.Path(base or _named_base(path)).expanduser().resolve())
    adapter = _read(path, base)
    return Source(
        name=name,
        path=str(path),
        format="lora",
        abstract=directory.abstract(adapter.base),
        subtree="",
        architecture=adapter.base.architecture,
        checksums={},
        directory=base,
        base=base,
    )


def restore(source: Source, abstract: PyTree, keep: Keep = as_read) -> PyTree:
    """Reads the base with the adapter added, leaf by leaf into the shards.

    Args:
        source: from `describe`.
        abstract: `ShapeDtypeStruct` with shardings, dtypes as stored; leaves that it leaves out
            are not read.
        keep: called with the name of each leaf and the leaf, which what it returns replaces.

    Raises:
        JaxmergeError: a file can't be read or is cut short.
    """
    adapter = _read(epath.Path(source.path), source.base)
    return restore_leaves(abstract, adapter.base.layout, _values(adapter), keep)


def _values(adapter: Adapter) -> Values:
    base = adapter.base.tensors

    @functools.lru_cache(maxsize=4)  # a tensor is read in blocks, each of which needs the factors
    def factors(name: str) -> tuple[np.ndarray, np.ndarray]:
        change = adapter.changes[name]
        left, right = (_whole(tensor) for tensor in change.factors or ())
        return (right.T, left.T) if change.transposed else (left, right)

    def values(name: str, first: int, out: np.ndarray) -> None:
        change = adapter.changes.get(name, Change())
        tensors = {name: change.whole or base[name]}
        if not change.factors:
            return read_values(tensors, name, first, out)
        width = base[name].shape[1]
        start, stop = first // width, -(-(first + out.size) // width)
        rows = np.empty((stop - start, width), np.float32)
        read_values(tensors, name, start * width, rows.reshape(-1))
        left, right = factors(name)
        step = max(_PRODUCT // right.size, 1)
        for i in range(start, stop, step):
            end = min(i + step, stop)
            rows[i - start : end - start] += (left[i:end] @ right) * np.float32(change.scale)
        out[:] = rows.reshape(-1)[first - start * width :][: out.size]
        return None

    return values


def _whole(tensor: Tensor) -> np.ndarray:
    values = np.empty(tensor.shape, np.float32)
    read_values({"": tensor}, "", 0, values.reshape(-1))
    return values


def _named_base(path: epath.Path) -> str:
    named = str(_config(path).get("base_model_name_or_path") or "")
    if not named or not epath.Path(named).is_dir():
        raise JaxmergeError(
            "the adapter's base is not here",
            where=str(path / CONFIG),
            expected="pool.base: the directory of the base model",
            found=f"base_model_name_or_path {named!r}, which is no directory",
        )
    return named


def _read(path: epath.Path, base: str) -> Adapter:
    """Reads configs and headers; checks that each tensor of the adapter has its place."""
    config = _config(path)
    if not (path / WEIGHTS).exists():
        pickled = (path / PICKLE).exists()
        raise JaxmergeError(
            "the adapter is pickled, and to unpickle is to run the code of whoever wrote it"
            if pickled
            else "the adapter has no weights",
            where=str(path / PICKLE if pickled else path),
            expected=f"{WEIGHTS}; peft converts: PeftModel.from_pretrained(BASE, DIR)"
            ".save_pretrained(NEW)",
        )
    if (path / directory.WEIGHTS).exists() or (path / directory.INDEX).exists():
        raise JaxmergeError("there are both an adapter and a whole model", where=str(path))
    model = directory.read(epath.Path(base))
    stored = read_header(path / WEIGHTS)
    problems: list[str] = []
    changes = _changes(stored, config, problems)
    for name, change in changes.items():
        problems += _problems(name, change, model)
    if problems:
        raise JaxmergeError(
            "the adapter can't be laid upon its base:\n  " + "\n  ".join(problems),
            where=str(path),
            expected=f"an adapter of {base}",
        )
    return Adapter(model, changes)


def _config(path: epath.Path) -> dict[str, Any]:
    """The adapter's config, if all that it says is understood."""
    file = path / CONFIG
    try:
        config = parse_json(file.read_bytes(), str(file))
    except OSError as error:
        raise JaxmergeError(
            "the file can't be read", where=str(file), found=error.strerror or str(error)
        ) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise JaxmergeError(
            "the adapter is of another kind",
            where=f"{file}, peft_type",
            expected="LORA",
            found=str(kind)[:80],
        )
    # fan_in_fan_out, use_dora, lora_bias, layer_replication, trainable_token_indices, ...
    others = {key: value for key, value in config.items() if value and key not in _UNDERSTOOD}
    if others:
        raise JaxmergeError(
            "the adapter is more than low-rank factors: "
            + ", ".join(f"{key} is {str(value)[:80]}" for key, value in others.items()),
            where=str(file),
            expected="LoRA, plain or rank-stabilised, with modules_to_save and biases",
        )
    _check_numbers(config, file)
    return config


def _check_numbers(config: Mapping[str, Any], file: epath.Path) -> None:
    """Raises unless ranks are whole numbers and alphas finite ones."""
    ranks, alphas = (config.get(key) or {} for key in ("rank_pattern", "alpha_pattern"))
    found = {"rank_pattern": ranks, "alpha_pattern": alphas}
    found |= {key: config.get(key) for key in ("r", "lora_alpha")}
    sound = isinstance(ranks, dict) and isinstance(alphas, dict)
    if not sound or not (
        all(type(rank) is int and rank > 0 for rank in (found["r"], *ranks.values()))
        and all(_is_number(alpha) for alpha in (found["lora_alpha"], *alphas.values()))
    ):
        raise JaxmergeError("ranks or alphas are no numbers", where=str(file), found=str(found))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _changes(
    stored: Mapping[str, Tensor], config: Mapping[str, Any], problems: list[str]
) -> dict[str, Change]:
    """What the adapter does, by the base's tensor; adds to `problems` what it can't place."""
    roles: dict[str, dict[str, Tensor]] = {}
    for name, tensor in stored.items():
        match = re.fullmatch(r"base_model\.model\.(.+?)\.(base_layer\.)?(" + _KINDS + ")", name)
        if not match:
            problems.append(f"tensor {name} is not known")
            continue
        module, kind = match[1], match[3]
        of_target = roles.setdefault(f"{module}.{'bias' if kind == 'bias' else 'weight'}", {})
        if kind in of_target:
            problems.append(f"tensor {name} has the place of another")
        of_target[kind] = tensor
    changes = {}
    for target, tensors in roles.items():
        whole = tensors.pop("weight", None) or tensors.pop("bias", None)
        changes[target] = Change(whole)
        kinds = next((pair for pair in _PAIRS if {*pair} == {*tensors}), None)
        if kinds:
            left, right = (tensors[kind] for kind in kinds)
            scale = _scale(target.removesuffix(".weight"), right, config, problems)
            changes[target] = Change(whole, (left, right), scale, kinds == _EMBEDDING)
        elif tensors:
            problems.append(f"{target} has {' and '.join(sorted(tensors))}, which are no pair")
    return changes


def _scale(module: str, right: Tensor, config: Mapping[str, Any], problems: list[str]) -> float:
    """alpha / r, or alpha / sqrt(r) where the adapter is rank-stabilised (arXiv 2312.03732)."""

    def of_module(pattern: str, default: int | float) -> int | float:
        matches = (
            value
            for regex, value in (config.get(pattern) or {}).items()
            if re.fullmatch(rf"(.*\.)?({regex})", module)  # as peft does; the first match holds
        )
        return next(matches, default)

    try:
        rank = of_module("rank_pattern", config["r"])
        alpha = of_module("alpha_pattern", config["lora_alpha"])
    except re.error as error:
        problems.append(f"rank_pattern or alpha_pattern: {error}")
        return 0.0
    if right.shape[:1] != (rank,):
        problems.append(f"{module} has factors {list(right.shape)}, by the config of rank {rank}")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _problems(name: str, change: Change, model: directory.Checkpoint) -> list[str]:
    """Why a change can't be made to the base; empty if it can."""
    shape = model.layout.tensors.get(name)
    embedding = {part.tensor for part in model.layout.leaves.get("embedding", ())}
    if model.architecture.get("tied_embeddings") and name in {*embedding, "lm_head.weight"}:
        tied = "the base's input and output embeddings are one tensor"
        return [f"{name} is changed, but {tied}: save it with tie_word_embeddings false first"]
    if shape is None:
        return [f"the base has no tensor {name}"]
    problems = []
    if change.whole and change.whole.shape != shape:
        problems.append(f"{name} is {list(change.whole.shape)}, in the base {list(shape)}")
    if change.factors:
        left, right = (factor.shape for factor in change.factors)
        rank, product = right[:1], shape[::-1] if change.transposed else shape
        if len(shape) != 2 or left != product[:1] + rank or right != rank + product[1:]:
            problems.append(f"{name}: factors {list(left)} and {list(right)} do not make it")
    return problems
