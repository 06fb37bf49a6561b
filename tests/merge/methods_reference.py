"""The methods in float64 and NumPy, written from the formulas alone; variant "paper"."""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Values = Any  # arrays of float64
Genes = Mapping[str, Any]


def linear(tensors: Sequence[Values], base: Any, genes: Genes, draw: Any) -> Values:
    weights = genes["weight"] / np.sum(genes["weight"]) if genes["normalize"] else genes["weight"]
    return sum(w * x for w, x in zip(weights, tensors))


def task_arithmetic(tensors: Sequence[Values], base: Values, genes: Genes, draw: Any) -> Values:
    whole = np.sum(genes["weight"]) if genes["normalize"] else 1
    return base + genes["lambda"] / whole * sum(
        w * (x - base) for w, x in zip(genes["weight"], tensors)
    )


def arc(first: Values, second: Values, t: float) -> Values:
    norms = np.linalg.norm(first), np.linalg.norm(second)
    if 0 in norms:
        return (1 - t) * first + t * second
    angle = math.acos(np.vdot(first, second) / norms[0] / norms[1])
    return (math.sin((1 - t) * angle) * first + math.sin(t * angle) * second) / math.sin(angle)


def slerp(tensors: Sequence[Values], base: Any, genes: Genes, draw: Any) -> Values:
    return arc(tensors[0], tensors[1], genes["t"])


def nuslerp(tensors: Sequence[Values], base: Any, genes: Genes, draw: Any) -> Values:
    t = genes["weight"][1] / sum(genes["weight"])
    first, second = (x if base is None else x - base for x in tensors)
    if genes["nuslerp_flatten"]:
        merged = arc(first, second, t)
    elif genes["nuslerp_row_wise"]:
        merged = np.stack([arc(a, b, t) for a, b in zip(first.T, second.T)]).T
    else:
        merged = np.stack([arc(a, b, t) for a, b in zip(first, second)])
    return merged if base is None else base + merged


def multislerp(tensors: Sequence[Values], base: Any, genes: Genes, draw: Any) -> Values:
    """With the step along the tangents, which is 0."""
    vectors = [x if base is None else x - base for x in tensors]
    norms = [np.linalg.norm(v) for v in vectors]
    weights = np.array(genes["weight"], np.float64)
    if genes["normalize_weights"]:
        weights = weights / weights.sum()
    units = [v / n for v, n in zip(vectors, norms)]
    mean = sum(w * u for w, u in zip(weights, units))
    mean = mean / np.linalg.norm(mean)
    tangent = sum(w * (u - np.vdot(u, mean) * mean) for w, u in zip(weights, units))
    size = np.linalg.norm(tangent)
    assert size < 1e-12
    merged = sum(w * n for w, n in zip(weights, norms)) * mean
    return merged if base is None else base + merged


def karcher(tensors: Sequence[Values], base: Any, genes: Genes, draw: Any) -> Values:
    norms = [np.linalg.norm(x) for x in tensors]
    units = [x / n for x, n in zip(tensors, norms)]
    u = sum(units) / np.linalg.norm(sum(units))
    for _ in range(int(genes["max_iter"])):
        tangent = np.zeros_like(u)
        for unit in units:
            cosine = np.vdot(u, unit)
            angle = math.acos(cosine)
            tangent += angle / math.sin(angle) * (unit - cosine * u) / len(units)
        size = np.linalg.norm(tangent)
        if size < genes["tol"]:
            break
        u = math.cos(size) * u + math.sin(size) * tangent / size
    return np.mean(norms) * u


def model_stock(tensors: Sequence[Values], base: Values, genes: Genes, draw: Any) -> Values:
    if genes["filter_wise"]:
        rows = [[x[i : i + 1] for x in (*tensors, base)] for i in range(len(base))]
        return np.concatenate(
            [model_stock(each[:-1], each[-1], {"filter_wise": False}, draw) for each in rows]
        )
    deltas, K = [x - base for x in tensors], len(tensors)
    cosines = [
        np.vdot(deltas[i], deltas[j]) / np.linalg.norm(deltas[i]) / np.linalg.norm(deltas[j])
        for i in range(K)
        for j in range(i)
    ]
    cosine = max(np.mean(cosines), 0)
    t = K * cosine / (1 + (K - 1) * cosine)
    return t * sum(tensors) / K + (1 - t) * base


