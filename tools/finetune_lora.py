"""LoRA adapters for `tools/finetune.py`: made, added to parameters, and saved as PEFT has them."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from safetensors.numpy import save_file

from jaxmerge.errors import JaxmergeError
from jaxmerge.models.layout import Layout
from jaxmerge.models.model import Params
from jaxmerge.trees import map_named

_PROJECTION = re.compile(r"layers/(query|key|value|out|gate|up|down)$")


class Adapter(NamedTuple):
    """LoRA of the L matrices of a leaf: W + B A, seen as [out, in] like Hugging Face's tensors."""

    a: Float[Array, "L rank in"]
    b: Float[Array, "L out rank"]


def make_adapters(layout: Layout, rank: int, key: Array) -> dict[str, Adapter]:
    """An adapter for every projection of attention and feed-forward: A random, B zero.

    Raises:
        JaxmergeError: a projection shares its tensor with others, or there is none.
    """
    adapters = {}
    for name, parts in layout.leaves.items():
        if not _PROJECTION.fullmatch(name):
            continue
        tensor = layout.tensors[parts[0].tensor]
        if parts[0].stop - parts[0].start != tensor[0]:
            raise JaxmergeError(
                "a projection shares its tensor with others, which LoRA here does not do",
                where=parts[0].tensor,
            )
        key, of_leaf = jax.random.split(key)
        a = jax.random.normal(of_leaf, (len(parts), rank, tensor[1])) * tensor[1] ** -0.5
        adapters[name] = Adapter(a, jnp.zeros((len(parts), tensor[0], rank)))
    if not adapters:
        raise JaxmergeError("the model has no projections that LoRA could adapt")
    return adapters


def adapt(params: Params, adapters: Mapping[str, Adapter]) -> Params:
    """The parameters with the adapters added."""

    def add(name: str, leaf: Array) -> Array:
        if name not in adapters:
            return leaf
        return leaf + jnp.matmul(adapters[name].b, adapters[name].a).reshape(leaf.shape)

    return map_named(add, params)


def save_adapters(
    out: str | os.PathLike[str], layout: Layout, adapters: Mapping[str, Adapter], base: str
) -> None:
    """Writes a PEFT directory, in float32: it is small, and small values matter in it."""
    tensors = {}
    for name, adapter in adapters.items():
        a, b = np.asarray(adapter.a), np.asarray(adapter.b)
        for layer, part in enumerate(layout.leaves[name]):
            module = f"base_model.model.{part.tensor.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(a[layer])
            tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(b[layer])
    rank = next(iter(adapters.values())).a.shape[1]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,  # the scale, lora_alpha / r, is 1
        "target_modules": sorted({name.split(".")[-3] for name in tensors}),
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    target = Path(out)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        save_file(tensors, partial / "adapter_model.safetensors", {"format": "pt"})
        (partial / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
