"""Whether what a search or a merge has made still speaks, see `evaluation.speech`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxmerge.checkpoints.pool import load
from jaxmerge.checkpoints.source import Source
from jaxmerge.checkpoints.survey import find
from jaxmerge.config import Config
from jaxmerge.durable import as_json, read_json, replacing
from jaxmerge.errors import JaxmergeError
from jaxmerge.evaluation.evaluator import Evaluator
from jaxmerge.evaluation.speech import MEMBERS, PROMPTS, TOKENS, Verdict, listen
from jaxmerge.experiment import given
from jaxmerge.experiment.build import build_limits, build_model, build_tokenizer
from jaxmerge.experiment.prepare import Prepared
from jaxmerge.experiment.sources import huggingface_directory, members, where_of
from jaxmerge.planning.here import room_of
from jaxmerge.rundir import Candidate
from jaxmerge.search.archive import stacked
from jaxmerge.sharding import all_devices, make_mesh
from jaxmerge.tasks.requests import Generate, Prompt
from jaxmerge.trees import byte_count

FILE = "speech.json"


def of_search(config: Config, prepared: Prepared, winner: Candidate) -> str:
    """The warning of a searched merge that does not speak any more; "": it does, or none asked.

    The pool is where it was, so this takes no more memory than a step of the search.
    """
    if not config.export.speech_bytes:
        return ""
    evaluator = prepared.evaluators["search"]
    members = _heaviest(np.array(winner.by_checkpoint))
    alone = np.eye(len(winner.by_checkpoint), dtype=np.float32)
    weights_PxK = stacked([*(alone[k] for k in members), winner.coefficients])
    asked = [each for each in evaluator.first_requests(len(PROMPTS)) if isinstance(each, Generate)]
    prompts = [each.prompt for each in asked] or [Prompt(text) for text in PROMPTS]
    tokens = min([TOKENS, *(each.max_new_tokens for each in asked)])
    try:
        verdict = listen(lambda some: evaluator.ask(weights_PxK, some), prompts, tokens)
    except JaxmergeError as error:  # of a prompt of ours, which a short context has no room for
        return f"the merge was not asked whether it still speaks: {error.what}"
    return verdict.warning if verdict else ""


def of_merge(config: Config, workdir: Path, written: Sequence[Path]) -> None:
    """Warns of merges that do not speak any more, once; says why one could not be asked.

    Members and merge are read from disk once more, after the merge has let go of its memory: as
    much as `export.speech_bytes` allows, and half of what is free.

    Args:
        config: of the merge.
        workdir: of the run, where what was found is kept.
        written: the checkpoints that were written; of the formats of a merge one is asked.
    """
    if not config.export.speech_bytes:
        return
    file = workdir / FILE
    known: dict[str, Any] = read_json(file) if file.exists() else {}
    for path in {_name(path): path for path in reversed(written)}.values():
        if str(path) in known:
            continue
        try:
            found = _asked(config, path)
        except JaxmergeError as error:
            found = f"it was not asked whether it still speaks: {error.what}"
        if isinstance(found, str):
            known[str(path)] = {"asked": False, "why": found}
            _say(path, found)
            continue
        known[str(path)] = {"asked": True, **found._asdict(), "speaks": found.speaks}
        if found.warning:
            _say(path, found.warning)
    if known:
        with replacing(file) as temporary:
            temporary.write_bytes(as_json(known, indent=2))


def _name(path: Path) -> str:
    """Of a merge: the directory that its formats are in."""
    return path.parent.name


def _weights(config: Config, name: str, checkpoints: int) -> Sequence[float]:
    """The weights of a merge; (): its method takes none."""
    weights, names = given.weights_of(config, checkpoints), tuple(config.merge.names)
    if not weights or not isinstance(weights[0], tuple | list):
        return weights
    return weights[(names or tuple(map(str, range(len(weights))))).index(name)]


def _say(path: Path, what: str) -> None:
    print(f"jaxmerge: {path}: {what}", file=sys.stderr)


def _asked(config: Config, path: Path) -> Verdict | str:
    """What was found; or why nothing was."""
    where = where_of(config)
    found = find(members(config), **where)
    # A merge says itself where its parameters are.
    made: dict[str, Any] = where | {"item": "", "subtree": "", "vocabulary": ""}
    weights = _weights(config, _name(path), len(found)) or (1.0,) * len(found)
    sources = [*(found[k] for k in _heaviest(np.array(weights))), *find([str(path)], **made)]
    need, room = byte_count(sources[0].abstract) * (len(sources) + 1), _room(config)
    if need > room:
        return (
            f"it was not asked whether it still speaks: that would take {need / 2**30:.1f} GiB, "
            f"and export.speech_bytes and half of the free memory allow {room / 2**30:.1f}"
        )
    model = build_model(config, sources[0])
    directory = huggingface_directory(config, found)
    tokenizer = build_tokenizer(config, directory, model)
    mesh = make_mesh(devices=all_devices()[:1])
    loaded = load(sources, mesh, model.sharding_rules, dtype=_dtype(sources))
    evaluator = Evaluator(
        loaded.merge, model, tokenizer, [], "", mesh, limits=build_limits(config, directory)
    )
    one_hot = np.eye(len(sources), dtype=np.float32)
    prompts = [Prompt(text, form="text") for text in PROMPTS]
    verdict = listen(lambda requests: evaluator.ask(one_hot, requests), prompts)
    return verdict or (
        "it was not asked whether it still speaks: a member writes nothing after the prompts"
    )


def _room(config: Config) -> int:
    """Bytes that the check may take on the first device."""
    free = room_of(all_devices()[:1]).device
    return min(config.export.speech_bytes, free // 2)


def _dtype(sources: Sequence[Source]) -> str:
    """What the leaves are cast to: nothing where they are of the same dtypes."""
    import jax

    kinds = {
        tuple(str(leaf.dtype) for leaf in jax.tree.leaves(source.abstract)) for source in sources
    }
    return "" if len(kinds) == 1 else "float32"


def _heaviest(weights_K: Float[np.ndarray, " K"]) -> list[int]:
    """Which checkpoints have the largest weights, the sign aside."""
    return np.argsort(-np.abs(weights_K), kind="stable")[:MEMBERS].tolist()