def metagpt(tensors: Sequence[Values], base: Values, genes: Genes, draw: Any) -> Values:
    squares = [np.sum((x - base) ** 2) for x in tensors]
    return base + sum(s / sum(squares) * (x - base) for s, x in zip(squares, tensors))


def passthrough(tensors: Sequence[Values], base: Any, genes: Genes, draw: Any) -> Values:
    return genes["scale"][0] * tensors[0]


def how_many(part: float, of: int) -> int:
    units = round(float(np.float32(part)) * 2**24)
    return (units + (0 < units < 2**24)) * of // 2**24


def top(values: Values, count: int) -> Values:
    """Which are the largest; of equal ones the first."""
    order = np.argsort(-np.abs(values), axis=None, kind="stable")
    chosen = np.zeros(values.size, bool)
    chosen[order[:count]] = True
    return chosen.reshape(values.shape)


def same_norm(kept: Values, delta: Values, genes: Genes) -> Values:
    return kept * np.abs(delta).sum() / np.abs(kept).sum() if genes["rescale"] else kept


def largest(delta: Values, genes: Genes, draw: Any, k: int) -> Values:
    count = how_many(genes["density"][k], delta.size)
    return same_norm(np.where(top(delta, count), delta, 0), delta, genes)


def middle(delta: Values, genes: Genes, draw: Any, k: int) -> Values:
    n = delta.size
    keep, above = how_many(genes["density"][k], n), how_many(genes["gamma"][k], n)
    below = n - keep - above
    if below < 0:
        above, below = above + below, 0
    chosen = top(delta, n - below) & ~top(delta, above)
    return same_norm(np.where(chosen, delta, 0), delta, genes)


def random(delta: Values, genes: Genes, draw: Any, k: int) -> Values:
    density = genes["density"][k]
    kept = np.where(draw(k, delta.shape) < density, delta, 0)
    return kept / density if genes["rescale"] else kept


def by_rank(delta: Values, genes: Genes, draw: Any, k: int) -> Values:
    density, half = genes["density"][k], genes["epsilon"][k] / 2
    half = min(half, density, 1 - density)
    ranks = np.argsort(np.argsort(np.abs(delta), axis=-1), axis=-1)
    chance = density - half + 2 * half * ranks / (delta.shape[-1] - 1)
    kept = np.where(draw(k, delta.shape) < chance, delta, 0)
    return kept / np.where(kept == 0, 1, chance) if genes["rescale"] else kept


def summed(sparsify: Callable[..., Values]) -> Callable[..., Values]:
    def merge(tensors: Sequence[Values], base: Values, genes: Genes, draw: Any) -> Values:
        kept = [sparsify(x - base, genes, draw, k) for k, x in enumerate(tensors)]
        mixed = sum(w * d for w, d in zip(genes["weight"], kept))
        if genes["normalize"]:
            mixed = mixed / sum(genes["weight"])
        return base + genes["lambda"] * mixed

    return merge


def elected(sparsify: Callable[..., Values]) -> Callable[..., Values]:
    def merge(tensors: Sequence[Values], base: Values, genes: Genes, draw: Any) -> Values:
        kept = [sparsify(x - base, genes, draw, k) for k, x in enumerate(tensors)]
        sign = np.sign(sum(d for w, d in zip(genes["weight"], kept) if w != 0))
        mixed = np.zeros(base.shape)
        for place in np.ndindex(*base.shape):
            for_it = [
                k for k, d in enumerate(kept) if np.sign(d[place]) == sign[place] and sign[place]
            ]
            whole = sum(abs(genes["weight"][k]) for k in for_it)
            part = sum(genes["weight"][k] * kept[k][place] for k in for_it)
            mixed[place] = part / whole if genes["normalize"] and whole else part
        return base + genes["lambda"] * mixed

    return merge


