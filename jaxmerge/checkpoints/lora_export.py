"""Merges of adapters of one base as one adapter, in PEFT's format.

With weights that sum to 1,

    sum_k w_k (W + s_k B_k A_k) = W + [w_1 s_1 B_1 | w_2 s_2 B_2 | ...] [A_1; A_2; ...]

which is exact, and of the rank of all together. Of fewer ranks, the best in the Frobenius norm is
what a singular value decomposition keeps; the factors are small, so the product is never formed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxmerge.checkpoints import adapter_config, directory, huggingface, lora
from jaxmerge.checkpoints.safetensors import in_file_order, make_header
from jaxmerge.checkpoints.source import Source
from jaxmerge.durable import appear, making
from jaxmerge.errors import JaxmergeError
from jaxmerge.hosts import processes
from jaxmerge.merge.groups import Groups
from jaxmerge.models.layout import Layout

NAME = "lora"
_SUM_ERROR = 1e-5  # of weights, which are float32
_PREFIX = "base_model.model."
_OTHERS = 'export.formats = ("huggingface",): a whole model'

Factors = tuple[np.ndarray, np.ndarray]  # [rows, r] and [r, columns] of a stored tensor


class Written(NamedTuple):
    """What was written.

    Attributes:
        rank: of most factors.
        exact: the rank that they have where nothing is left out.
        error: |what is left out| / |the whole change|, Frobenius norms over all tensors.
        worst: that of the tensor where it is largest.
        tensor: its name.
    """

    rank: int
    exact: int
    error: float
    worst: float
    tensor: str

    def __str__(self) -> str:
        if not self.tensor:
            return f"one adapter of rank {self.rank}, which is the merge exactly, up to rounding"
        return (
            f"one adapter of rank {self.rank}, of {self.exact} that the merge has: its change of "
            f"the base has a relative error of {self.error:.3g} (Frobenius norm), and of "
            f"{self.worst:.3g} in the worst tensor, {self.tensor}"
        )


def check_settings(formats: Sequence[str], *, method: str = "linear", constraint: str = "") -> None:
    """Raises `JaxmergeError` unless merges by a method, of weights of a constraint, can be one."""
    if NAME in formats and (method != "linear" or constraint == "free"):
        raise JaxmergeError(
            "an adapter keeps its base: only weighted sums, of weights that sum to 1, are one",
            where="export.formats, lora",
            expected='merge.method = "linear" and space.constraint = softmax, abs or signed; or '
            + _OTHERS,
            found=method if method != "linear" else constraint,
        )


def check(sources: Sequence[Source]) -> None:
    """Raises `JaxmergeError` unless a merge of these can be written as an adapter."""
    base = next((source.base for source in sources if source.format == "lora"), "")
    for source in sources:
        of_base = source.format == "huggingface" and os.path.realpath(source.path) == base
        if not base or source.rows or not (source.base == base or of_base):
            raise JaxmergeError(
                "only merges of adapters of one base, in its vocabulary, are an adapter",
                where=source.path,
                expected=f"adapters of {base or 'one model'}; or {_OTHERS}",
                found=f"a {source.format} checkpoint"
                + (f" of {source.base}" if source.base else ""),
            )
        if source.format == "lora":
            _check_changes(source)


def check_weights(weights: Any) -> None:
    """Raises `JaxmergeError` unless weights sum to 1 over the checkpoints, the last axis."""
    total = np.sum(np.asarray(weights, np.float64), axis=-1)
    if np.abs(total - 1).max() > _SUM_ERROR:
        raise JaxmergeError(
            "an adapter keeps its base as it is, so its merge has weights that sum to 1",
            where="export.formats, lora",
            expected=f"each weight divided by their sum; or {_OTHERS}",
            found=f"a sum of {float(np.ravel(total)[np.abs(total - 1).argmax()]):.6g}",
        )


def write(
    path: Path,
    sources: Sequence[Source],
    weights: np.ndarray,
    groups: Groups | None = None,
    *,
    rank: int = 0,
    dtype: str = "",
    tokenizer: str = "",
    card: Callable[[str, Written], str],
) -> Written | None:
    """Writes a merge as an adapter; its directory appears whole or not at all.

    Args:
        path: the directory to make. Of several processes the first alone writes.
        sources: adapters of one base, which may be among them.
        weights: `[K]`, or `[G, K]` of groups.
        groups: of the leaves.
        rank: of the factors at most, the best in the Frobenius norm; 0: as many as it takes.
        dtype: of the factors; "": float32.
        tokenizer: directory of the tokenizer, which is copied unless it is the base's; "": none.
        card: text of README.md, of the base as the adapters name it.

    Raises:
        JaxmergeError: see `check` and `check_weights`; it can't be written.
    """
    if not processes.first():
        return None
    check(sources)
    check_weights(weights)
    made = _Merged(sources, np.asarray(weights, np.float64), groups, rank)
    tensors = dict(made.tensors())
    if not made.ranks:
        raise JaxmergeError(
            "the adapters change nothing that factors make",
            where=str(path),
            expected="adapters with factors; or export.formats without lora",
        )
    stored = jnp.dtype(dtype or "float32")
    factors = {name: np.ascontiguousarray(values, stored) for name, values in tensors.items()}
    config, written = made.config(), made.written()
    with making(path, "the adapter") as new:
        order = in_file_order({name: values.dtype for name, values in factors.items()})
        with open(new / lora.WEIGHTS, "wb") as stream:
            stream.write(make_header((n, factors[n].dtype, factors[n].shape) for n in order))
            for name in order:
                stream.write(factors[name].tobytes())
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (new / adapter_config.CONFIG).write_text(text, encoding="utf-8")
        if tokenizer and os.path.realpath(tokenizer) != os.path.realpath(made.base):
            huggingface.copy_tokenizer(Path(tokenizer), new)
        said = card(str(config["base_model_name_or_path"]), written)
        (new / "README.md").write_text(said, "utf-8", errors="backslashreplace")
        appear(new, path)
    return written


class _Merged:
    """The factors of a merge, tensor by tensor."""

    def __init__(
        self, sources: Sequence[Source], weights: np.ndarray, groups: Groups | None, rank: int
    ):
        self._members = [
            (k, adapter, lora.Reader(adapter))
            for k, source in enumerate(sources)
            if source.format == "lora"
            for adapter in [lora.read(epath.Path(source.path), source.base)]
        ]
        adapter = next(source for source in sources if source.format == "lora")
        self.base, self._path = adapter.base, adapter.path
        self._model = self._members[0][1].base
        self._weights, self._groups, self._rank = weights, groups, rank
        self.ranks: dict[str, int] = {}  # by module
        self._exact = 0
        self._saved: list[str] = []  # modules that are kept whole
        self._errors: dict[str, tuple[float, float]] = {}  # squares: left out, whole change

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """The tensors of the adapter."""
        changed = dict.fromkeys(name for _, adapter, _ in self._members for name in adapter.changes)
        for name in changed:
            module = name.removesuffix(".weight")
            changes = [adapter.changes.get(name) for _, adapter, _ in self._members]
            if any(change and change.factors for change in changes):
                transposed = any(change and change.transposed for change in changes)
                left, right = self._factors(name)
                self.ranks[module] = right.shape[0]
                first, second = (left.T, right.T) if transposed else (right, left)
                embedding = bool(directory.EMBEDDING.search(name))
                kinds = "lora_embedding_{}" if embedding else "lora_{}.weight"
                yield f"{_PREFIX}{module}.{kinds.format('A')}", first
                yield f"{_PREFIX}{module}.{kinds.format('B')}", second
            else:
                self._saved.append(module)
                yield f"{_PREFIX}{name}", self._whole(name)

    def config(self) -> dict[str, Any]:
        """adapter_config.json; alpha is the rank, so that the product is not scaled."""
        most = self._most()
        others = {module: rank for module, rank in self.ranks.items() if rank != most}
        read = adapter_config.read(epath.Path(self._path))
        conv1d = lora.is_transposed(read, self._model)
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM" if self._model.architecture.get("model") else None,
            "base_model_name_or_path": read.base or self.base,
            "r": most,
            "lora_alpha": most,
            "rank_pattern": others,
            "alpha_pattern": others,
            "target_modules": _targets(self.ranks, self._model.layout),
            "modules_to_save": self._saved or None,
            "bias": "none",
            "lora_dropout": 0.0,
            "fan_in_fan_out": conv1d,
            "inference_mode": True,
        }

    def written(self) -> Written:
        lost, whole = (sum(each) for each in zip(*self._errors.values()))
        errors = {name: _ratio(*each) for name, each in self._errors.items()}
        worst = max(errors, key=errors.__getitem__)
        tensor = worst if errors[worst] > 0 else ""
        return Written(self._most(), self._exact, _ratio(lost, whole), errors[worst], tensor)

    def _most(self) -> int:
        """The rank that most modules have."""
        ranks = list(self.ranks.values())
        return max(set(ranks), key=ranks.count)

    def _factors(self, name: str) -> Factors:
        """Those of the whole merge, in the orientation in which the tensor is stored."""
        lefts, rights = [], []
        rows = _row_weights(name, self._model.layout, self._groups, self._weights)
        for k, adapter, reader in self._members:
            if name in adapter.changes:
                for left, right in reader.products(name):
                    lefts.append(rows[:, k, None] * left)
                    rights.append(np.asarray(right, np.float64))
        left, right = np.concatenate(lefts, axis=1), np.concatenate(rights)
        limit = min(left.shape[0], right.shape[1], len(right))
        self._exact = max(self._exact, limit)
        wanted = min(self._rank or limit, limit)
        if wanted == len(right):
            self._errors[name] = (0.0, float(((left.T @ left) * (right @ right.T)).sum()))
            return left, right
        left, right, lost, whole = _best(left, right, wanted)
        self._errors[name] = (lost if wanted < limit else 0.0, whole)
        return left, right

    def _whole(self, name: str) -> np.ndarray:
        """The weighted sum of a tensor that members trained as a whole; the others have the base's.

        What the base among the members adds is its weight times the base's tensor.
        """
        shape = self._model.layout.tensors[name]
        rows = _row_weights(name, self._model.layout, self._groups, self._weights)
        stored = np.empty(shape, np.float32)
        directory.read_values(self._model.tensors, name, 0, stored.reshape(-1))
        summed = stored.astype(np.float64)
        for k, _, reader in self._members:
            own = np.empty(shape, np.float32)
            reader(name, 0, own.reshape(-1))
            summed += (own - stored) * rows[:, k].reshape(-1, *[1] * (len(shape) - 1))
        return summed


def _check_changes(source: Source) -> None:
    """Raises for what factors and whole modules can't say."""
    adapter = lora.read(epath.Path(source.path), source.base)
    for name, change in adapter.changes.items():
        found = ""
        if change.magnitude:
            found = "rows have lengths of their own (DoRA)"
        elif change.whole and name.endswith(".bias"):
            found = "biases were trained"
        elif change.whole and change.factors and not _same(change.whole, adapter.base, name):
            found = "it was trained as a whole, and has factors besides"
        if found:
            raise JaxmergeError(
                f"{name} is more than the base and a product of factors: {found}",
                where=source.path,
                expected=f"adapters of factors and whole modules; or {_OTHERS}",
            )


