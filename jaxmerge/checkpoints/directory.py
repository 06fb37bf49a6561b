"""A Hugging Face directory: its config, index and headers, checked before any tensor is read.

Nothing is unpickled, no code of a directory is run, and an index can't point outside of it.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxmerge.checkpoints.safetensors import Tensor, read_header, read_into
from jaxmerge.errors import JaxmergeError
from jaxmerge.models import config_keys
from jaxmerge.models.layout import BUFFERS, COMPUTED, Layout, Part
from jaxmerge.textfiles import read_json
from jaxmerge.trees import PyTree, nested

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_FILE = re.compile(r"[^/\\\0\ud800-\udfff]+\.safetensors")
_CHUNK = 2**24  # values compared at once

# What tied models may hold twice: a head that is the embedding.
HEAD = re.compile(
    r"(^|\.)(lm_head|embed_out)\.(weight|bias)$|^cls\.predictions\.decoder\.(weight|bias)$"
)
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|shared)\.weight$")
# How the classes of transformers that `models` has a decoder for are called.
_CAUSAL = ("ForCausalLM", "LMHeadModel")


class Checkpoint(NamedTuple):
    """A directory of which config and headers are read.

    Attributes:
        directory: where it is.
        architecture: `Model.architecture` of a decoder; {"model": "", "model_type": ...} where
            there is none for the config's `model_type`, or by tensor, with what else the config
            says of the computation; {} where there is no config.
        layout: what the leaves are made of; of an unknown model, each tensor is a leaf.
        tensors: where each tensor lies.
    """

    directory: epath.Path
    architecture: Mapping[str, Any]
    layout: Layout
    tensors: Mapping[str, Tensor]


def read(directory: epath.Path, *, by_tensor: bool = False) -> Checkpoint:
    """Reads config, index and headers: kilobytes, whatever the size of the model.

    Args:
        directory: of the model.
        by_tensor: take each tensor for a leaf, as if the model were unknown: it needs no
            transformers, which takes seconds to import.

    Raises:
        JaxmergeError: the weights are pickled or quantised; index or headers are not what they have
            to be; the tensors are not those of the config: then every difference is listed.
    """
    tensors = _tensors(directory)
    config = _config(directory)
    model_type = str(config.get("model_type", ""))
    causal = model_type and not by_tensor and _is_causal(config, tensors)
    model = _known(directory) if causal else None
    if model is None:
        said = config_keys.heeded(config)
        architecture = {**said, "model": ""} if said else {}
        return Checkpoint(directory, architecture, _layout_of(tensors), tensors)
    checkpoint = Checkpoint(
        directory, {"model": "decoder", **model.config.plain()}, model.layout, tensors
    )
    _check_tensors(checkpoint)
    return checkpoint


def known(directory: epath.Path) -> Layout | None:
    """The layout of a model for which there is a decoder, by its config alone."""
    found = _known(directory) if _config(directory).get("model_type") else None
    return found.layout if found else None


def _layout_of(tensors: Mapping[str, Tensor]) -> Layout:
    """Each tensor as a leaf, but for buffers that transformers computes."""
    shapes, wide = {}, {}
    for name, tensor in tensors.items():
        if any(re.search(regex, name) for regex in BUFFERS):
            continue
        shapes[name] = tensor.shape
        if tensor.dtype.itemsize == 8:
            wide[name] = tensor.dtype
            shapes[name] = (*tensor.shape, 2)
    parts = {name: (Part(name, 0, shape[0] if shape else 1),) for name, shape in shapes.items()}
    return Layout(parts, shapes, shapes, wide=wide)


def _is_causal(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Whether it is a causal language model: no reward model, no embedding without a head, ...

    Its class decides, where that is one of transformers'; other names need not mean anything, so
    then the tensors do.
    """
    body = any(name.startswith("model.") for name in tensors)
    named = config.get("architectures")
    if not isinstance(named, list) or not named:
        return True
    if any(str(name).endswith(_CAUSAL) for name in named):
        return body
    return body and all(name.startswith(("model.", "lm_head.")) for name in tensors)


def abstract(checkpoint: Checkpoint) -> PyTree:
    """The leaves as `ShapeDtypeStruct`: nested for a decoder, by tensor for an unknown model."""
    leaves = {
        name: jax.ShapeDtypeStruct(shape, _leaf_dtype(checkpoint, name))
        for name, shape in checkpoint.layout.shapes.items()
    }
    if not checkpoint.architecture.get("model"):
        return leaves
    return nested(leaves)


