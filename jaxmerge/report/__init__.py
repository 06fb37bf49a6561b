"""A run directory as one page: `python -m jaxmerge.report DIR` writes `DIR/report.html`.

With several directories it writes one page that compares them. A page needs nothing but itself:
plotly.js, styles and data are inside, and its content security policy lets no script run but the
two that are written there. Names of checkpoints, tasks and directories are input: they reach a page
through `markup.text`, `plots.label` and `page.embedded` alone.
"""

from jaxmerge.report.comparison import compare
from jaxmerge.report.single import write

__all__ = ["compare", "write"]
