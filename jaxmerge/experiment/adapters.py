"""A merge of adapters as an adapter, as the config asks for it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmerge.checkpoints import card as cards
from jaxmerge.checkpoints import lora_export
from jaxmerge.checkpoints.source import Source
from jaxmerge.config import Config
from jaxmerge.experiment.sources import tokenizer_directory
from jaxmerge.merge.groups import Groups


def writer(
    config: Config,
    sources: Sequence[Source],
    weights: Any,
    card: Callable[[], str],
    groups: Groups | None = None,
) -> Callable[[Path], None]:
    """What writes a merge as an adapter to a path, and says how far from the merge it is.

    Args:
        config: of the run.
        sources: the checkpoints.
        weights: see `lora_export.write`.
        card: of the merge.
        groups: of leaves.
    """
    return functools.partial(_write, config, sources, np.asarray(weights), card, groups)


def _write(
    config: Config,
    sources: Sequence[Source],
    weights: np.ndarray,
    card: Callable[[], str],
    groups: Groups | None,
    path: Path,
) -> None:
    written = lora_export.write(
        path,
        sources,
        weights,
        groups if weights.ndim == 2 else None,
        rank=config.export.lora_rank,
        dtype=config.export.dtype,
        tokenizer=tokenizer_directory(config, sources),
        card=lambda base, found: cards.of_adapter(card(), base, str(found)),
    )
    if written:
        print(f"jaxmerge: {path}: {written}", file=sys.stderr)
