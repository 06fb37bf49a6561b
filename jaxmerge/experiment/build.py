"""From a config to the model, the tokenizer, the tasks and the sizes of what is evaluated."""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections

from jaxmerge import config as configs
from jaxmerge.checkpoints.source import Source
from jaxmerge.config import Config
from jaxmerge.errors import JaxmergeError
from jaxmerge.evaluation.batches import Limits
from jaxmerge.evaluation.tokenizer import Bytes, Pretrained, Tokenizer
from jaxmerge.merge.groups import Groups, groups
from jaxmerge.models import families
from jaxmerge.models.architecture import DecoderConfig
from jaxmerge.models.decoder import decoder
from jaxmerge.models.family_fields import FAMILIES
from jaxmerge.models.model import Model, from_apply
from jaxmerge.scores.formatting import plain_bounds
from jaxmerge.tasks import BUILDERS
from jaxmerge.tasks.common import Task
from jaxmerge.trees import PyTree


def build_model(config: Config, source: Source) -> Model:
    """The model that a checkpoint is of, as the config or else the checkpoint says.

    Raises:
        JaxmergeError: neither says, or there is no decoder for it.
    """
    named, arguments = config.pool.model, config.pool.model_args.to_dict()
    if not named:
        arguments = dict(source.architecture)
        named = arguments.pop("model", "")
        if not named and arguments:
            model_type = str(arguments.get("model_type"))
            raise JaxmergeError(
                f"these are models of type {model_type}, but no causal language models (they have "
                "another head, or none), so they can't be evaluated"
                if model_type in FAMILIES
                else f"there is no decoder for models of type {model_type}, so these checkpoints "
                "can't be evaluated",
                where="pool.model",
                expected=f'one of {", ".join(FAMILIES)}; or your own, "module:function"; '
                "--mode=merge merges them with given weights",
            )
        if not named:
            raise JaxmergeError(
                "the checkpoints do not say which model they are of",
                where="pool.model",
                expected='"decoder" with pool.model_args, or "module:function"',
            )
    try:
        if named == "decoder":
            return decoder(DecoderConfig.from_plain(arguments))
        built = _imported(named, "pool.model")(**arguments)
    except TypeError as error:
        raise JaxmergeError(
            "these are not the model's arguments",
            where="pool.model_args",
            expected="the arguments of what pool.model names, by their names",
            found=str(error),
        ) from error
    return built if isinstance(built, Model) else from_apply(built)


def build_groups(config: Config, model: Model, like: PyTree) -> Groups | None:
    """The groups of leaves that share their weights; None: all leaves do.

    Args:
        config: whose `space` says it.
        model: of the checkpoints.
        like: the leaves of one.
    """
    grain, patterns = configs.granularity(config), config.space.patterns
    return groups(like, grain, patterns=patterns, layers=model.layers)


def build_tokenizer(
    config: Config, directory: str, model: Model, models: Sequence[str] = ()
) -> Tokenizer:
    """The tokenizer that the config names, or else that of a Hugging Face directory.

    Args:
        config: of the run.
        directory: of the tokenizer; "": there is none.
        model: that reads the tokens.
        models: directories whose configs say which tokens end a text.

    Raises:
        JaxmergeError: there is none.
    """
    pool = config.pool
    named = os.path.expanduser(pool.tokenizer) or directory
    if named == "bytes" or (not named and model.vocabulary in (0, Bytes.vocabulary)):
        return Bytes()
    if not named:
        raise JaxmergeError(
            "the checkpoints do not say which tokenizer they are for",
            where="pool.tokenizer",
            expected='a Hugging Face directory here or in pool.base, "bytes", or "module:function"',
        )
    if os.path.isdir(named):
        return Pretrained(
            named,
            chat=pool.chat,
            system=pool.system,
            template=pool.chat_template,
            models=models,
        )
    if ":" not in named:
        raise JaxmergeError(
            "there is no such directory",
            where="pool.tokenizer",
            expected='a directory here, "bytes", or "module:function"; nothing is downloaded',
            found=named,
        )
    return _imported(named, "pool.tokenizer")()


def build_task(config: Config, name: str) -> Task:
    """The task of this name, with the arguments and sizes that the config gives it."""
    arguments = config.tasks.get(name, ml_collections.ConfigDict()).to_dict()
    builder = arguments.pop("builder", name)
    build = BUILDERS.get(builder) or _imported(builder, f"tasks.{name}.builder")
    sizes = {
        "search": configs.search_examples(config),
        "test": config.objective.test_examples,
    }
    try:
        task = build(**{**sizes, **arguments})
    except TypeError as error:
        raise JaxmergeError(
            "these are not the task's arguments",
            where=f"tasks.{name}",
            expected="the arguments of its builder, by their names; see docs/tasks.md",
            found=str(error),
        ) from error
    return dataclasses.replace(task, name=name)


def build_limits(config: Config, like: str) -> Limits:
    """What goes through a model at a time.

    Args:
        config: whose `evaluate` says it.
        like: Hugging Face directory whose configuration says the context; "": nothing does.
    """
    evaluate = config.evaluate
    return Limits(
        rows=evaluate.batch_size,
        tokens=evaluate.batch_tokens,
        context=evaluate.context or (families.context(like) if like else 0),
        truncate=evaluate.too_long == "truncate",
    )


def bounds_of(tasks: Sequence[Task]) -> dict[str, list[float | None]]:
    """The tasks' bounds, as in results.json."""
    return {task.name: plain_bounds(task.bounds) for task in tasks}


def warnings_of(tasks: Sequence[Task]) -> tuple[str, ...]:
    """What the tasks warn of, each by its name."""
    return tuple(f"{task.name}: {task.warning}" for task in tasks if task.warning)


def _imported(path: str, where: str) -> Callable[..., Any]:
    """The function that `module:function` names.

    Raises:
        JaxmergeError: there is no such module or function.
    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise JaxmergeError(
            "can't be imported", where=where, expected="module:function", found=f"{path}: {error}"
        ) from error
