"""How well a model predicts a text."""

from __future__ import annotations

from collections.abc import Iterator

from jaxmerge.errors import JaxmergeError
from jaxmerge.tasks.common import Example, Task
from jaxmerge.tasks.kinds import perplexity
from jaxmerge.tasks.splits import divide
from jaxmerge.textfiles import read_text


def text(*, path: str, search: int = 192, test: int = 1000, chunk_bytes: int = 2048) -> Task:
    """The bits per byte of a text file, negated: 0 is the best there can be.

    The file is cut into chunks, each of which is an example and is read by itself; what it says
    decides its split, see `splits.divide`. Text can be added at the end, and all else stays where
    it is.

    Args:
        path: the file, UTF-8.
        search: chunks in that split, at most; `test` alike.
        chunk_bytes: bytes of a chunk, at most; it ends at the end of a character.

    Raises:
        JaxmergeError: the file can't be read; a split is empty; chunks may not hold a character.
    """
    if chunk_bytes < 4:
        raise JaxmergeError(
            "a character may have more bytes than that",
            where=f"task perplexity {path}, chunk_bytes",
            expected="at least 4",
            found=str(chunk_bytes),
        )
    content = read_text(path).encode()
    examples = [Example(chunk) for chunk in _chunks(content, chunk_bytes)]
    name = f"perplexity {path}"
    splits = divide(examples, lambda example: example.prompt, name=name, search=search, test=test)
    return perplexity(name, splits)


def _chunks(content: bytes, size: int) -> Iterator[str]:
    """Pieces of at most `size` bytes; a shorter one at the end is left out, unless it is all."""
    start = 0
    while len(content) - start >= size or (start == 0 and content):
        stop = min(start + size, len(content))
        while stop < len(content) and content[stop] & 0xC0 == 0x80:  # within a character
            stop -= 1
        yield content[start:stop].decode()
        start = stop
