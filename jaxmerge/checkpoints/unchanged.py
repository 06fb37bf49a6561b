"""Whether files stay as they are while they are read: half of two checkpoints is none."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable

from jaxmerge.errors import JaxmergeError


class Unchanged:
    """What files are before they are read, to be compared with what they are after.

    Args:
        files: paths on this machine; addresses of other places are passed over.
        where: what errors name.
    """

    def __init__(self, files: Iterable[str], where: str):
        self._where = where
        self._before = {file: _stamp(file) for file in files if "://" not in file}

    def check(self) -> None:
        """Raises `JaxmergeError` where a file has another size, time or place on the disk."""
        changed = [file for file, stamp in self._before.items() if _stamp(file) != stamp]
        if changed:
            raise JaxmergeError(
                "files of the checkpoint were written to while they were read",
                where=self._where,
                expected="files that stay as they are; the same command reads them anew",
                found=", ".join(sorted(changed)[:5]),
            )


def files_of(directory: str) -> list[str]:
    """The files of a checkpoint, which may be one; of an address on another machine, none.

    Where there are safetensors, they alone: a trainer may keep other steps beside them.
    """
    if os.path.isfile(directory):
        return [directory]
    weights = glob.glob(os.path.join(glob.escape(directory), "*.safetensors"))
    return weights or [
        os.path.join(top, name) for top, _, names in os.walk(directory) for name in names
    ]


def _stamp(file: str) -> tuple[int, int, int] | None:
    """None where it is gone."""
    try:
        stat = os.stat(file)
    except FileNotFoundError:
        return None
    return stat.st_size, stat.st_mtime_ns, stat.st_ino
