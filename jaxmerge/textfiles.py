"""Text files that others wrote: UTF-8, with or without a byte order mark, and JSON in them."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from etils import epath

from jaxmerge.errors import JaxmergeError, way_out


def decode(data: bytes, where: str) -> str:
    """UTF-8 as text; a byte order mark, which Windows' editors write, is no part of it.

    Args:
        data: the bytes of a file.
        where: what errors name.

    Raises:
        JaxmergeError: it is no UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise JaxmergeError(
            "this is no text in UTF-8", where=where, expected="UTF-8", found=str(error)
        ) from error


def read_text(path: epath.PathLike) -> str:
    """The text of a file; ends of lines stay as they are.

    Raises:
        JaxmergeError: the file can't be read, or is no UTF-8.
    """
    return decode(read_bytes(path), str(path))


def read_bytes(path: epath.PathLike) -> bytes:
    """The bytes of a file.

    Raises:
        JaxmergeError: the file can't be read.
    """
    try:
        return epath.Path(path).expanduser().read_bytes()
    except OSError as error:
        raise JaxmergeError(
            "the file can't be read",
            where=str(path),
            expected=way_out(error),
            found=error.strerror or str(error),
        ) from error


def read_json(path: epath.PathLike) -> Any:
    """What a file of JSON says; see `parse_json`.

    Raises:
        JaxmergeError: the file can't be read, or is no such JSON.
    """
    return parse_json(read_bytes(path), str(path))


def parse_json(text: bytes, where: str) -> Any:
    """What a JSON text says.

    Raises:
        JaxmergeError: it is no JSON, or an object in it has the same key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            count = Counter(key for key, _ in pairs)
            twice = ", ".join(key for key in made if count[key] > 1)
            raise JaxmergeError(f"{twice} is there twice", where=where, expected="each key once")
        return made

    try:
        return json.loads(text.decode("utf-8-sig"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise JaxmergeError(
            "this is no JSON", where=where, expected="JSON", found=str(error)
        ) from error
