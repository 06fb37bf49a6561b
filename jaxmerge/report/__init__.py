"""A run directory as one page: `python -m jaxmerge.report DIR` writes `DIR/report.html`.

With several directories it writes one page that compares them. A page needs nothing but itself:
plotly.js, styles and data are inside, and its content security policy lets no script run but the
two that are written there. Names of checkpoints, tasks and directories are input: they reach a page
through `markup.text`, `values.label` and `page.embedded` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

# What they are made of is imported when they are called: the command answers Ctrl-C before.


def write(directory: Path) -> Path:
    """Writes `report.html` into a run directory; see `single.write`."""
    from jaxmerge.report import single

    return single.write(directory)


def compare(directories: Sequence[Path], out: Path) -> Path:
    """Writes one page that compares several runs; see `comparison.compare`."""
    from jaxmerge.report import comparison

    return comparison.compare(directories, out)
