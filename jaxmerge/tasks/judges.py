"""How a text is compared with a target: the judges that a config can name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

_NUMBER = re.compile(r"-?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)


def exact(output: str, target: str) -> bool:
    """The output is the target, white space at the ends aside."""
    return output.strip() == target.strip()


def regex(output: str, target: str) -> bool:
    """The target, a regular expression, matches somewhere in the output."""
    return re.search(target, output) is not None


def contains(output: str, target: str) -> bool:
    """The target stands somewhere in the output."""
    return target in output


def numeric(output: str, target: str) -> bool:
    """The last number of the output is that of the target, to a millionth; `1,234` is 1234."""
    found, wanted = _numbers(output), _numbers(target)[-1]
    return bool(found) and math.isclose(found[-1], wanted, rel_tol=1e-6)


def same_json(output: str, target: str) -> bool:
    """The output, or the first fenced block in it, is JSON of the target's value."""
    fenced, wanted = _FENCE.search(output), json.loads(target)
    try:
        return _json_equal(json.loads(fenced[1] if fenced else output), wanted)
    except (ValueError, RecursionError):
        return False


class Judge(NamedTuple):
    """A comparison of (output, target), and what refuses a target that it can't read."""

    compare: Callable[[str, str], bool]
    check: Callable[[str], object] = str


JUDGES: dict[str, Judge] = {
    "exact": Judge(exact),
    "regex": Judge(regex, re.compile),
    "contains": Judge(contains),
    "numeric": Judge(numeric, lambda target: _numbers(target)[-1]),
    "json": Judge(same_json, json.loads),
}


def _numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in _NUMBER.findall(text)]


def _json_equal(one: Any, other: Any) -> bool:
    """Equality of JSON values: true is not 1, as it is in Python; 1.0 is 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_json_equal(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_json_equal, one, other))
    return one == other
