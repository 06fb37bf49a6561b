"""Adapters in PEFT's format, as whole models: LoRA (arXiv 2106.09685) and DoRA (2402.09353).

    W' = W - R + s B A             R: what PiSSA (2404.02948) or OLoRA (2406.01775) began with, or 0
    W' = m (W - R + s B A) / norm  DoRA: norm has the length of each row, over the inputs

The sum is formed row by row in float32 as the leaves are read, and rounded once to the base's
dtype. What is merged later are these weights, never the factors: a sum of B's times a sum of A's is
not the sum of the products.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from etils import epath

from jaxmerge.checkpoints import adapter_config, directory
from jaxmerge.checkpoints.adapter_config import CONFIG, AdapterConfig
from jaxmerge.checkpoints.directory import read_values
from jaxmerge.checkpoints.leaves import Keep, Values, as_read, restore_leaves
from jaxmerge.checkpoints.lora_starts import STARTS
from jaxmerge.checkpoints.rows import resized
from jaxmerge.checkpoints.safetensors import Tensor, read_header
from jaxmerge.checkpoints.source import Source
from jaxmerge.errors import JaxmergeError
from jaxmerge.trees import PyTree

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"

_LINEAR = ("lora_B.weight", "lora_A.weight")  # left and right factor
_EMBEDDING = ("lora_embedding_B", "lora_embedding_A")
_PAIRS = (_LINEAR, _EMBEDDING)
_MAGNITUDE = ("lora_magnitude_vector.weight", "lora_magnitude_vector")  # of now, of old versions
# Multiplications at once: what BLAS does in the thread that asks, so that threads do not pile up.
_PRODUCT = 2**18
_ROWS = 2**22  # values of a base that are looked at at once
_KINDS = "|".join(map(re.escape, ("weight", "bias", *_LINEAR, *_EMBEDDING, *_MAGNITUDE)))


class Change(NamedTuple):
    """What an adapter does to a tensor of its base."""

    whole: Tensor | None = None  # takes the tensor's place
    factors: tuple[Tensor, Tensor] | None = None  # scale times their product is added
    scale: float = 0.0
    transposed: bool = False  # the tensor is [input, output]: embeddings, Conv1D
    magnitude: Tensor | None = None  # the length of each output
    start: str = ""  # one of `adapter_config.RESIDUAL`: how the factors began


class Adapter(NamedTuple):
    """An adapter whose headers are read, and the model that it is laid upon."""

    base: directory.Checkpoint
    changes: Mapping[str, Change]  # by the base's tensor


class Laid(NamedTuple):
    """A base with an adapter added, tensor by tensor."""

    tensors: frozenset[str]
    values: Values
    files: Mapping[str, Tensor]  # where base and adapter lie


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
    adapter = read(path, base)
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
    adapter = read(epath.Path(source.path), source.base)
    layout, values = adapter.base.layout, Reader(adapter)
    if source.rows:
        values = source.rows.values(values, layout.tensors)
        layout = resized(layout, source.rows.count)
    return restore_leaves(abstract, layout, values, keep)


def laid(path: epath.Path, base: str) -> Laid:
    """The model that an adapter makes of its base, by the tensors of the base.

    Args:
        path: the adapter's directory.
        base: directory of the base.

    Raises:
        JaxmergeError: see `describe`.
    """
    adapter = read(path, base)
    changes = read_header(path / WEIGHTS)
    files = {f"adapter {name}": tensor for name, tensor in changes.items()}
    names = frozenset(adapter.base.layout.tensors)
    return Laid(names, Reader(adapter), {**adapter.base.tensors, **files})


class Reader:
    """The values of a model with its adapter; called from several threads."""

    def __init__(self, adapter: Adapter):
        self._adapter = adapter
        self._lock = threading.RLock()
        self._starts: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._lengths: dict[str, np.ndarray] = {}
        # A tensor is read in blocks, each of which needs the factors.
        self._factors = functools.lru_cache(maxsize=4)(self._read_factors)

    def __call__(self, name: str, first: int, out: np.ndarray) -> None:
        """Sets out[:] to the values of a tensor in C order, from `first` on."""
        change = self._adapter.changes.get(name, Change())
        if not change.factors:
            return self._stored(name, first, out)
        width = self._adapter.base.tensors[name].shape[1]
        start, stop = first // width, -(-(first + out.size) // width)
        rows = self._rows(name, start, stop)
        if change.magnitude and change.transposed:
            rows *= (_whole(change.magnitude) / self._column_lengths(name))[None]
        elif change.magnitude:
            lengths = np.sqrt(_squares(rows).sum(axis=1))
            rows *= (_whole(change.magnitude)[start:stop] / lengths).astype(np.float32)[:, None]
        out[:] = rows.reshape(-1)[first - start * width :][: out.size]
        return None

    def products(self, name: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """Pairs of factors `[rows, r]`, `[r, columns]` whose products are added to a tensor."""
        change, found = self._adapter.changes[name], []
        if change.factors:
            left, right = self._factors(name)
            found.append((change.scale * left.astype(np.float64), right))
        if change.start:
            left, right = self._start(name)
            found.append((-left, right))
        return found

    def _stored(self, name: str, first: int, out: np.ndarray) -> None:
        """The base's values, or those that take their place."""
        whole = self._adapter.changes.get(name, Change()).whole
        read_values({name: whole or self._adapter.base.tensors[name]}, name, first, out)

    def _rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of W - R + s B A, in float32."""
        change, width = self._adapter.changes[name], self._adapter.base.tensors[name].shape[1]
        rows = np.empty((stop - start, width), np.float32)
        self._stored(name, start * width, rows.reshape(-1))
        if change.start:
            left, right = self._start(name)
            rows -= left[start:stop] @ right
        left, right = self._factors(name)
        step = max(_PRODUCT // right.size, 1)
        for i in range(start, stop, step):
            end = min(i + step, stop)
            rows[i - start : end - start] += (left[i:end] @ right) * np.float32(change.scale)
        return rows

    def _read_factors(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        change = self._adapter.changes[name]
        left, right = (_whole(tensor) for tensor in change.factors or ())
        return (right.T, left.T) if change.transposed else (left, right)

    def _start(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Factors of R; they are computed once, by one thread."""
        change = self._adapter.changes[name]
        with self._lock:
            if name not in self._starts:
                shape = self._adapter.base.tensors[name].shape
                values = np.empty(shape, np.float32)
                self._stored(name, 0, values.reshape(-1))
                assert change.factors
                rank = change.factors[1].shape[0]
                weight = values.T if change.transposed else values
                left, right = STARTS[change.start](weight.astype(np.float64), rank, change.scale)
                both = (right.T, left.T) if change.transposed else (left, right)
                self._starts[name] = both[0].astype(np.float32), both[1].astype(np.float32)
            return self._starts[name]

    def _column_lengths(self, name: str) -> np.ndarray:
        """The length of each column of W - R + s B A, in float32; computed once."""
        with self._lock:
            if name not in self._lengths:
                height, width = self._adapter.base.tensors[name].shape
                squares, step = np.zeros(width), max(_ROWS // width, 1)
                for start in range(0, height, step):
                    rows = self._rows(name, start, min(start + step, height))
                    squares += _squares(rows).sum(axis=0)
                self._lengths[name] = np.sqrt(squares).astype(np.float32)
            return self._lengths[name]


def _squares(rows: np.ndarray) -> np.ndarray:
    """In float64, in which the sum of many float32 keeps all that they say."""
    return np.square(rows, dtype=np.float64)


def _whole(tensor: Tensor) -> np.ndarray:
    values = np.empty(tensor.shape, np.float32)
    read_values({"": tensor}, "", 0, values.reshape(-1))
    return values


def _named_base(path: epath.Path) -> str:
    named = adapter_config.read(path).base
    if not named or not epath.Path(named).expanduser().is_dir():
        raise JaxmergeError(
            "the adapter's base is not here",
            where=str(path / CONFIG),
            expected="pool.base: the directory of the base model",
            found=f"base_model_name_or_path {named!r}, which is no directory",
        )
    return named


def read(path: epath.Path, base: str) -> Adapter:
    """Reads configs and headers; checks that each tensor of the adapter has its place."""
    config = adapter_config.read(path)
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
        raise JaxmergeError(
            "there are both an adapter and a whole model",
            where=str(path),
            expected="the adapter in a directory of its own",
        )
    model = directory.read(epath.Path(base))
    stored = read_header(path / WEIGHTS)
    directory.check_filled(stored, path / WEIGHTS)
    problems: list[str] = []
    changes = _changes(stored, config, is_transposed(config, model), problems)
    for name, change in changes.items():
        problems += _problems(name, change, model)
    if problems:
        raise JaxmergeError(
            "the adapter can't be laid upon its base:\n  " + "\n  ".join(problems),
            where=str(path),
            expected=f"an adapter of {base}",
        )
    return Adapter(model, changes)


def is_transposed(config: AdapterConfig, model: directory.Checkpoint) -> bool:
    said = model.architecture
    known = bool(said.get("model"))
    return adapter_config.stored_transposed(config, str(said.get("model_type", "")), known)


def _changes(
    stored: Mapping[str, Tensor], config: AdapterConfig, transposed: bool, problems: list[str]
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
        lengths = [tensors.pop(kind) for kind in _MAGNITUDE if kind in tensors]
        kinds = next((pair for pair in _PAIRS if {*pair} == {*tensors}), None)
        changes[target] = Change(whole)
        if kinds:
            changes[target] = Change(
                whole,
                (tensors[kinds[0]], tensors[kinds[1]]),
                _scale(target.removesuffix(".weight"), tensors[kinds[1]], config, problems),
                transposed or kinds == _EMBEDDING,
                lengths[0] if lengths else None,
                config.start if kinds == _LINEAR else "",  # peft begins embeddings with zeros
            )
        elif tensors:
            problems.append(f"{target} has {' and '.join(sorted(tensors))}, which are no pair")
        if changes[target].start == "olora" and transposed:
            problems.append(f"{target} is stored as [input, output], for which peft has no OLoRA")
        if config.magnitudes and kinds and not lengths:
            problems.append(f"{target} has no lora_magnitude_vector, though use_dora is true")
        if lengths and not (config.magnitudes and kinds):
            why = "no factors" if config.magnitudes else "use_dora is not true"
            problems.append(f"{target} has a lora_magnitude_vector, but {why}")
    return changes


def _scale(module: str, right: Tensor, config: AdapterConfig, problems: list[str]) -> float:
    """The scale of a product, whose factors must be of the rank that the config says."""
    rank = config.rank_of(module)
    if right.shape[:1] != (rank,):
        problems.append(f"{module} has factors {list(right.shape)}, by the config of rank {rank}")
    return config.scale(module, rank)


def _problems(name: str, change: Change, model: directory.Checkpoint) -> list[str]:
    """Why a change can't be made to the base; empty if it can."""
    shape, said = model.layout.tensors.get(name), model.architecture
    # Models without a decoder tie them unless their config says otherwise, as transformers does.
    tied = said.get("tied_embeddings") or (
        not said.get("model") and said.get("tie_word_embeddings", True)
    )
    if tied and (directory.EMBEDDING.search(name) or directory.HEAD.search(name)):
        one = "the base's input and output embeddings are one tensor"
        return [f"{name} is changed, but {one}: save it with tie_word_embeddings false first"]
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
        elif change.magnitude and change.magnitude.shape != product[:1]:
            found = list(change.magnitude.shape)
            problems.append(f"{name}: its lora_magnitude_vector is {found}, not {[product[0]]}")
    return problems
