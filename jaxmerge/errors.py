"""The one exception of jaxmerge: what a user can get wrong, said in one message."""

from __future__ import annotations


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
