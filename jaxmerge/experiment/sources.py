"""The devices and the checkpoints that a config names, before any data are read."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence
from typing import Any

import jax

from jaxmerge.checkpoints import lora_export, orbax, steps
from jaxmerge.checkpoints.export import check_like
from jaxmerge.checkpoints.source import Source
from jaxmerge.checkpoints.survey import survey
from jaxmerge.checkpoints.trainers import STORED
from jaxmerge.config import Config
from jaxmerge.errors import JaxmergeError
from jaxmerge.evaluation import vocabularies
from jaxmerge.evaluation.tokenizer import is_in
from jaxmerge.evaluation.vocabularies import check_same_vocabulary
from jaxmerge.hosts import processes, watch
from jaxmerge.sharding import all_devices


def start_jax(config: Config) -> None:
    """Sets devices and the compilation cache; before JAX is first used.

    Of several processes, all watch each other from here on.
    """
    if config.mesh.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", config.mesh.cpu_devices)
    if config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(config.compilation_cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    all_devices()  # or there are none
    if processes.several():
        watch.begin(jax.process_index(), jax.process_count(), processes.from_first)
    elif jax.process_count() > 1:
        raise JaxmergeError(
            "this machine is one of several",
            where="--coordinator",
            expected="--coordinator=auto, and the same command on all of them",
        )


def host_alone() -> None:
    """Has JAX run on the host alone, each program in the thread that calls it.

    For processes in which there is nothing but a merge from file to file: its workers keep the
    cores busy, and programs of a millisecond gain nothing from being cut up. To be called before
    JAX starts.
    """
    os.environ["NPROC"] = "1"  # threads of XLA on the CPU
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def members(config: Config) -> tuple[str, ...]:
    """Paths and patterns of the pool's checkpoints; of the steps of a run the path of each.

    Raises:
        JaxmergeError: the run has no such steps.
    """
    pool = config.pool
    if not pool.steps:
        return tuple(pool.checkpoints)
    steps.check(pool.steps, pool.checkpoints)
    return steps.members(pool.checkpoints[0], pool.steps)


def find_checkpoints(
    config: Config,
    *,
    by_tensor: bool = False,
    as_stored: bool = False,
    with_base: bool = False,
) -> tuple[Source, ...]:
    """The pool's checkpoints, compared with each other; no data are read.

    Args:
        config: of the run.
        by_tensor: see `survey.survey`.
        as_stored: see `survey.find`; what is written then is written by name.
        with_base: the base comes last, as one more.

    Raises:
        JaxmergeError: they can't be merged, having other leaves, shapes or vocabularies; or the
            merge can't be exported.
    """
    pool = config.pool
    where = where_of(config)
    where["as_stored"] |= as_stored
    patterns = (*members(config), pool.base) if with_base else members(config)
    sources = survey(patterns, **where, dtype=pool.dtype, by_tensor=by_tensor)
    tokenizer_directory(config, sources)
    if "lora" in config.export.formats and not as_stored:
        lora_export.check(sources)
    _say_missing(sources)
    _say_beside(sources)
    formats = () if as_stored else config.export.formats
    check_like(
        formats,
        like_by_tensor(config, sources) if by_tensor else huggingface_directory(config, sources),
        sources[0].abstract,
        by_tensor=by_tensor,
        rope_type=config.pool.rope_type,
        rows=rows_of(sources),
    )
    return sources


def like_by_tensor(config: Config, sources: Sequence[Source]) -> str:
    """The Hugging Face directory whose tensors the merge has, but for the rows of a vocabulary."""
    if config.pool.vocabulary:
        return base_of(config) or sources[0].path
    return huggingface_directory(config, sources)


def rows_of(sources: Sequence[Source]) -> int:
    """Rows of the embeddings in a common vocabulary; 0 where they are as they are stored."""
    return next((source.rows.count for source in sources if source.rows), 0)


def _say_missing(sources: Sequence[Source]) -> None:
    for source in sources if processes.first() else ():
        if source.rows and source.rows.missing:
            _say(
                f"{source.name} has no rows for {source.rows.missing} tokens of the vocabulary: "
                "they are those of a member that has them"
            )


def _say_beside(sources: Sequence[Source]) -> None:
    keys = sorted({key for source in sources for key in source.beside})
    if keys and processes.first():
        _say(
            f"{', '.join(keys)}: beside {sources[0].subtree} in the checkpoints, and not merged; "
            "a merge with --config.pool.subtree of that name is of it alone"
        )


@functools.cache  # a command may look at the checkpoints more than once
def _say(what: str) -> None:
    print(f"jaxmerge: {what}", file=sys.stderr)


def where_of(config: Config) -> dict[str, Any]:
    """How the checkpoints of a pool are found and read, for `survey.find`."""
    pool = config.pool
    return {
        **{"subtree": pool.subtree, "item": pool.item, "base": base_of(config)},
        # The user's own model has the leaves that the checkpoints have.
        **{"rope_type": pool.rope_type, "as_stored": bool(pool.model)},
        **{"vocabulary": pool.vocabulary},
    }


def base_of(config: Config) -> str:
    """The Hugging Face directory that `pool.base` names; "": none, or it is stored otherwise."""
    named = os.path.expanduser(config.pool.base)
    where = orbax.absolute(named)
    return "" if named and any(each.recognises(where) for each in STORED.values()) else named


def huggingface_directory(config: Config, sources: Sequence[Source]) -> str:
    """Where the pool's Hugging Face configuration and tokenizer are; "": nowhere."""
    of_sources = [source.directory for source in sources if source.directory]
    if config.pool.vocabulary:
        return of_sources[0]  # all have one
    return base_of(config) or (of_sources[0] if of_sources else "")


def tokenizer_directory(config: Config, sources: Sequence[Source]) -> str:
    """Where the tokenizer of the pool is: a Hugging Face directory; "": nowhere.

    It is the one that the config names, or else what `vocabularies.choose` says.

    Raises:
        JaxmergeError: the tokenizers contradict each other.
    """
    pool = config.pool
    if pool.vocabulary:
        return huggingface_directory(config, sources)
    read = ("huggingface", "lora")
    members = [os.path.realpath(each.path) for each in sources if each.format in read]
    named = os.path.expanduser(pool.tokenizer)
    if named:
        check_same_vocabulary([each for each in members if is_in(each)])
        return named if os.path.isdir(named) else ""
    bases = [base_of(config), *(source.base for source in sources)]
    return vocabularies.choose(
        members,
        [os.path.realpath(os.path.expanduser(each)) for each in bases if each],
        rows=min((_rows(source) for source in sources), default=0),
        chat=pool.chat,
    )


def _rows(source: Source) -> int:
    """Of the embedding; 0 where there is no decoder, which would say it."""
    known = source.architecture.get("model") == "decoder"
    return int(source.architecture["vocab"]) if known else 0


def model_directories(config: Config, sources: Sequence[Source]) -> list[str]:
    """The Hugging Face directories whose configs say how the models are used."""
    found = [base_of(config), *(source.directory for source in sources)]
    return [each for each in dict.fromkeys(found) if each]
