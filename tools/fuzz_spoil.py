"""Spoils sound inputs, in their values or in their bytes; see tools/fuzz_readers.py."""

from __future__ import annotations

import contextlib
import copy
import json
import random
from typing import Any

_ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**30, 10**400, 0.5, -0.0, 1e308),
    *(float("nan"), float("inf"), "", "a", "0", "../x", "a/b", "\0", "\ud800", "é\u2028", "{", "%"),
    *("x" * 5000, "{{ 1/0 }}", "[", "(a+)+$", "NaN", [], {}, [[]], [None], [0, 1], ["a", "a"]),
    *({"a": 1}, {"": None}, [1.5, -2], {"type": "BPE"}, [[1, 2], [3]], [[0.5], ["x"]]),
)


def spoiled(draw: random.Random, seed: bytes) -> bytes:
    """A sound input with something wrong in its JSON values, or in its bytes."""
    if draw.random() < 0.6:
        with contextlib.suppress(ValueError, RecursionError):
            return _spoiled_json(draw, seed)
    return _spoiled_bytes(draw, seed)


def _spoiled_json(draw: random.Random, seed: bytes) -> bytes:
    """The same JSON, or a line of JSON lines, in which one to three values are others."""
    lines = seed.decode("utf-8-sig").split("\n")
    try:
        values = [json.loads(seed.decode("utf-8-sig"))]
    except ValueError:
        values = [json.loads(line) for line in lines if line]
    for _ in range(draw.choice((1, 1, 2, 3))):
        place = draw.randrange(len(values))
        values[place] = _spoiled_value(draw, values[place])
    return b"\n".join(json.dumps(value).encode() for value in values) + (
        b"\n" if len(values) > 1 else b""
    )


def _spoiled_value(draw: random.Random, value: Any) -> Any:
    """Somewhere in a value, deep or not, is another one, or a part is missing."""
    keys = [*value] if isinstance(value, dict) else []
    keys = [*range(len(value))] if isinstance(value, list) else keys
    if not keys or draw.random() < 0.1:
        deep: Any = copy.deepcopy(draw.choice(_ODD))
        for _ in range(draw.choice((0,) * 8 + (1, 900))):
            deep = [deep]
        return deep
    changed, key = copy.copy(value), draw.choice(keys)
    if draw.random() < 0.15:
        del changed[key]
    elif isinstance(changed, dict) and draw.random() < 0.1:
        changed[str(draw.choice(_ODD))] = changed.pop(key)
    else:
        changed[key] = _spoiled_value(draw, changed[key])
    return changed


def _spoiled_bytes(draw: random.Random, seed: bytes) -> bytes:
    data = bytearray(seed)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        start = draw.randrange(len(data) + 1)
        stop = min(start + draw.choice((0, 1, 2, 8, 100)), len(data))
        new = draw.choice(
            (b"", draw.randbytes(draw.choice((1, 2, 8))), bytes(data[start:stop]) * 2)
            + (
                b"[" * 3000,
                b"{",
                b"}",
                b":",
                b"- ",
                b"\n",
                b"\0",
                b"1",
                b"&a",
                b"*a",
                b"\xff",
                b"'",
            )
        )
        data[start:stop] = new
    return bytes(data)
