"""From a Hugging Face config to the decoder that it describes, and the names of its tensors.

What a family (`family_fields`) does not take from the config must be known to say nothing
(`config_keys`), or the config is refused: an attribute that is not understood is never passed over.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxmerge.errors import JaxmergeError, as_written
from jaxmerge.models.architecture import DecoderConfig
from jaxmerge.models.attributes import Attributes, check_counts
from jaxmerge.models.family_fields import FAMILIES
from jaxmerge.models.layout import Layout
from jaxmerge.models.names import NAMES, layout
from jaxmerge.textfiles import read_json


class Architecture(NamedTuple):
    """A decoder, and how the tensors of its checkpoints make up its leaves."""

    config: DecoderConfig
    layout: Layout


def read(directory: str) -> Architecture | None:
    """The decoder that a Hugging Face directory describes; None where there is none for it here.

    Raises:
        JaxmergeError: `config.json` is missing, unreadable or refused by transformers, or has
            attributes that the decoder does not heed (see `from_config`).
    """
    path = os.path.join(directory, "config.json")
    written = _written(path)
    if str(written.get("model_type")) not in FAMILIES:
        return None
    return from_config(completed(written, path), path)


def model_type(directory: str) -> str:
    """The `model_type` of a Hugging Face directory; "" where it does not say.

    Raises:
        JaxmergeError: `config.json` is missing or unreadable.
    """
    return str(_written(os.path.join(directory, "config.json")).get("model_type", ""))


def context(directory: str) -> int:
    """How many tokens the model of a Hugging Face directory can hold; 0 where it does not say.

    Raises:
        JaxmergeError: `config.json` is missing or unreadable.
    """
    path = os.path.join(directory, "config.json")
    with as_written(path, _OTHER_KIND, _AS_TRANSFORMERS):
        return int(_written(path).get("max_position_embeddings") or 0)


def completed(written: Mapping[str, Any], where: str) -> Any:
    """The config object that transformers makes of what a config.json says; runs no code of others.

    It reads a copy: it would stumble over a byte order mark in the file.

    Raises:
        JaxmergeError: transformers refuses it, or does not know its `model_type`.
    """
    from transformers import AutoConfig  # takes seconds to import

    check_counts(written, where)
    with tempfile.TemporaryDirectory() as copy:
        with open(os.path.join(copy, "config.json"), "w", encoding="utf-8") as file:
            json.dump(written, file)
        try:
            return AutoConfig.from_pretrained(copy, local_files_only=True, trust_remote_code=False)
        # The file is from others, and each of transformers' classes checks it as it likes or not at
        # all: there is no kind that all of these errors are. Nothing of ours runs in here.
        except Exception as error:
            raise JaxmergeError(
                "transformers refuses the config",
                where=where,
                expected="a config that this version of transformers loads",
                found=(str(error) or type(error).__name__).replace(copy, os.path.dirname(where)),
            ) from error


def _written(path: str) -> dict[str, Any]:
    written = read_json(path)
    if not isinstance(written, dict):
        raise JaxmergeError(
            "the config is no JSON object",
            where=path,
            expected=_AS_TRANSFORMERS,
            found=str(written)[:80],
        )
    return written


def from_config(config: Any, where: str) -> Architecture | None:
    """The decoder of a transformers config object; None where there is none for its `model_type`.

    Args:
        config: a `PreTrainedConfig`.
        where: what errors name, such as the file that the config is from.

    Raises:
        JaxmergeError: attributes that the decoder does not heed, all of them with their values.
    """
    if config.model_type not in FAMILIES:
        return None
    family = FAMILIES[config.model_type]
    attributes = Attributes(config.to_dict(), where)
    with as_written(where, _OTHER_KIND, _AS_TRANSFORMERS):
        fields = family.read(attributes)
        attributes.refuse_rest()
        made = DecoderConfig(**fields)
        return Architecture(made, layout(made, {**NAMES, **family.names}))


_OTHER_KIND = "a value of the config is of another kind than its attribute has"
_AS_TRANSFORMERS = "config.json as transformers writes it"
