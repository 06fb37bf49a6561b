"""Text to token ids and back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxmerge.errors import JaxmergeError


@runtime_checkable
class Tokenizer(Protocol):
    """What a task needs of a tokenizer."""

    vocabulary: int  # ids are below it
    stops: tuple[int, ...]  # the ids that end a generated text; the first is what training writes

    def prompt(self, text: str) -> list[int]:
        """What a model reads before it answers: with a start token, a chat template, ..."""
        ...

    def encode(self, text: str) -> list[int]:
        """A text that goes on from a prompt."""
        ...

    def decode(self, tokens: Sequence[int]) -> str: ...


class Bytes:
    """One token per UTF-8 byte; a newline ends a generated text.

    >>> Bytes().encode("é")
    [195, 169]
    >>> Bytes().decode([104, 105])
    'hi'
    """

    vocabulary = 256
    stops: tuple[int, ...] = (10,)

    def prompt(self, text: str) -> list[int]:
        return self.encode(text)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode(errors="replace")


class Pretrained:
    """The tokenizer of a Hugging Face directory, through `transformers.AutoTokenizer`.

    A text ends with the end-of-sequence token, or with one that generation_config.json names. No
    code of the directory is run, and chat templates render in Jinja's sandbox.

    Args:
        directory: holds tokenizer.json or another file that AutoTokenizer knows.
        chat: whether prompts are messages of a user, put into the chat template, or plain text.
        system: the system message before each; "": whatever the template does without one.

    Raises:
        JaxmergeError: there is no tokenizer, no chat template, or no token that ends a text.
    """

    def __init__(self, directory: str, *, chat: bool = False, system: str = ""):
        self._tokenizer = _load(directory)
        self._chat, self._system, self._directory = chat, system, directory
        if chat and not self._tokenizer.chat_template:
            raise JaxmergeError(
                "the tokenizer has no chat template", where=directory, expected="pool.chat=False"
            )
        ends = _ids(self._tokenizer.eos_token_id)
        generation = Path(directory, "generation_config.json")
        if generation.exists():
            ends += _ids(_json(generation).get("eos_token_id"))
        if not ends:
            raise JaxmergeError("the tokenizer has no token that ends a text", where=directory)
        self.stops = tuple(dict.fromkeys(ends))
        self.vocabulary = max(self._tokenizer.get_vocab().values()) + 1

    def prompt(self, text: str) -> list[int]:
        if not self._chat:
            tokens = self._tokenizer(text).input_ids
            # Some tokenizers end every text; a prompt goes on.
            return tokens[:-1] if tokens and tokens[-1] in self.stops else tokens
        messages = [{"role": "user", "content": text}]
        if self._system:
            messages.insert(0, {"role": "system", "content": self._system})
        return self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )

    def encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False).input_ids

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def is_in(directory: str) -> bool:
    """Whether a directory has the files of a tokenizer."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    return any(Path(directory, name).exists() for name in names)


def check_same_vocabulary(directories: Sequence[str]) -> None:
    """Raises `JaxmergeError` unless every directory's tokenizer has the tokens of the first.

    A merge averages the embedding of token i with that of token i: they must mean the same.
    """
    first, *others = directories
    expected: dict[int, str] = {}
    for other in others:
        if _same_file(Path(first, "tokenizer.json"), Path(other, "tokenizer.json")):
            continue
        expected = expected or _tokens(first)
        found = _tokens(other)
        ids = sorted({*expected, *found})
        different = [i for i in ids if expected.get(i) != found.get(i)]
        if different:
            named = [f"{i}: {found.get(i)!r}, not {expected.get(i)!r}" for i in different[:5]]
            raise JaxmergeError(
                f"the vocabulary is not that of {first}",
                where=other,
                expected="the same token for every id in all checkpoints of a pool",
                found=f"{len(different)} of {len(ids)} ids differ, first " + "; ".join(named),
            )


def _tokens(directory: str) -> dict[int, str]:
    return {index: token for token, index in _load(directory).get_vocab().items()}


def _same_file(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.read_bytes() == other.read_bytes()


def _load(directory: str) -> Any:
    from transformers import AutoTokenizer  # takes seconds to import

    try:
        return AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise JaxmergeError(
            "the tokenizer can't be read", where=directory, found=str(error).split("\n")[0]
        ) from error


def _ids(found: int | list[int] | None) -> list[int]:
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise JaxmergeError("this is no JSON", where=str(path), found=str(error)) from error
