"""Which tokenizer a pool is read with, out of those that its members and their bases have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxmerge.errors import JaxmergeError
from jaxmerge.evaluation.tokenizer import is_in, tokens
from jaxmerge.textfiles import read_json, read_text


def choose(
    members: Sequence[str], bases: Sequence[str] = (), *, rows: int = 0, chat: bool = False
) -> str:
    """The directory whose tokenizer and chat template are those of all.

    That is the base's, unless the members, which must agree with each other, have more tokens or
    another template: trainers write what they trained with beside an adapter.

    Args:
        members: directories of models and adapters, which may have a tokenizer.
        bases: directories of the models that adapters are laid upon; they may be members too.
        rows: of the embedding, which each token must have; 0: not known.
        chat: whether prompts go through the chat template.

    Returns:
        A directory; "" where none of them has a tokenizer.

    Raises:
        JaxmergeError: the members' vocabularies differ, or do not extend the bases'; a token that
            they add has no row; with `chat`, the members' templates differ.
    """
    bases = [each for each in dict.fromkeys(bases) if each and is_in(each)]
    members = [each for each in dict.fromkeys(members) if is_in(each) and each not in bases]
    check_same_vocabulary(members or bases)
    if not members:
        return bases[0] if bases else ""
    extended = [base for base in bases if _extends(members[0], base, rows)]
    templates = {each: found for each in members if (found := template(each))}
    differing = len(set(map(str, templates.values()))) > 1
    if differing and chat:
        raise JaxmergeError(
            "the chat templates of the members differ, and prompts can have only one",
            where="pool.tokenizer",
            expected="the directory of one of them; or pool.chat=False",
            found=", ".join(_apart(templates)),
        )
    trained = members[0] if differing or not templates else next(iter(templates))
    first = bases[0] if bases else trained
    own = first in extended or (not differing and template(trained) not in (None, template(first)))
    return trained if own else first


def template(directory: str) -> Any:
    """The chat template, as it is written; None where there is none.

    Raises:
        JaxmergeError: a file can't be read.
    """
    file = Path(directory, "chat_template.jinja")
    if file.exists():
        return read_text(file)
    for name in ("chat_template.json", "tokenizer_config.json"):
        said = read_json(Path(directory, name)) if Path(directory, name).exists() else {}
        if isinstance(said, dict) and said.get("chat_template"):
            return said["chat_template"]
    return None


def _apart(templates: dict[str, Any]) -> list[str]:
    """A directory of each template."""
    of_template = {str(found): directory for directory, found in templates.items()}
    return sorted(of_template.values())


def _extends(member: str, base: str, rows: int) -> bool:
    """Whether a member's tokenizer has the base's tokens and others besides.

    Raises:
        JaxmergeError: it lacks some, or others have no row of the embedding.
    """
    expected, found = tokens(base), tokens(member)
    if expected == found:
        return False
    lost = [i for i in sorted(expected) if found.get(i) != expected[i]]
    if lost:
        named = [f"{i}: {found.get(i)!r}, not {expected[i]!r}" for i in lost[:5]]
        raise JaxmergeError(
            f"the vocabulary is not that of {base}, nor does it only add to that",
            where=member,
            expected="the tokens of the base, and others after them; pool.base or pool.tokenizer: "
            'the directory with the tokenizer of all; or pool.vocabulary = "base" or "union"',
            found=f"{len(lost)} of {len(expected)} ids differ, first " + "; ".join(named),
        )
    beyond = [i for i in sorted(found) if rows and i >= rows]
    if beyond:
        raise JaxmergeError(
            "tokens of the tokenizer have no row in the model's embedding",
            where=member,
            expected=f"ids below {rows}; or a base whose embedding was made larger, and an adapter "
            "saved with it: model.resize_token_embeddings(N), then merge_and_unload()",
            found="; ".join(f"{i}: {found[i]!r}" for i in beyond[:5]),
        )
    return True


def check_same_vocabulary(directories: Sequence[str]) -> None:
    """Raises `JaxmergeError` unless each directory's tokenizer has the tokens of the first.

    A merge averages the embedding of token i with that of token i: they must mean the same.
    """
    first, *others = directories or [""]
    expected: dict[int, str] = {}
    for other in others:
        if _same_file(Path(first, "tokenizer.json"), Path(other, "tokenizer.json")):
            continue
        expected = expected or tokens(first)
        found = tokens(other)
        ids = sorted({*expected, *found})
        different = [i for i in ids if expected.get(i) != found.get(i)]
        if different:
            named = [f"{i}: {found.get(i)!r}, not {expected.get(i)!r}" for i in different[:5]]
            raise JaxmergeError(
                f"the vocabulary is not that of {first}",
                where=other,
                expected="the same token for every id in all checkpoints of a pool; or "
                'pool.vocabulary = "base" or "union": then rows are matched by their tokens',
                found=f"{len(different)} of {len(ids)} ids differ, first " + "; ".join(named),
            )


def _same_file(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.read_bytes() == other.read_bytes()