def _same(whole: Any, base: directory.Checkpoint, name: str) -> bool:
    """Whether it is the base's tensor, which peft saves beside the factors of an embedding."""
    if whole.shape != base.tensors[name].shape:
        return False
    return directory.equal({"own": whole, "base": base.tensors[name]}, "own", "base")


def _row_weights(
    tensor: str, layout: Layout, groups: Groups | None, weights: np.ndarray
) -> np.ndarray:
    """The weights of each row of a tensor, `[rows, K]`, as its leaves have them."""
    if groups is None or weights.ndim == 1:
        return np.broadcast_to(weights, (layout.tensors[tensor][0], weights.shape[-1]))
    found = np.zeros((layout.tensors[tensor][0], weights.shape[-1]))
    for leaf, parts in layout.leaves.items():
        own = groups.weights(leaf, weights)
        for i, part in enumerate(parts):
            if part.tensor == tensor:  # experts of a layer follow each other
                row = own if own.ndim == 1 else own[i * len(own) // len(parts)]
                found[part.start : part.stop] = row
    return found


def _best(
    left: np.ndarray, right: np.ndarray, rank: int
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """The best factors of a rank in the Frobenius norm; squares of what is lost, and of all."""
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(right.T)
    u, s, v = np.linalg.svd(r_left @ r_right.T)
    root = np.sqrt(s[:rank])
    squares = np.square(s)
    new_left = (q_left @ u[:, :rank]) * root
    new_right = root[:, None] * (v[:rank] @ q_right.T)
    return new_left, new_right, float(squares[rank:].sum()), float(squares.sum())


def _ratio(lost: float, whole: float) -> float:
    return float(np.sqrt(lost / whole)) if whole else 0.0


def _targets(modules: Mapping[str, int], layout: Layout) -> list[str]:
    """Their last names, where no other module has one of these; else their full names."""
    last = {module.rsplit(".", 1)[-1] for module in modules}
    named = {
        name.removesuffix(".weight")
        for name in layout.tensors
        if name.endswith(".weight") and name.split(".")[-2] in last
    }
    return sorted(last if named == {*modules} else modules)