def read_values(
    tensors: Mapping[str, Tensor],
    name: str,
    first: int,
    out: np.ndarray,
    read: Callable[[str, int, np.ndarray], None] = read_into,
) -> None:
    """Sets out[:] to the values of a tensor in C order, from `first` on, in the dtype of `out`.

    Args:
        tensors: where they lie.
        name: of the tensor.
        first: place of the first value.
        out: contiguous.
        read: reads bytes, see `safetensors.read_into`.
    """
    tensor = tensors[name]
    start = tensor.start + first * tensor.dtype.itemsize
    if tensor.dtype.itemsize == 8:  # in words, see `Layout.wide`
        return read(tensor.file, tensor.start + first * out.itemsize, out)
    if tensor.dtype == out.dtype:
        return read(tensor.file, start, out)
    stored = np.empty(out.shape, tensor.dtype)
    read(tensor.file, start, stored)
    out[:] = stored
    return None


def check_filled(tensors: Mapping[str, Any], where: epath.PathLike) -> None:
    """Raises `JaxmergeError` where tensors or leaves have shape [0]: they are kept elsewhere."""
    empty = [name for name, tensor in tensors.items() if tensor.shape == (0,)]
    if empty:
        raise JaxmergeError(
            "tensors of shape [0], as a sharded trainer (DeepSpeed ZeRO-3, FSDP) leaves them in "
            "the place of those that it keeps elsewhere",
            where=str(where),
            expected="the gathered weights: stage3_gather_16bit_weights_on_model_save, "
            "zero_to_fp32.py, or a full state dict of FSDP",
            found=f"{len(empty)} of {len(tensors)}: {', '.join(empty[:5])}",
        )


def _tensors(directory: epath.Path) -> dict[str, Tensor]:
    """Where each tensor lies, all of them with values."""
    tensors = _located(directory)
    check_filled(tensors, directory)
    return tensors


def _located(directory: epath.Path) -> dict[str, Tensor]:
    """Where each tensor lies: in the single file, if there is one, as in transformers."""
    single, index = directory / WEIGHTS, directory / INDEX
    if single.exists():
        tensors = read_header(single)
        if index.exists():
            _check_stale(directory, index, tensors)
        return tensors
    if not index.exists() and not any((directory / name).exists() for name in PICKLES):
        raise JaxmergeError(
            "there are no weights here", where=str(directory), expected=f"{WEIGHTS} or {INDEX}"
        )
    if not index.exists():
        raise JaxmergeError(
            "the weights are pickled, and to unpickle is to run the code of whoever wrote them",
            where=str(directory),
            expected="safetensors; transformers converts them: AutoModelForCausalLM"
            ".from_pretrained(DIR, weights_only=True).save_pretrained(NEW)",
        )
    return _sharded(directory, index)