def sce(tensors: Sequence[Values], base: Values, genes: Genes, draw: Any) -> Values:
    deltas = np.stack([x - base for x in tensors])
    variance = deltas.var(axis=0)
    if genes["select_topk"] < 1:
        count = how_many(genes["select_topk"], int(np.count_nonzero(variance)))
        deltas = deltas * top(variance, count)
    share = np.array([np.mean(d**2) for d in deltas])
    share = share / share.sum()
    sign = np.sign(deltas.sum(axis=0))
    agrees = (np.sign(deltas) == sign) & (sign != 0)
    below = np.tensordot(share, agrees, 1)
    return base + np.tensordot(share, agrees * deltas, 1) / np.where(below == 0, 1, below)


def ram(tensors: Sequence[Values], base: Values, genes: Genes, draw: Any) -> Values:
    return ramplus_tl(tensors, base, {**genes, "r": 0, "alpha": 0}, draw)


def ramplus_tl(tensors: Sequence[Values], base: Values, genes: Genes, draw: Any) -> Values:
    deltas = np.stack([x - base for x in tensors])
    changed = np.abs(deltas) > genes["epsilon"]
    count = changed.sum(axis=0)
    merged = base.copy()
    for delta, change in zip(deltas, changed):
        ratio = (change & (count > 1)).sum() / max((change & (count == 1)).sum(), genes["epsilon"])
        factor = 1 + genes["r"] * np.clip(ratio, 0, genes["alpha"])
        merged += change * delta * np.where(count == 1, factor, 1 / np.maximum(count, 1))
    return merged


def nearswap(tensors: Sequence[Values], base: Values, genes: Genes, draw: Any) -> Values:
    return base + np.clip(tensors[0] - base, -genes["t"], genes["t"])


def arcee_fusion(tensors: Sequence[Values], base: Values, genes: Genes, draw: Any) -> Values:
    def softmax(x: Values) -> Values:
        heights = np.exp(x - x.max(axis=-1, keepdims=True))
        return heights / heights.sum(axis=-1, keepdims=True) + 1e-8

    p, q = softmax(tensors[0]), softmax(base)
    importance = np.abs(tensors[0] - base) * (p * np.log(p / q)).sum(axis=-1, keepdims=True)
    ordered = np.sort(importance, axis=None)
    quarter, half, three = (ordered[math.floor(i / 4 * (base.size - 1))] for i in (1, 2, 3))
    return np.where(importance >= half + 1.5 * (three - quarter), tensors[0], base)


REFERENCES: dict[str, Callable[..., Values]] = {
    **{each.__name__: each for each in (linear, slerp, nuslerp, multislerp, karcher)},
    **{each.__name__: each for each in (task_arithmetic, model_stock, metagpt, passthrough)},
    **{each.__name__: each for each in (sce, ram, ramplus_tl, nearswap, arcee_fusion)},
    "ties": elected(largest),
    "dare_linear": summed(random),
    "dare_ties": elected(random),
    "della": elected(by_rank),
    "della_linear": summed(by_rank),
    "breadcrumbs": summed(middle),
    "breadcrumbs_ties": elected(middle),
}


def draws(seed: int, name: str) -> Callable[[int, tuple[int, ...]], Values]:
    """Numbers in [0, 1), in steps of 2^-24: (checkpoint, shape) to one for each value."""

    def draw(checkpoint: int, shape: tuple[int, ...]) -> Values:
        key = threefry(seed % 2**32, zlib.crc32(name.encode()), checkpoint, seed >> 32)
        words = [threefry(*key, place, 0)[0] >> 8 for place in range(math.prod(shape))]
        return np.array(words).reshape(shape) / 2**24

    return draw


def threefry(key0: int, key1: int, x0: int, x1: int) -> tuple[int, int]:
    """Threefry-2x32 with 20 rounds, from the paper (Salmon et al., SC 2011)."""
    keys, most = (key0, key1, key0 ^ key1 ^ 0x1BD11BDA), 2**32
    x0, x1 = (x0 + keys[0]) % most, (x1 + keys[1]) % most
    for turn in range(20):
        by = (13, 15, 26, 6, 17, 29, 16, 24)[turn % 8]
        x0 = (x0 + x1) % most
        x1 = ((x1 << by | x1 >> (32 - by)) % most) ^ x0
        if turn % 4 == 3:
            i = turn // 4 + 1
            x0, x1 = (x0 + keys[i % 3]) % most, (x1 + keys[(i + 1) % 3] + i) % most
    return x0, x1
