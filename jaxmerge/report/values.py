"""Numbers and names as plots have them."""

from __future__ import annotations

import html

from jaxmerge.scores.formatting import Format


def scaled(form: Format, value: float) -> float:
    """The value in the unit that the plots have."""
    return round(float(value) * (100 if form.percent else 1), 5)


def label(value: object) -> str:
    """Escaped for plotly's own markup, which does not know quotation marks as entities."""
    return html.escape(str(value), quote=False)
