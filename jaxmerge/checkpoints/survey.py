"""What checkpoints there are, and whether they are alike: a look at their metadata alone."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from etils import epath

from jaxmerge.checkpoints import aligned, directory, huggingface, lora, orbax, trainers
from jaxmerge.checkpoints.source import Source
from jaxmerge.errors import JaxmergeError
from jaxmerge.models.layout import COMPUTED
from jaxmerge.trees import differences, named_leaves

# Lines of differences in the number of tokens.
_OF_ROWS = re.compile(
    r": leaf (embedding|unembedding|(\S+\.)?(embed_tokens|wte|word_embeddings|embed_in|lm_head|"
    r"embed_out)\.weight) is|: architecture (vocab|vocab_size) is"
)
# By the name in `Source.format`; the first that recognises a path reads it.
FORMATS = {**trainers.STORED, "lora": lora, "huggingface": huggingface}
# What reads a source, by its format: checkpoints may be of a trainer, see `find`.
READERS = FORMATS | dict.fromkeys(("maxtext", "gemma", "tunix", "levanter"), trainers)


def formats(patterns: Sequence[str]) -> set[str]:
    """The formats of the checkpoints that `survey` would find.

    Raises:
        JaxmergeError: a path has no checkpoint.
    """
    return {format_of(path) for pattern in patterns for path in _find(pattern)}


def by_name(patterns: Sequence[str]) -> bool:
    """Whether all checkpoints have leaves that are merged by their names, as they are stored.

    Raises:
        JaxmergeError: a path has no checkpoint.
    """
    return formats(patterns) <= trainers.STORED.keys()


def count(patterns: Sequence[str]) -> int:
    """How many checkpoints `survey` would find.

    Raises:
        JaxmergeError: a path has no checkpoint.
    """
    return sum(len(_find(pattern)) for pattern in patterns)


def find(
    patterns: Sequence[str],
    *,
    subtree: str = "",
    base: str = "",
    item: str = "",
    rope_type: str = "",
    vocabulary: str = "",
    by_tensor: bool = False,
    as_stored: bool = False,
) -> tuple[Source, ...]:
    """Finds checkpoints, which need not be alike; reads no data.

    Args:
        patterns: directories, or patterns such as `pools/*/final`, whose matches are sorted, by
            number where their names have numbers: step 200 comes before step 1000.
        subtree: where in each Orbax checkpoint the parameters are; "": see `parameters.subtree`.
        item: which item of each Orbax checkpoint they are in; "": see `parameters.item`.
        base: Hugging Face directory that adapters are laid upon; "": the one that each names.
        rope_type: of MaxText's Llama models, see `config.pool.rope_type`.
        vocabulary: `base` or `union`: checkpoints are read in one vocabulary, see `aligned.align`;
            "": as they are stored.
        as_stored: checkpoints have the leaves that are in them. Else those of a trainer that is
            known are taken for the decoder's, where `base` or a Hugging Face member says which
            model they are of; see `trainers.as_decoder`.
        by_tensor: every tensor of a Hugging Face directory is a leaf, see `directory.read`; the
            checkpoints must all be such directories.

    Raises:
        JaxmergeError: a path has no checkpoint, or is named twice; a leaf is of shape [0].
    """
    paths = [path for pattern in patterns for path in _find(pattern)]
    found = [
        huggingface.describe(name, path, by_tensor=True)
        if by_tensor
        else FORMATS[format_of(path)].describe(name, path, subtree, base, item)
        for name, path in zip(_names(paths), paths)
    ]
    for source in found:
        directory.check_filled(named_leaves(source.abstract), source.path)
    if vocabulary:
        return aligned.align(found, vocabulary, base, by_tensor=by_tensor)
    if as_stored or all(source.format not in trainers.STORED for source in found):
        return tuple(found)
    of_model = base or next((each.directory for each in found if each.directory), "")
    return tuple(
        trainers.as_decoder(source, of_model, rope_type)
        if source.format in trainers.STORED
        else source
        for source in found
    )


def survey(
    patterns: Sequence[str],
    *,
    subtree: str = "",
    base: str = "",
    item: str = "",
    rope_type: str = "",
    vocabulary: str = "",
    dtype: str = "",
    by_tensor: bool = False,
    as_stored: bool = False,
) -> tuple[Source, ...]:
    """Finds the checkpoints of a pool and compares their metadata.

    No data are read, but for a head that not all members of a tied model have.

    Args:
        patterns: see `find`; `subtree` and all others but `dtype` alike.
        dtype: what `load` will cast to; floating-point dtypes may differ unless it is "".

    Raises:
        JaxmergeError: a path has no checkpoint, there are fewer than two, or they are not alike:
            then every difference of leaf names, shapes, dtypes and architectures is listed.
    """
    found = find(
        patterns,
        subtree=subtree,
        base=base,
        item=item,
        rope_type=rope_type,
        vocabulary=vocabulary,
        by_tensor=by_tensor,
        as_stored=as_stored,
    )
    sources = _mended(found)
    if any(each.architecture != sources[0].architecture for each in sources):
        sources = tuple(map(_completed, sources))
    if len(sources) < 2:
        raise JaxmergeError(
            "a pool needs at least two checkpoints",
            where="pool.checkpoints",
            expected="more paths, or a pattern that finds more; one alone is scored by "
            "--mode=evaluate",
            found=f"{len(sources)} in {list(patterns)}",
        )
    _check_alike(sources, dtype)
    return sources


def _mended(sources: tuple[Source, ...]) -> tuple[Source, ...]:
    """Models merged by tensor without what only some of them hold, and mean nothing by.

    That is a head that a tied model has a second time, and buffers that transformers computes.
    """
    if not sources or any(each.architecture.get("model") for each in sources):
        return sources
    common = set.intersection(*({*each.abstract} for each in sources))
    return tuple(_without(each, _twice(each, common)) for each in sources)


def _twice(source: Source, common: set[str]) -> set[str]:
    """The tensors that only some members have, and that this one does not need.

    Raises:
        JaxmergeError: a head is not the embedding that the config says it is tied to.
    """
    beyond = {name for name in source.tensors if name in source.abstract and name not in common}
    computed = {name for name in beyond if any(re.search(each, name) for each in COMPUTED)}
    heads = {name for name in beyond if directory.HEAD.search(name)}
    if not heads or not _completed(source).architecture.get("tie_word_embeddings", True):
        return computed
    for head in heads:
        shape = source.tensors[head].shape
        twins = [
            name
            for name in common & {*source.tensors}
            if (directory.EMBEDDING.search(name) or name == head.replace("decoder.bias", "bias"))
            and source.tensors[name].shape == shape
        ]
        if not any(directory.equal(source.tensors, twin, head) for twin in twins):
            raise JaxmergeError(
                f"{head} differs from the embedding that the config says it is tied to, and not "
                "all members have such a tensor",
                where=source.path,
                expected="the head of a tied model to be its embedding, or no such tensor; else "
                "tie_word_embeddings false in config.json, and a head in all members",
                found=f"looked at {', '.join(sorted(twins)) or 'no embedding of its shape'}",
            )
    return computed | heads


def _without(source: Source, names: set[str]) -> Source:
    if not names:
        return source
    kept = {name: leaf for name, leaf in source.abstract.items() if name not in names}
    tensors = {name: each for name, each in source.tensors.items() if name not in names}
    return source._replace(abstract=kept, tensors=tensors)


def _completed(source: Source) -> Source:
    """A model without a decoder, its architecture as transformers completes the config."""
    if source.architecture.get("model") != "" or not source.directory:
        return source
    said = directory.with_defaults(epath.Path(source.base or source.path))
    if source.rows:
        said = aligned.with_rows(said, source.rows.count)
    return source._replace(architecture=said)


def _find(pattern: str) -> list[epath.Path]:
    path = orbax.absolute(pattern)
    matches = _matches(path)
    if matches == [path] and not format_of(path):
        raise JaxmergeError(
            "this is no checkpoint",
            where=str(path),
            expected=f"a finished checkpoint of a known format: {', '.join(FORMATS)}"
            + _steps_within(path),
        )
    found = [match for match in matches if format_of(match)]
    if not found:
        raise JaxmergeError(
            "there is no checkpoint here",
            where=str(path),
            expected="a checkpoint's directory, or a pattern (*, ?, [) of some",
            found=f"{len(matches)} that match, none a checkpoint" if matches else "",
        )
    return found


def _by_number(path: epath.Path) -> list[tuple[int, str]]:
    """Orders paths part by part, digits in them as the numbers that they are."""
    pieces = (piece for part in path.parts for piece in [*re.split(r"(\d+)", part), ""])
    return [(int(each) if each.isdecimal() else -1, each) for each in pieces]


def _matches(path: epath.Path) -> list[epath.Path]:
    """What a path with patterns in any of its parts matches, sorted.

    A part that is there as it is written is no pattern, so that names may have brackets.
    """
    found = [epath.Path(path.anchor)] if path.anchor else [epath.Path(path.parts[0])]
    for part in path.parts[1:]:
        following = []
        for parent in found:
            if (parent / part).exists():
                following.append(parent / part)
            elif any(mark in part for mark in "*?[") and parent.is_dir():
                following += [each for each in parent.iterdir() if _is_match(each.name, part)]
        found = following
    return sorted(found, key=_by_number)


def _is_match(name: str, pattern: str) -> bool:
    """As in a shell: what begins with a dot is matched by a pattern that does."""
    hidden = name.startswith(".") and not pattern.startswith(".")
    return not hidden and fnmatch.fnmatchcase(name, pattern)


def format_of(path: epath.Path) -> str:
    return next((name for name, module in FORMATS.items() if module.recognises(path)), "")


def _steps_within(path: epath.Path) -> str:
    """What to name instead of a directory of checkpoints, for a message."""
    inside = path.is_dir() and any(each.is_dir() and format_of(each) for each in path.iterdir())
    return f"; the ones in here are '{path}/*'" if inside else ""


def _names(paths: Sequence[epath.Path]) -> list[str]:
    """The directory names, with as many parents as it takes to tell them apart."""
    if not paths:
        return []
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    twice = [str(path) for path, count in Counter(paths).items() if count > 1]
    raise JaxmergeError(
        "a checkpoint is listed more than once",
        where="pool.checkpoints",
        expected="each checkpoint once; patterns may find one that is named too",
        found=", ".join(twice),
    )


_ALIKE = "checkpoints of one model, with the same leaves, shapes and dtypes"


def _check_alike(sources: Sequence[Source], dtype: str) -> None:
    """Raises unless leaves and architectures are the same, but for what casting mends."""
    lines = _differences(sources, dtype)
    if lines:
        castable = not _differences(sources, "float32")
        expected = "the same dtypes, or pool.dtype: it casts all to one" if castable else _ALIKE
        if all(": architecture " in line for line in lines):
            expected = "the same in each config.json; delete there what says nothing of the "
            expected += "computation"
        by_tokens = all(source.format in ("huggingface", "lora") for source in sources)
        if by_tokens and not castable and all(map(_OF_ROWS.search, lines)):
            expected = 'pool.vocabulary = "base" or "union": then rows are matched by their tokens'
        raise JaxmergeError(
            "the checkpoints can't be merged:\n  " + "\n  ".join(lines),
            where="pool.checkpoints",
            expected=expected,
        )


def _differences(sources: Sequence[Source], dtype: str) -> list[str]:
    def cast(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype) if floating else leaf.dtype)

    lines = differences(
        {
            source.name: jax.tree.map(cast, source.abstract) if dtype else source.abstract
            for source in sources
        }
    )
    first = sources[0]
    return lines + [
        f"{source.name}: architecture {key} is {source.architecture.get(key)!r}, "
        f"in {first.name} {first.architecture.get(key)!r}"
        for source in sources[1:]
        for key in sorted({*first.architecture, *source.architecture})
        if source.architecture.get(key) != first.architecture.get(key)
    ]
