"""The attributes of a Hugging Face config: each is taken, known to be harmless, or refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jaxmerge.errors import JaxmergeError
from jaxmerge.models.config_keys import DECODER_SILENT, NEUTRAL
from jaxmerge.models.rope import Rope

# What there is something of for each: transformers makes lists of it, and the layout tensors.
_COUNTED = re.compile("layer|expert|label")
_MOST = 100_000


class Attributes:
    """The attributes of a config; those that nobody took are refused in the end."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self._rest = {name: value for name, value in values.items() if name not in DECODER_SILENT}
        self._refused: dict[str, Any] = {}
        self._where = where

    def take(self, name: str, default: Any = None) -> Any:
        """The attribute, or the default where it is missing or None."""
        value = self._rest.pop(name, None)
        return default if value is None else value

    def expect(self, name: str, *allowed: Any) -> None:
        """Passes over an attribute that is missing, None or one of the allowed values."""
        if self._rest.get(name) is None or self._rest[name] in allowed:
            self._rest.pop(name, None)

    def refuse(self, name: str, value: Any) -> None:
        """Notes an attribute that was taken but asks for something the decoder cannot do."""
        self._refused[name] = value

    def refuse_rest(self) -> None:
        for name, value in NEUTRAL.items():
            self.expect(name, value)
        refused = self._refused | {k: v for k, v in self._rest.items() if v is not None}
        if refused:
            raise JaxmergeError(
                "attributes of the config that the decoder does not heed",
                where=self._where,
                expected="only attributes that are known to mean what the decoder does. Delete "
                "those that say nothing of the computation; or merge by names, with given weights: "
                '--mode=merge, export.formats=("huggingface",)',
                found=", ".join(f"{name}={value!r}" for name, value in sorted(refused.items())),
            )


def check_counts(written: Mapping[str, Any], where: str) -> None:
    """Raises where there is a number of layers, experts or labels, for each of which transformers
    would write something down, that no model has.
    """
    for key, value in written.items():
        if isinstance(value, dict) and key not in ("label2id", "id2label"):
            check_counts(value, f"{where}, {key}")
        elif _COUNTED.search(key) and isinstance(value, int) and value > _MOST:
            raise JaxmergeError(
                f"{key} is more than any model has",
                where=where,
                expected=f"at most {_MOST}",
                found=str(value)[:80],
            )


def read_rope(attributes: Attributes, partial_of: int = 0, interleaved: bool = False) -> Rope:
    """The rotary positions of `rope_parameters`, into which transformers turns older spellings."""
    longest = attributes.take("max_position_embeddings")
    parameters = attributes.take("rope_parameters", {})
    return scaled_rope(attributes, parameters, longest, partial_of, interleaved)


def scaled_rope(
    attributes: Attributes,
    parameters: Mapping[str, Any],
    longest: int,
    partial_of: int = 0,
    interleaved: bool = False,
) -> Rope:
    """One set of rope parameters.

    Args:
        longest: text, from which transformers derives what the parameters lack.
        partial_of: the width of heads of which only a part may turn; 0: all must.
    """
    values = {name: value for name, value in parameters.items() if value is not None}
    scaling = values.pop("rope_type", "default")
    values.pop("type", None)  # the older name of rope_type, already heeded
    theta = values.pop("rope_theta", None)
    part = values.pop("partial_rotary_factor", 1.0)
    if scaling == "dynamic":
        values["max_position_embeddings"] = longest
    if scaling in ("yarn", "longrope") and "original_max_position_embeddings" in values:
        values.setdefault("factor", longest / values["original_max_position_embeddings"])
    named = ((name, _parameter(value)) for name, value in sorted(values.items()))
    if theta is None or (part != 1 and not partial_of):
        attributes.refuse("rope_parameters", dict(parameters))
        return Rope()
    try:
        return Rope(
            float(theta),
            width=int(partial_of * part),
            interleaved=interleaved,
            scaling=scaling,
            parameters=tuple(named),
        )
    except JaxmergeError:
        attributes.refuse("rope_parameters", dict(parameters))
        return Rope()


def _parameter(value: Any) -> Any:
    """A number or list of a config, as `Rope` has it."""
    if isinstance(value, list):
        return tuple(_parameter(each) for each in value)
    return float(value) if type(value) is int else value
