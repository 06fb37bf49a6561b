"""The command line: `python -m jaxmerge.report DIR [DIR ...]`."""

from __future__ import annotations

from jaxmerge import entry

if __name__ == "__main__":  # before the imports, which take a second
    entry.begin()

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxmerge.report import compare, write


def console(arguments: Sequence[str] | None = None) -> int:
    """Writes the page that the arguments ask for, prints its path; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxmerge.report",
        description="Writes DIR/report.html of a run, finished or not. Of several runs, writes one "
        "page that compares them.",
    )
    parser.add_argument("directories", metavar="DIR", type=Path, nargs="+", help="a run directory")
    parser.add_argument(
        "--out", type=Path, help="where several runs are compared; default: comparison.html"
    )
    given = parser.parse_args(arguments)
    if given.out and len(given.directories) == 1:
        parser.error("--out is for several directories; one run's page is DIR/report.html")
    directories = [directory.expanduser() for directory in given.directories]
    if len(directories) == 1:
        print(write(directories[0]))
    else:
        print(compare(directories, (given.out or Path("comparison.html")).expanduser()))
    return 0


if __name__ == "__main__":
    sys.exit(console())
