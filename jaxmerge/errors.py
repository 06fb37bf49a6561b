"""The one exception of jaxmerge: what a user can get wrong, said in one message."""

from __future__ import annotations

from collections.abc import Sequence


class JaxmergeError(Exception):
    """A mistake in the input, told so that the reader can mend it.

    Attributes:
        what: one sentence that says what is wrong.
        where: the file, config field or leaf that is at fault, if there is one.
        expected: what would have been right.
        found: what was there instead.
    """

    def __init__(self, what: str, *, where: str = "", expected: str = "", found: str = ""):
        self.what, self.where, self.expected, self.found = what, where, expected, found
        lines = [f"{where}: {what}" if where else what]
        if expected:
            lines.append(f"  expected: {expected}")
        if found:
            lines.append(f"  found:    {found}")
        super().__init__("\n".join(lines))


def check_choice(where: str, value: str, choices: Sequence[str]) -> None:
    """Raises `JaxmergeError`, which names the field, unless the value is one of the choices."""
    if value not in choices:
        raise JaxmergeError(
            "unknown choice", where=where, expected=", ".join(choices), found=str(value)
        )


def check_least(where: str, value: int, least: int) -> None:
    """Raises `JaxmergeError`, which names the field, for a value below the least there can be."""
    if value < least:
        raise JaxmergeError(f"must be at least {least}", where=where, found=str(value))
