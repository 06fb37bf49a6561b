"""The YAML of mergekit-evolve as fields of a config: what is searched over, and on which tasks.

Its genes of a linear merge are |x_k|, divided by their sum: the constraint `abs`, whose genotypes
have the unit 1/K. So its step, sigma0 = 1/6, is K/6 of ours. Where weights are not divided by their
sum, their sum is lambda here. Of SLERP it has x_1, x_2; t = exp(x_2) / (exp(x_1) + exp(x_2)):
at 1/2 a step of both by sigma0 is one of t by sigma0 sqrt(2) / 4, whose unit here is 1/2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmerge.checkpoints import huggingface
from jaxmerge.mergekit.document import Reference, reference
from jaxmerge.mergekit.models import count_layers, is_embedding, locate, place
from jaxmerge.mergekit.nodes import Node, documents

METHODS = ("linear", "slerp", "task_arithmetic", "ties", "dare_ties")  # those of a genome
_TOP = (
    *("genome", "tasks", "limit", "num_fewshot", "shuffle", "random_init"),
    *("apply_chat_template", "fewshot_as_multiturn"),
)
_GENOME = (
    *("models", "merge_method", "base_model", "tokenizer_source", "layer_granularity"),
    *("normalize", "allow_negative_weights", "filters", "smooth"),
)
_EVALUATIONS = 100  # its --max-fevals
_SIGMA = 1 / 6  # its --sigma0


def read(path: str) -> dict[str, Any]:
    """The fields of a config, by their full names, that a YAML of mergekit-evolve stands for.

    Raises:
        JaxmergeError: it is none, or has what has no counterpart here; names key and line.
    """
    top, *others = documents(path)
    if others:
        raise others[0].error("a search is one document")
    entries = top.mapping(_TOP)
    for key in ("genome", "tasks"):
        if key not in entries:
            raise top.error(f"{key} is missing", expected=", ".join(_TOP))
    _refuse(entries, "shuffle", "leave it out: all candidates are scored on the same examples")
    _refuse(entries, "random_init", "leave it out: the search starts from the uniform merge")
    return {
        **_of_genome(entries["genome"]),
        **_of_tasks(entries),
        "search.strategy": "CMA_ES",
        "search.budget": _EVALUATIONS,
    }


def _refuse(entries: Mapping[str, Node], key: str, way_out: str) -> None:
    if _true(entries, key, False):
        raise entries[key].error("has no counterpart here", expected=way_out, found="true")


def _true(entries: Mapping[str, Node], key: str, default: bool) -> bool:
    given = entries.get(key)
    return default if given is None or given.value is None else given.boolean()


def _of_genome(node: Node) -> dict[str, Any]:
    entries = node.mapping(_GENOME)
    for key in ("models", "merge_method"):
        if key not in entries:
            raise node.error(f"{key} is missing", expected=", ".join(_GENOME))
    method = entries["merge_method"]
    if method.value not in METHODS:
        raise method.error(
            "a genome has no such method",
            expected=f"{', '.join(METHODS)}; or a config, whose merge.method is any",
            found=method.shown(),
        )
    _refuse(entries, "smooth", 'leave it out; --config.space.granularity="layer" is the finest')
    fields = _of_models(entries)
    fields |= _of_method(method.text(), entries, node, fields)
    return fields | _groups(entries, fields)


def _of_method(
    method: str, entries: Mapping[str, Node], node: Node, fields: Mapping[str, Any]
) -> dict[str, Any]:
    """The method, what its weights may be, and the first step."""
    K = len(fields["pool.checkpoints"])
    by_weights = {"search.sigma": K * _SIGMA}
    if method == "linear":
        return {"space.constraint": _constraint(entries, node, method)[1], **by_weights}
    found: dict[str, Any] = {"merge.method": method, "merge.variant": "mergekit"}
    if method == "slerp":
        if K != 2:
            raise entries["models"].error(
                "a slerp is of two models here",
                expected="two models; or a config with merge.method = multislerp, for more",
                found=str(K),
            )
        if "filters" in entries:
            raise entries["filters"].error("slerp takes none", expected="layer_granularity alone")
        return found | {"search.sigma": math.sqrt(2) / 2 * _SIGMA}
    if "pool.base" not in fields:
        raise node.error(f"{method} needs base_model", expected="base_model")
    if fields["pool.base"] in fields["pool.checkpoints"]:
        raise entries["models"].error(
            "the base is among the models, and has no difference from itself",
            expected="models without base_model",
            found=fields["pool.base"],
        )
    normalize, constraint = _constraint(entries, node, method)
    genes = {"normalize": normalize}
    if normalize or constraint == "free":  # else it is the sum of the weights
        genes |= {"lambda": 1.0}
    own = () if method == "task_arithmetic" else ("density",)
    found |= {"merge.genes": genes, "space.constraint": constraint, "space.per_checkpoint": own}
    return found | by_weights


def _of_models(entries: Mapping[str, Node]) -> dict[str, Any]:
    """The pool: whole models, or adapters and what they are laid upon."""
    nodes = entries["models"].sequence()
    references = [reference(each) for each in nodes]
    if len(references) < 2:
        raise entries["models"].error("a search needs at least two models")
    found = [
        str(locate(each.lora or each.path, each.lora_revision if each.lora else each.revision))
        for each in references
    ]
    bases = {(each.path, each.revision) for each in references if each.lora}
    given = entries.get("base_model")
    if given and given.value is not None:
        base = reference(given)
        bases |= {(base.path, base.revision)}
    if len(bases) > 1:
        raise entries["models"].error(
            "the pool has one base, for adapters, config and tokenizer",
            found=", ".join(sorted(path for path, _ in bases)),
        )
    fields: dict[str, Any] = {"pool.checkpoints": tuple(found)}
    for path, revision in bases:
        fields["pool.base"] = str(locate(path, revision))
    return fields | _tokenizer(entries)


def _tokenizer(entries: Mapping[str, Node]) -> dict[str, Any]:
    source = entries.get("tokenizer_source")
    if source is None or source.value is None:
        return {}
    if source.value in ("base", "union"):
        return {"pool.vocabulary": source.value}
    named: Reference = reference(source)
    return {"pool.tokenizer": str(locate(named.path, named.revision))}


def _constraint(entries: Mapping[str, Node], node: Node, method: str) -> tuple[bool, str]:
    """Whether weights are divided by their sum, and `space.constraint`."""
    normalize = _true(entries, "normalize", method != "task_arithmetic")
    negative = _true(entries, "allow_negative_weights", False)
    if (normalize and negative) or (method == "linear" and normalize == negative):
        neither = "or neither" if method == "linear" else "or normalize: false"
        raise entries.get("normalize", node).error(
            "has no counterpart here",
            expected=f"normalize: true and weights that are not negative, {neither}",
            found=f"normalize {normalize}, allow_negative_weights {negative}",
        )
    return normalize, "free" if negative else "abs"


def _groups(entries: Mapping[str, Node], fields: Mapping[str, Any]) -> dict[str, Any]:
    """What has weights of its own: groups of layers, and of tensors by parts of their names."""
    size = entries["layer_granularity"].whole() if "layer_granularity" in entries else 0
    given = entries.get("filters")
    named = given is not None and given.value is not None
    filters = [each.text() for each in given.sequence()] if given and named else []
    if not size and not filters:
        return {"space.granularity": "model"}
    directory = Path(fields.get("pool.base") or fields["pool.checkpoints"][0])
    layers = count_layers(directory / "config.json")
    if size and (not layers or layers % size):
        raise entries["layer_granularity"].error(
            "must divide the number of layers", expected=f"a divisor of {layers}", found=str(size)
        )
    count = layers // size if size else 1
    if not filters:
        return {"space.granularity": str(count)}
    assert given
    return {
        "space.granularity": "patterns",
        "space.patterns": _patterns(directory, filters, size or layers, given),
    }


def _patterns(directory: Path, filters: Sequence[str], size: int, node: Node) -> tuple[str, ...]:
    """Regular expressions for the leaves of each group: of layers, and of the first filter.

    What is in no layer is in the first group of layers if it is before them, else in the last.
    """
    layout = huggingface.layout(str(directory))
    groups: dict[tuple[int, int], dict[str, list[int]]] = {}
    last = max((spot.layer for name in layout.tensors if (spot := place(name))), default=0)
    for leaf, parts in layout.leaves.items():
        for part in parts:
            spot = place(part.tensor)
            layer = spot.layer if spot else (0 if is_embedding(part.tensor) else last)
            chosen = next(
                (i for i, each in enumerate(filters) if each in part.tensor), len(filters)
            )
            numbers = groups.setdefault((layer // size, chosen), {}).setdefault(leaf, [])
            numbers += [spot.layer] if spot and leaf.startswith("layers/") else []
    found = []
    for key in sorted(groups):
        leaves = [_regex(leaf, numbers) for leaf, numbers in groups[key].items()]
        found.append(f"^({'|'.join(leaves)})$")
    by_leaf = [
        (leaf, number)
        for leaves in groups.values()
        for leaf, numbers in leaves.items()
        for number in {*numbers} or {-1}
    ]
    twice = sorted({leaf for leaf, number in by_leaf if by_leaf.count((leaf, number)) > 1})
    if twice:
        raise node.error(
            "these filters divide tensors that are one leaf here", found=", ".join(twice)
        )
    return tuple(found)


def _regex(leaf: str, numbers: Sequence[int]) -> str:
    name = re.escape(leaf)
    return f"{name}/({'|'.join(map(str, sorted({*numbers})))})" if numbers else name


def _of_tasks(entries: Mapping[str, Node]) -> dict[str, Any]:
    """The tasks of lm-eval, and what their scores count."""
    chat = _true(entries, "apply_chat_template", True)
    if chat and not _true(entries, "fewshot_as_multiturn", True):
        raise entries["fewshot_as_multiturn"].error(
            "few-shot examples are turns of the chat here", expected="true", found="false"
        )
    shots = entries.get("num_fewshot")
    names, weights, fields = [], [], dict[str, Any]()
    for node in entries["tasks"].sequence():
        task, weight = _task(node)
        task |= {"form": "chat" if chat else "text"}
        if shots is not None and shots.value is not None:
            task["num_fewshot"] = shots.whole()
        name = re.sub(r"\W", "_", task["task"])
        if name in names:
            name = re.sub(r"\W", "_", f"{task['task']}_{task['metric']}")
        if name in names:
            raise node.error("the task is there twice", found=task["task"])
        fields[f"tasks.{name}"] = task
        names.append(name)
        weights.append(weight)
    fields["objective.tasks"] = tuple(names)
    if len({*weights}) > 1:
        fields |= {"objective.aggregate": "weighted", "objective.weights": tuple(weights)}
    limit = entries.get("limit")
    if limit is not None and limit.value is not None:
        fields["objective.search_examples"] = limit.whole(1)
    return fields


def _task(node: Node) -> tuple[dict[str, Any], float]:
    """What `config.tasks` says of a task, and its weight."""
    if not isinstance(node.value, dict):
        return _named(node.text(), "acc,none"), 1.0
    entries = node.mapping(("name", "weight", "metric"))
    if "name" not in entries:
        raise node.error("the task has no name", found=node.shown())
    weight = entries["weight"].number() if "weight" in entries else 1.0
    if weight <= 0:
        raise entries["weight"].error(
            "weights are positive: metrics of which less is better are negated anyhow",
            found=str(weight),
        )
    metric = entries["metric"].text() if "metric" in entries else "acc,none"
    return _named(entries["name"].text(), metric), weight


def _named(task: str, metric: str) -> dict[str, Any]:
    name, _, pipeline = metric.partition(",")
    return {"builder": "lm_eval", "task": task, "metric": name, "filter": pipeline}
