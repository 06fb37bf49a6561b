"""Disjoint splits of generated examples."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np

from jaxmerge.errors import JaxmergeError
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
