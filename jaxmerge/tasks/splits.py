"""Disjoint splits, of examples that are generated and of examples that are there already."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable

import numpy as np

from jaxmerge.errors import JaxmergeError, check_text
from jaxmerge.tasks.common import SPLITS, Example

Draw = Callable[[np.random.Generator], Example]

_OWNER = ("search", "search", "test", "test", "test") + ("train",) * 5  # of each tenth of prompts
_PATIENCE = 5_000  # draws in a row without a new prompt before a split counts as exhausted


def owner(prompt: str) -> str:
    """The split that this prompt belongs to, whatever the seed and the sizes.

    The CRC-32 of the prompt decides, so a checkpoint trained with one seed has never read a
    `search` or `test` prompt of any other seed or size.
    """
    return _OWNER[zlib.crc32(prompt.encode()) % len(_OWNER)]


def draw_splits(
    draw: Draw, *, name: str, seed: int, train: int, search: int, test: int
) -> dict[str, tuple[Example, ...]]:
    """Examples by split: as many as asked for, prompts all different and owned by their split.

    Every split has its own PCG64 stream, so the size of one changes nothing in another, and a
    larger split begins with the smaller one.

    Args:
        draw: makes one example at random.
        name: the task, for the error message.
        seed: of the three streams.
        train: examples in that split; `search` and `test` alike.

    Raises:
        JaxmergeError: fewer different prompts exist than were asked for.
    """
    sizes = {"train": train, "search": search, "test": test}
    splits = {}
    for stream, split in enumerate(SPLITS):
        rng = np.random.Generator(np.random.PCG64([stream, seed]))
        chosen: dict[str, Example] = {}
        misses = 0
        while len(chosen) < sizes[split]:
            example = draw(rng)
            if owner(example.prompt) == split and example.prompt not in chosen:
                chosen[example.prompt] = example
                misses = 0
            elif (misses := misses + 1) == _PATIENCE:
                raise JaxmergeError(
                    "the task has fewer examples than were asked for",
                    where=f"task {name}, split {split}",
                    expected=f"at most about {len(chosen)}",
                    found=str(sizes[split]),
                )
        splits[split] = tuple(chosen.values())
    return splits


def divide(
    examples: Iterable[Example],
    identity: Callable[[Example], str],
    *,
    name: str,
    search: int,
    test: int,
) -> dict[str, tuple[Example, ...]]:
    """The search and test splits of examples that are there already.

    The CRC-32 of its identity, modulo 5, decides where an example belongs: 0 and 1 are `search`,
    2 to 4 are `test`. So it stays in its split when others are added, whatever the sizes. A split
    is in the order of these CRC-32s: a smaller one is a random part of a larger one, which begins
    with it. Examples of equal identity count once.

    Args:
        examples: all there are.
        identity: what makes an example this one.
        name: the task, for the error message.
        search: examples in that split, at most; `test` alike.

    Raises:
        JaxmergeError: no example belongs to a split that was asked for.
    """
    by_identity = {identity(example): example for example in examples}
    check_text(f"task {name}", *by_identity)
    ordered = sorted((zlib.crc32(key.encode()), key) for key in by_identity)
    splits = {}
    for split, size in (("search", search), ("test", test)):
        owned = [by_identity[key] for crc, key in ordered if _OWNER[crc % 5] == split]
        if size and not owned:
            raise JaxmergeError(
                f"no example belongs to the {split} split",
                where=f"task {name}",
                expected=f"more examples, or {split}=0",
                found=f"{len(by_identity)} examples in all",
            )
        splits[split] = tuple(owned[:size])
    return splits


def public(name: str) -> str:
    """The warning of a task whose examples others report scores on."""
    return (
        f"{name} is a public test set. A search that it steers is fitted to it: afterwards scores "
        "on it, those of its test split included, no longer measure generalisation."
    )
