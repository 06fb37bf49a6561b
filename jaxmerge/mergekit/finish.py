"""What a merge's directory has besides tensors: its config, tokenizer and chat template."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmerge.checkpoints.vocabulary import SETTINGS, set_rows, write_tokenizer
from jaxmerge.errors import as_written
from jaxmerge.mergekit import templates
from jaxmerge.mergekit.document import Document
from jaxmerge.mergekit.models import Member, read_json
from jaxmerge.mergekit.plan import Plan
from jaxmerge.textfiles import read_text

YAML = "mergekit_config.yml"  # where mergekit itself, and what reads its merges, has it
_TEMPLATE = "chat_template.jinja"
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def finish(new: Path, document: Document, plan: Plan, members: Sequence[Member], text: str) -> None:
    """Makes config, tokenizer and chat template those of the merge, and adds the YAML.

    Args:
        new: the directory, with all files of the first model.
        document: the merge.
        plan: how it was made.
        members: all models of it, in the order in which the YAML has them.
        text: of the YAML.

    Raises:
        JaxmergeError: a file can't be read; no model has a chat template, and one is asked for.
    """
    _config(new / "config.json", plan)
    if plan.vocabulary:
        write_tokenizer(new, plan.vocabulary)
    if document.chat_template:
        _template(new, document, members)
    (new / YAML).write_text(text, encoding="utf-8")


def _config(path: Path, plan: Plan) -> None:
    config = read_json(path)
    nested = config.get("text_config")
    inner: dict[str, Any] = nested if isinstance(nested, dict) else config
    changed = False
    own = plan.first.layers()
    if len(own) == 1 and len(plan.stacked) == 1:
        ((prefix, stack),) = plan.stacked.items()
        changed |= _set_layers(inner, stack, own[prefix])
    if plan.vocabulary:
        changed |= set_rows(config, plan.vocabulary.rows)
    if changed:
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _set_layers(config: dict[str, Any], stack: Sequence[tuple[Member, int]], count: int) -> bool:
    """Sets the number of layers, and what is said of each; whether anything changed."""
    changes: dict[str, Any] = {}
    for key, value in config.items():
        if key in _LAYERS:
            changes[key] = len(stack)
        elif "layer" in key and isinstance(value, list) and len(value) == count:
            changes[key] = [_of_layers(member, key, value)[layer] for member, layer in stack]
    different = any(config[key] != value for key, value in changes.items())
    config |= changes
    return different


def _of_layers(member: Member, key: str, otherwise: list[Any]) -> list[Any]:
    inner = member.config.get("text_config")
    config = inner if isinstance(inner, dict) else member.config
    return config.get(key) or otherwise


def _template(new: Path, document: Document, members: Sequence[Member]) -> None:
    chosen = document.chat_template
    if chosen == "auto":
        found = [text for member in members if (text := template_of(member.directory))]
        if not found:
            raise document.node.error(
                "no model has a chat template", expected="chat_template: chatml, or another"
            )
        text = Counter(found).most_common(1)[0][0]  # of as many, the first in the YAML
    else:
        text = templates.BY_NAME.get(chosen, chosen)
    (new / _TEMPLATE).write_text(text, encoding="utf-8")
    settings = new / SETTINGS
    said = read_json(settings) if settings.exists() else {}
    if said.pop("chat_template", None) is not None:
        settings.write_text(json.dumps(said, indent=2, ensure_ascii=False), encoding="utf-8")


def template_of(directory: Path) -> str:
    """The chat template of a directory's tokenizer; "" where there is none.

    Raises:
        JaxmergeError: a file can't be read.
    """
    if (directory / _TEMPLATE).exists():
        return read_text(directory / _TEMPLATE)
    if not (directory / SETTINGS).exists():
        return ""
    found = read_json(directory / SETTINGS).get("chat_template") or ""
    with as_written(
        str(directory / SETTINGS),
        "the chat template is no text",
        'a template, or a list of {"name": ..., "template": ...}; or leave chat_template out',
    ):
        if isinstance(found, list):  # several, by name
            named: Mapping[str, str] = {each["name"]: each["template"] for each in found}
            found = named.get("default", "")
        if not isinstance(found, str):
            raise TypeError(str(found)[:80])
    return found
