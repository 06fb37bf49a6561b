"""The merged model on disk: as an Orbax checkpoint, and as a Hugging Face directory."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxmerge.checkpoints import directory, huggingface, lora_export, orbax, trainers
from jaxmerge.checkpoints.rows import resized
from jaxmerge.checkpoints.source import Source
from jaxmerge.errors import JaxmergeError, check_least
from jaxmerge.hosts import processes
from jaxmerge.trees import PyTree, map_named, named_leaves

FORMATS = (*trainers.STORED, "huggingface", lora_export.NAME, *trainers.FORMS)


def place(path: Path, name: str) -> Path:
    """Where in the directory `merged` a format is written."""
    return path / ("merged.npz" if name == "npz" else name)


def in_order(written: Sequence[Path], formats: Sequence[str]) -> list[Path]:
    """What was written, in the order of its formats."""

    def number(path: Path) -> int:
        return [place(path.parent, name) for name in formats].index(path)

    return sorted(written, key=number)


def check(formats: Sequence[str], dtype: str, lora_rank: int = 0) -> None:
    """Raises `JaxmergeError` for a format, dtype or rank that can't be written."""
    check_least("export.lora_rank", lora_rank, 0)
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise JaxmergeError(
            "unknown format",
            where="export.formats",
            expected=f"some of {', '.join(FORMATS)}",
            found=unknown[0],
        )
    if dtype not in ("", "float32", "bfloat16", "float16"):
        raise JaxmergeError(
            "the export can't be of this type",
            where="export.dtype",
            expected='"", float32, bfloat16 or float16',
            found=dtype,
        )


def check_like(
    formats: Sequence[str],
    like: str,
    abstract: PyTree,
    *,
    by_tensor: bool = False,
    rope_type: str = "",
    rows: int = 0,
) -> None:
    """Raises `JaxmergeError` unless leaves can be written as the model of a directory.

    Args:
        formats: of `FORMATS`.
        like: Hugging Face directory, or "" when there is none.
        abstract: tree of the merged model's leaves.
        by_tensor: whether the leaves are the tensors, see `directory.read`.
        rope_type: see `trainers.write`.
        rows: of the embeddings, where they are others than the directory's; 0: they are not.
    """
    of_trainers = [name for name in formats if name in trainers.FORMS]
    for name in of_trainers:
        trainers.check(name, like, rope_type)
    if not of_trainers and ("huggingface" not in formats or not like):
        return
    expected = dict(resized(huggingface.layout(like, by_tensor=by_tensor), rows).shapes)
    found = {name: tuple(leaf.shape) for name, leaf in named_leaves(abstract).items()}
    wrong = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    if by_tensor:  # a tied model's head, and buffers, may be left out, see `survey`
        wrong = [name for name in wrong if name in found or not directory.may_lack(name)]
    if wrong:
        raise JaxmergeError(
            f"the checkpoints can't be written as the model of {like}",
            where="export.formats",
            expected='leaves of the same names and shapes, or formats=("orbax",)',
            found="; ".join(
                f"{name} {found.get(name, 'missing')}, there {expected.get(name, 'missing')}"
                for name in sorted(wrong)[:5]
            ),
        )


def export(
    path: str | Path,
    abstract: PyTree,
    leaf: Callable[[str], jax.Array],
    *,
    source: Source | None = None,
    formats: Sequence[str] = ("orbax", "huggingface"),
    architecture: Mapping[str, Any],
    like: str = "",
    tokenizer: str = "",
    dtype: str = "",
    shard_bytes: int = 5_000_000_000,
    card: Callable[[], str] = str,
    rope_type: str = "",
    adapter: Callable[[Path], object] = lambda path: None,
) -> list[Path]:
    """Writes all formats, each to its `place`; what is there already is left as it is.

    Args:
        path: the directory `merged`.
        abstract: tree of the merged model's leaves.
        leaf: the merged leaf of a name, such as `Pool.merged` gives it.
        source: the pool's first checkpoint; what is written by name is made like it where it is
            of the same format, see `orbax.save`.
        formats: of `FORMATS`; `huggingface` is left out when `like` is "".
        architecture: what the Orbax checkpoint says of its model.
        like: Hugging Face directory that the configuration and tokenizer are copied from.
        tokenizer: directory of another tokenizer and chat template; "": those of `like`.
        dtype: of the Hugging Face weights; "": that of the leaves.
        shard_bytes: size of its files at most, where no tensor alone is larger.
        card: text of its README.md; called when all leaves have been asked for.
        rope_type: see `trainers.write`.
        adapter: writes the format `lora` to a path, see `lora_export.write`.

    Returns:
        The places of all formats, which are there now.
    """
    path = Path(path).expanduser()
    wanted = [name for name in formats if name != "huggingface" or like]
    missing = lacking(path, wanted)
    alike = {source.format: source} if source else {}
    if "orbax" in missing:
        if missing != ["orbax"]:  # no leaf is merged twice
            tree = map_named(lambda name, _: leaf(name), abstract)
            leaf = named_leaves(tree).__getitem__
        like_source = alike.get("orbax")
        orbax.save(path / "orbax", abstract, architecture=architecture, like=like_source, leaf=leaf)
    for name in missing:
        if name == lora_export.NAME:
            adapter(path / name)
        elif name in trainers.STORED and name != "orbax":
            trainers.STORED[name].save(place(path, name), abstract, leaf, alike.get(name))
        elif name in trainers.FORMS:
            trainers.write(path / name, name, like, leaf, rope_type=rope_type)
    if "huggingface" in missing and not processes.first():
        for name in huggingface.layout(like).leaves:
            processes.gather(leaf(name))  # for process 0, which writes
    elif "huggingface" in missing:
        huggingface.save(
            path / "huggingface",
            huggingface.layout(like),
            functools.partial(_here, leaf),
            abstract=abstract,
            like=like,
            tokenizer=tokenizer,
            dtype=dtype,
            shard_bytes=shard_bytes,
            card=card,
        )
    return [place(path, name) for name in wanted]


def lacking(path: Path, wanted: Sequence[str]) -> list[str]:
    """The formats that are not there yet, as process 0 sees it."""
    there = processes.from_first(
        lambda: json.dumps([name for name in wanted if place(path, name).exists()]).encode()
    )
    return [name for name in wanted if name not in json.loads(there)]


def _here(leaf: Callable[[str], jax.Array], name: str) -> jax.Array:
    """A leaf in the memory of this process."""
    whole = leaf(name)
    if not processes.several():
        return whole
    cpu = jax.local_devices(backend="cpu")[0]
    return jax.device_put(processes.gather(whole), cpu)
