"""The devices and the checkpoints that a config names, before any data are read."""

from __future__ import annotations

import os
from collections.abc import Sequence

import jax

from jaxmerge.checkpoints.export import check_like
from jaxmerge.checkpoints.source import Source
from jaxmerge.checkpoints.survey import survey
from jaxmerge.config import Config
from jaxmerge.errors import JaxmergeError
from jaxmerge.evaluation.tokenizer import check_same_vocabulary, is_in
from jaxmerge.hosts import processes, watch


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
    if processes.several():
        watch.begin(jax.process_index(), jax.process_count(), processes.from_first)
    elif jax.process_count() > 1:
        raise JaxmergeError(
            "this machine is one of several",
            where="--coordinator",
            expected="--coordinator=auto, and the same command on all of them",
        )


def find_checkpoints(
    config: Config, *, by_tensor: bool = False, as_stored: bool = False
) -> tuple[Source, ...]:
    """The pool's checkpoints, compared with each other; no data are read.

    Args:
        config: of the run.
        by_tensor: see `survey.survey`.
        as_stored: see `survey.find`; only Orbax checkpoints can be written then.

    Raises:
        JaxmergeError: they can't be merged, having other leaves, shapes or vocabularies; or the
            merge can't be exported.
    """
    pool = config.pool
    sources = survey(
        pool.checkpoints,
        subtree=pool.subtree,
        base=pool.base,
        item=pool.item,
        rope_type=pool.rope_type,
        as_stored=as_stored or bool(pool.model),
        dtype=pool.dtype,
        by_tensor=by_tensor,
    )
    directories = [pool.base] if pool.base else []
    directories += [each.path for each in sources if each.format in ("huggingface", "lora")]
    with_tokenizer = [directory for directory in directories if is_in(directory)]
    if with_tokenizer:
        check_same_vocabulary(with_tokenizer)
    like = huggingface_directory(config, sources)
    formats = ("orbax",) if as_stored else config.export.formats
    check_like(
        formats, like, sources[0].abstract, by_tensor=by_tensor, rope_type=config.pool.rope_type
    )
    return sources


def huggingface_directory(config: Config, sources: Sequence[Source]) -> str:
    """Where the pool's Hugging Face configuration and tokenizer are; "": nowhere."""
    of_sources = [source.directory for source in sources if source.directory]
    return config.pool.base or (of_sources[0] if of_sources else "")
