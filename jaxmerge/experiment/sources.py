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
from jaxmerge.evaluation import vocabularies
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
    config: Config, *, by_tensor: bool = False, with_base: bool = False
) -> tuple[Source, ...]:
    """The pool's checkpoints, compared with each other; no data are read.

    Args:
        config: of the run.
        by_tensor: see `survey.survey`.
        with_base: the base comes last, as one more.

    Raises:
        JaxmergeError: they can't be merged, having other leaves, shapes or vocabularies; or the
            merge can't be exported.
    """
    pool = config.pool
    sources = survey(
        (*pool.checkpoints, pool.base) if with_base else pool.checkpoints,
        subtree=pool.subtree,
        base=pool.base,
        dtype=pool.dtype,
        by_tensor=by_tensor,
    )
    tokenizer_directory(config, sources)
    like = huggingface_directory(config, sources)
    check_like(config.export.formats, like, sources[0].abstract, by_tensor=by_tensor)
    return sources


def huggingface_directory(config: Config, sources: Sequence[Source]) -> str:
    """Where the pool's Hugging Face configuration and tokenizer are; "": nowhere."""
    of_sources = [source.directory for source in sources if source.directory]
    return config.pool.base or (of_sources[0] if of_sources else "")


def tokenizer_directory(config: Config, sources: Sequence[Source]) -> str:
    """Where the tokenizer of the pool is: a Hugging Face directory; "": nowhere.

    It is the one that the config names, or else what `vocabularies.choose` says.

    Raises:
        JaxmergeError: the tokenizers contradict each other.
    """
    pool = config.pool
    members = [os.path.realpath(each.path) for each in sources if each.format != "orbax"]
    if pool.tokenizer:
        check_same_vocabulary([each for each in members if is_in(each)])
        return pool.tokenizer if os.path.isdir(pool.tokenizer) else ""
    bases = [pool.base, *(source.base for source in sources)]
    return vocabularies.choose(
        members,
        [os.path.realpath(os.path.expanduser(each)) for each in bases if each],
        rows=min((int(source.architecture.get("vocab") or 0) for source in sources), default=0),
        chat=pool.chat,
    )


def model_directories(config: Config, sources: Sequence[Source]) -> list[str]:
    """The Hugging Face directories whose configs say how the models are used."""
    found = [config.pool.base, *(source.directory for source in sources)]
    return [each for each in dict.fromkeys(found) if each]
