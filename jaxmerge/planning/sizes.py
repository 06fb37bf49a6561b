"""Sizes that a run takes where its config says 0: the candidates of a step, and the microbatch.

By arithmetic on shapes: a plan and a run take the same, and no program is compiled for it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax

from jaxmerge.models.model import Model
from jaxmerge.planning.estimate import arithmetic
from jaxmerge.planning.residency import Room
from jaxmerge.planning.work import Step

# Tokens of a microbatch at most. On the CPU more are not faster (docs/decisions/sizes.md); on
# accelerators this is where products of a model of 1e9 parameters are long bound by operations, not
# by bytes.
_MOST_TOKENS = {"cpu": 8192}
_MOST_TOKENS_ELSEWHERE = 32_768
_LEAST_TOKENS = 256
_TOKENS_PER_ROW = 128  # as in the defaults, 64 rows of 8192 tokens
_USED = 0.9  # of the memory; the rest is for what arithmetic does not see


class Sizes(NamedTuple):
    """Of a step; 0: to be chosen.

    Attributes:
        candidates: that are merged together, on all devices.
        rows: of a microbatch, at most.
        tokens: of a microbatch, at most.
    """

    candidates: int
    rows: int
    tokens: int


def choose_sizes(
    asked: Sizes,
    model: Model,
    step: Step,
    room: Room,
    *,
    residency: str,
    population: int,
    vmap_candidates: int,
) -> Sizes:
    """The sizes of a run.

    Tokens: the most that fit beside one candidate for each place of `pop`, halved until they do.
    Candidates: one for each place of `pop` where they run one after the other from a pool on the
    device, since more are not faster; else, side by side or with a pass over a pool elsewhere for
    each step, the most that fit, up to a generation.

    Args:
        asked: by the config.
        model: of all candidates.
        step: whose `candidates` is of no account.
        room: of each device, before the pool is loaded.
        residency: where the pool will live.
        population: candidates of a generation.
        vmap_candidates: see `Responder`.
    """
    pop, platform = step.mesh.shape["pop"], step.mesh.devices.flat[0].platform
    room_here = int(_USED * room.device)

    def taken(here: int, tokens: int) -> int:
        need = arithmetic(step._replace(candidates=here * pop))
        side_by_side = min(vmap_candidates or (1 if platform == "cpu" else here), here)
        host = 0 if room.host else need.on_host(residency)
        working = side_by_side * (tokens * per_token(model, step) + step.layer)
        return need.on_device(residency) + host + working

    tokens = asked.tokens or _MOST_TOKENS.get(platform, _MOST_TOKENS_ELSEWHERE)
    least = -(-asked.candidates // pop) or 1
    while not asked.tokens and tokens > _LEAST_TOKENS and taken(least, tokens) > room_here:
        tokens //= 2
    here = least
    gains = residency != "device" or (vmap_candidates != 1 and platform != "cpu")
    useful = -(-population // pop)
    while gains and not asked.candidates and here < useful and taken(here + 1, tokens) <= room_here:
        here += 1
    rows = asked.rows or max(tokens // _TOKENS_PER_ROW, 1)
    return Sizes(here * pop, rows, tokens)


def per_token(model: Model, step: Step) -> int:
    """Bytes of a device that a token of a microbatch takes: logits, its cache, activations.

    Logits and the cache are there twice at most: as they were, and as they become.
    """
    of: dict[str, Any] = dict(model.architecture)
    tensor, data = step.mesh.shape["tensor"], step.mesh.shape["data"]
    itemsize = max(leaf.dtype.itemsize for leaf in jax.tree.leaves(step.tree))

    def split(size: int) -> int:
        return size // tensor if size % tensor == 0 else size

    logits = 2 * 4 * split(model.vocabulary)
    if "kv_heads" not in of:
        return math.ceil(logits / data)
    heads = split(of["kv_heads"]) * of["head_width"]
    cache = 2 * 2 * of["layers"] * heads * itemsize
    activations = 4 * (4 * of["width"] + 3 * split(of["feed_forward"]))
    return math.ceil((logits + cache + activations) / data)
