"""The checkpoints that a config names: found, compared with each other, and recorded."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import jax

from jaxmerge import processes, watch
from jaxmerge.checkpoints.pool import Record
from jaxmerge.checkpoints.source import Source
from jaxmerge.checkpoints.survey import survey
from jaxmerge.config import Config
from jaxmerge.errors import JaxmergeError
from jaxmerge.export import check_like
from jaxmerge.rundir import RunDirectory
from jaxmerge.tokenizer import check_same_vocabulary, is_in


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


def find_checkpoints(config: Config, *, by_tensor: bool = False) -> tuple[Source, ...]:
    """The pool's checkpoints, compared with each other; no data are read.

    Args:
        config: of the run.
        by_tensor: see `survey.survey`.

    Raises:
        JaxmergeError: they can't be merged, having other leaves, shapes or vocabularies; or the
            merge can't be exported.
    """
    pool = config.pool
    sources = survey(
        pool.checkpoints,
        subtree=pool.subtree,
        base=pool.base,
        dtype=pool.dtype,
        by_tensor=by_tensor,
    )
    directories = [pool.base] if pool.base else []
    directories += [source.path for source in sources if source.format != "orbax"]
    with_tokenizer = [directory for directory in directories if is_in(directory)]
    if with_tokenizer:
        check_same_vocabulary(with_tokenizer)
    like = huggingface_directory(config, sources)
    check_like(config.export.formats, like, sources[0].abstract, by_tensor=by_tensor)
    return sources


def huggingface_directory(config: Config, sources: Sequence[Source]) -> str:
    """Where the pool's Hugging Face configuration and tokenizer are; "": nowhere."""
    of_sources = [source.directory for source in sources if source.directory]
    return config.pool.base or (of_sources[0] if of_sources else "")


def record_pool(directory: RunDirectory, of_pool: Sequence[Record]) -> None:
    """Writes pool.json; refuses a directory whose candidates were made of other checkpoints."""
    records = [dataclasses.asdict(record) for record in of_pool]
    known = directory.read_json("pool.json")
    if known is not None:
        for before, now in zip(known["checkpoints"], records):
            if before["fingerprint"] != now["fingerprint"]:
                raise JaxmergeError(
                    "the checkpoint is not the one that this run directory was started with",
                    where=now["source"],
                    expected=f"fingerprint {before['fingerprint']}",
                    found=now["fingerprint"],
                )
    directory.write_json("pool.json", {"checkpoints": records})
