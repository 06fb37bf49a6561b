"""What a run leaves for the next one of its process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Part = TypeVar("Part")


class Held:
    """Parts of a run, by name, kept for as long as runs say the same of them in their configs."""

    def __init__(self) -> None:
        self._made_of: Mapping[str, Any] = {}
        self._parts: dict[str, Any] = {}

    def release(self, made_of: Mapping[str, Any]) -> None:
        """Lets go of all parts but those that the next run wants too.

        It does so before the next run makes anything: two pools need not fit into memory together.

        Args:
            made_of: what each part of the next run is made of: plain fields of its config.
        """
        self._parts = {
            name: part
            for name, part in self._parts.items()
            if name in made_of and made_of[name] == self._made_of[name]
        }
        self._made_of = made_of

    def part(self, name: str, make: Callable[[], Part]) -> Part:
        """The part that is held, or else the one that is made now."""
        if name not in self._parts:
            self._parts[name] = make()
        return self._parts[name]
