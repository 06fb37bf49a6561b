"""Text to token ids and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class Tokenizer(Protocol):
    """What a task needs of a tokenizer."""

    vocabulary: int  # ids are below it
    stop: int  # the id that ends a generated text
    padding: int  # fills rows of a batch; its value is never read

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


class Bytes:
    """One token per UTF-8 byte; a newline ends a generated text.

    >>> Bytes().encode("é")
    [195, 169]
    >>> Bytes().decode([104, 105])
    'hi'
    """

    vocabulary = 256
    stop = 10
    padding = 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode(errors="replace")