def _check_stale(directory: epath.Path, index: epath.Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises where the single file lacks tensors that other files beside it have.

    An index that is left of shards that are gone, or that names the single file, says nothing.
    """
    lacking = {name: file for name, file in _weight_map(index).items() if name not in tensors}
    beside = [name for name, file in lacking.items() if (directory / file).exists()]
    if beside:
        raise JaxmergeError(
            f"{WEIGHTS}, which goes before an index, lacks tensors that the index has",
            where=str(directory),
            expected=f"all of them in {WEIGHTS}, or no such file, or no {INDEX}",
            found=f"{len(beside)} of them: {', '.join(beside[:5])}",
        )


def _weight_map(index: epath.Path) -> dict[str, str]:
    """The file of each tensor, by an index, which can't point outside of its directory."""
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names:
        raise JaxmergeError(
            "the index has no weight_map",
            where=str(index),
            expected="an index as transformers writes it; beside a single model.safetensors "
            "it can be removed",
        )
    for tensor, file in names.items():
        if not isinstance(file, str) or not _FILE.fullmatch(file):
            raise JaxmergeError(
                "the index names a file that need not be in its directory",
                where=f"{index}, tensor {tensor}",
                expected="the name of a .safetensors file, without directories",
                found=repr(file),
            )
    return names


def _sharded(directory: epath.Path, index: epath.Path) -> dict[str, Tensor]:
    """The tensors of all files that an index names, each in the file that it says."""
    names = _weight_map(index)
    headers = {file: read_header(directory / file) for file in sorted(set(names.values()))}
    problems = [
        f"{tensor} is to be in {file} and is not there"
        for tensor, file in names.items()
        if tensor not in headers[file]
    ]
    problems += [
        f"{tensor} is in {file}, where the index has {names.get(tensor, 'no such tensor')}"
        for file, header in headers.items()
        for tensor in header
        if names.get(tensor) != file
    ]
    if problems:
        raise JaxmergeError(
            "index and files do not agree:\n  " + "\n  ".join(problems),
            where=str(index),
            expected="index and files of one save: fetch those anew that are not",
        )
    return {tensor: headers[file][tensor] for tensor, file in names.items()}


def _known(directory: epath.Path) -> Any:
    """The decoder of a directory, see `families.read`; None where there is none for it."""
    from jaxmerge.models import families  # imports Flax, which takes half a second

    return families.read(str(directory))


def _config(directory: epath.Path) -> dict[str, Any]:
    """What `config.json` says; {} where there is none."""
    path = directory / "config.json"
    if not path.exists():
        return {}
    config = read_json(path)
    if not isinstance(config, dict):
        raise JaxmergeError(
            "the config is no JSON object",
            where=str(path),
            expected="config.json as transformers writes it",
        )
    if config.get("quantization_config"):
        raise JaxmergeError(
            "the checkpoint is quantised: its tensors are no weights that could be averaged",
            where=f"{path}, quantization_config",
            expected="weights in bfloat16, float16 or float32",
            found=str(config["quantization_config"])[:200],
        )
    return config


def with_defaults(directory: epath.Path) -> dict[str, Any]:
    """The architecture by tensor as transformers completes and renews it.

    Versions of transformers write the same config in different ways, and leave out what is default.
    What transformers does not know stays as it is written.
    """
    from transformers import CONFIG_MAPPING  # takes seconds to import

    from jaxmerge.models import families

    config = _config(directory)
    if config.get("model_type") in CONFIG_MAPPING:
        config = families.completed(config, str(directory / "config.json")).to_dict()
        config = config_keys.without_neutral(config)
    return {**config_keys.heeded(config), "model": ""}


def _check_tensors(checkpoint: Checkpoint) -> None:
    """Raises unless the tensors are exactly those of the layout, in name and shape."""
    expected = checkpoint.layout.tensors
    found = {
        name: tensor.shape
        for name, tensor in checkpoint.tensors.items()
        if name not in _twins(checkpoint)
        and not any(re.search(regex, name) for regex in checkpoint.layout.ignored)
    }
    problems = [f"no tensor {name}" for name in expected if name not in found]
    problems += [f"tensor {name} is not known" for name in found if name not in expected]
    problems += [
        f"tensor {name} is {list(found[name])}, by the config {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        raise JaxmergeError(
            "the weights are not those of the config:\n  " + "\n  ".join(problems),
            where=str(checkpoint.directory),
            expected="config.json and weights of one model: fetch those anew that are not",
        )


def _twins(checkpoint: Checkpoint) -> dict[str, str]:
    """Tensors that some versions of transformers wrote a second time, and what they must equal."""
    parts = checkpoint.layout.leaves.get("embedding", ())
    tied = checkpoint.architecture.get("tied_embeddings") and len(parts) == 1
    embedding = parts[0].tensor if tied else ""
    head = checkpoint.tensors.get("lm_head.weight")
    same = embedding and head and head.shape == checkpoint.layout.tensors[embedding]
    return {"lm_head.weight": embedding} if same else {}


def may_lack(name: str) -> bool:
    """Whether members that lack a tensor may mean the same: a tied head, a computed buffer."""
    return bool(HEAD.search(name)) or any(re.search(regex, name) for regex in COMPUTED)


def check_twins(checkpoint: Checkpoint) -> None:
    """Raises unless tensors that are there twice are the same, which takes reading them."""
    for twin, name in _twins(checkpoint).items():
        if not equal(checkpoint.tensors, name, twin):
            raise JaxmergeError(
                f"{twin} differs from {name}, but the config says that they are tied",
                where=str(checkpoint.directory),
                expected="tie_word_embeddings to be false in config.json, or no such tensor",
            )


def equal(tensors: Mapping[str, Tensor], one: str, other: str) -> bool:
    """Whether two floating-point tensors of one shape have the same values, which are read."""
    size = math.prod(tensors[one].shape)
    for first in range(0, size, _CHUNK):
        values = [np.empty(min(_CHUNK, size - first), np.float32) for _ in range(2)]
        read_values(tensors, one, first, values[0])
        read_values(tensors, other, first, values[1])
        if not np.array_equal(*values, equal_nan=True):
            return False
    return True


def _leaf_dtype(checkpoint: Checkpoint, name: str) -> np.dtype:
    """The narrowest dtype that holds all tensors of a leaf exactly, bfloat16 at least."""
    if name in checkpoint.layout.wide:
        return np.dtype(np.int32)
    stored = {checkpoint.tensors[part.tensor].dtype for part in checkpoint.layout.leaves[name]}
    floating = [dtype for dtype in stored if jnp.issubdtype(dtype, jnp.floating)]
    if len(floating) < len(stored) and len(stored) > 1:
        raise JaxmergeError(
            f"the tensors of leaf {name} have dtypes that can't be reconciled",
            where=str(checkpoint.directory),
            expected="floating point in all of them, or integers of one size",
            found=", ".join(sorted(map(str, stored))),
        )
    if not floating:
        return stored.pop()
    # float8 is a storage format: there is no arithmetic in it, and bfloat16 has all its values.
    wide = [np.dtype(jnp.bfloat16) if dtype.itemsize == 1 else dtype for dtype in floating]
    return functools.reduce(jnp.promote_types, wide)
