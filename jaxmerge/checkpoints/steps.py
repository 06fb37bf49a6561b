"""Steps of a training run as members: which of a directory's checkpoints a window takes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from etils import epath

from jaxmerge.checkpoints import orbax, survey
from jaxmerge.errors import JaxmergeError

# The number ends the name and is its only one: 1000, step-1000, ckpt_1000, checkpoint-1000.
_NAME = re.compile(r"\D*(\d+)")
_SHOWN = 12  # steps that a message names


class Window(NamedTuple):
    """Steps of a run.

    Attributes:
        start: the first; None: the first that is there.
        stop: the last, itself included; None: the last that is there.
        every: from one to the next, of which none may be missing; None: all that are there.
    """

    start: int | None
    stop: int | None
    every: int | None

    def of(self, there: list[int]) -> list[int]:
        """The steps that are meant, in their order, whether they are there or not.

        Args:
            there: steps that are, in their order.
        """
        start = there[0] if self.start is None else self.start
        stop = there[-1] if self.stop is None else self.stop
        if self.every is None:
            return [step for step in there if start <= step <= stop]
        return list(range(start, stop + 1, self.every))


def window(text: str) -> Window:
    """The window that `start:stop:every` describes; each of the three may be left out.

    Both ends are included: `1000:5000:500` is 1000, 1500, ..., 5000, as nobody expects a run's last
    checkpoint to be left out.

    Raises:
        JaxmergeError: it is none.
    """
    parts = text.split(":")
    numbers = [int(part) if part.isdecimal() else None for part in parts]
    numeric = all(part == "" or part.isdecimal() for part in parts)
    start, stop, every = (*numbers, None, None)[:3]
    ordered = start is None or stop is None or start <= stop
    if not numeric or len(parts) not in (2, 3) or every == 0 or not ordered:
        raise JaxmergeError(
            "these are no steps of a run",
            where="pool.steps",
            expected="start:stop:every, both ends included, such as 1000:5000:500; or 1000:5000, "
            "3000: or :, all that are there between the ends",
            found=text,
        )
    return Window(start, stop, every)


def check(text: str, patterns: Sequence[str]) -> None:
    """Raises `JaxmergeError`, which names the field of a config, unless this can be a window."""
    window(text)
    if len(patterns) != 1:
        raise JaxmergeError(
            "the steps of one run lie in one directory",
            where="pool.checkpoints",
            expected="that directory alone, such as run/checkpoints; or no pool.steps",
            found=", ".join(patterns),
        )


def members(directory: str, text: str) -> tuple[str, ...]:
    """The checkpoints of a window, in the order of their steps.

    Args:
        directory: that the steps lie in, such as `run/checkpoints`.
        text: see `window`.

    Raises:
        JaxmergeError: there are no steps here, one is missing, or two have the same number.
    """
    wanted, path = window(text), orbax.absolute(directory)
    found = _steps(path)
    chosen = wanted.of(sorted(found)) if found else []
    missing = [step for step in chosen if step not in found]
    if missing or not chosen:
        raise JaxmergeError(
            f"the run has no step {_listed(missing)}"
            if missing
            else "there are no such steps here"
            if found
            else "no steps of a run lie in here",
            where=str(path),
            expected="pool.steps of some that are there; start:stop takes all between the ends"
            if found
            else "a directory of finished checkpoints whose names end in their steps, such as "
            "run/checkpoints with 1000, 2000 in it",
            found=f"steps {_listed(sorted(found))}" if found else "",
        )
    return tuple(str(found[step]) for step in chosen)


def _steps(path: epath.Path) -> dict[int, epath.Path]:
    """The finished checkpoints of a directory by their steps."""
    found: dict[int, epath.Path] = {}
    for each in sorted(path.iterdir()) if path.is_dir() else ():
        number = _NAME.fullmatch(each.name)
        if not number or not survey.format_of(each):
            continue
        if int(number[1]) in found:
            raise JaxmergeError(
                f"two checkpoints are of step {int(number[1])}",
                where=str(path),
                expected="one of each step in a directory; or their paths without pool.steps",
                found=f"{found[int(number[1])].name}, {each.name}",
            )
        found[int(number[1])] = each
    return found


def _listed(steps: list[int]) -> str:
    """Steps for a message, those in the middle left out where they are many."""
    said = [str(step) for step in steps]
    if len(said) > _SHOWN:
        said = [*said[: _SHOWN // 2], "...", *said[-_SHOWN // 2 :]]
    return ", ".join(said)
