"""HTML of which the reports are made: escaped text, numbers, tables, bars.

What is called a cell or content is markup already; every name goes through `text`.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence

from jaxmerge.scores.formatting import Format

DASH = "&ndash;"


def text(value: object) -> str:
    """Escaped for HTML."""
    return html.escape(str(value))


def score(form: Format, value: float, *, bold: bool = False, unit: bool = False) -> str:
    """A score as its task's format has it; `unit` adds the per cent sign."""
    shown = _minus(form.score(value)) + "%" * (unit and form.percent)
    return f"<b>{shown}</b>" if bold else shown


def difference(form: Format, value: float, *, unit: bool = False) -> str:
    """A difference of scores, with its sign."""
    return _minus(form.difference(value)) + form.points * unit


def interval(form: Format, ends: Sequence[float]) -> str:
    """The interval of a score."""
    return f'<span class="interval">{_minus(form.interval(ends))}</span>'


def differences(form: Format, ends: Sequence[float]) -> str:
    """The interval of a difference."""
    return f'<span class="interval">{_minus(form.differences(ends))}</span>'


def scored(
    form: Format, value: float, ends: Sequence[float], *, bold: bool = False, unit: bool = False
) -> str:
    """A cell with a score and, below it, its interval."""
    return f"{score(form, value, bold=bold, unit=unit)}<small>{interval(form, ends)}</small>"


def compared(form: Format, value: float, ends: Sequence[float], *, unit: bool = False) -> str:
    """A cell with a difference and, below it, its interval."""
    return f"{difference(form, value, unit=unit)}<small>{differences(form, ends)}</small>"


def p_value(value: float) -> str:
    """A p-value as a table has it."""
    return "&lt;&nbsp;0.001" if value < 0.001 else f"{value:.3f}"


def verdict(ends: Sequence[float], better: str, worse: str) -> str:
    """What the interval of a difference says."""
    low, high = ends
    if low > 0:
        return f'<span class="better">{better}</span>'
    if high < 0:
        return f'<span class="worse">{worse}</span>'
    return '<span class="unclear">no clear difference</span>'


def number(value: float) -> str:
    """A number that is no score, such as a weight."""
    return _minus(f"{value:.3f}")


def listed(values: Mapping[str, object], spec: str = "") -> str:
    """`name value, name value`."""
    return ", ".join(
        f"{text(name)}&nbsp;{text(f'{value:{spec}}')}" for name, value in values.items()
    )


def names(values: Iterable[str]) -> str:
    """The names, separated by commas."""
    return ", ".join(map(text, values))


def section(title: str, *contents: str) -> str:
    """A section of the page; its title is plain text."""
    return f"<section><h2>{text(title)}</h2>{''.join(contents)}</section>\n"


def note(content: str) -> str:
    """A paragraph in the colour of explanations."""
    return f'<p class="note">{content}</p>'


def details(summary: str, content: str) -> str:
    """What is folded away until someone asks."""
    return f"<details><summary>{text(summary)}</summary>{content}</details>"


def facts(values: Mapping[str, str]) -> str:
    """A list of names and what is to be said of them."""
    items = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in values.items())
    return f"<dl>{items}</dl>"


def warnings(messages: Iterable[str]) -> str:
    """What whoever reads the scores should know; empty where there is nothing."""
    items = "".join(f"<li>{text(message)}</li>" for message in messages)
    return f'<ul class="warnings">{items}</ul>' if items else ""


def figure(identity: str, caption: str, css: str = "") -> str:
    """The place of a plot, which the page's script draws."""
    return (
        f'<figure><div id="{identity}" class="plot {css}"></div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def over(counted: bool) -> str:
    """The choice of what the best so far is drawn over; empty where tokens were not counted."""
    choice = (
        '<div class="controls"><label>over <select id="over"><option>tokens</option>'
        "<option>evaluations</option></select></label></div>"
    )
    return choice * counted


def options(choices: Sequence[str], selected: int) -> str:
    """The options of a select element, whose values are the positions."""
    return "".join(
        f'<option value="{position}"{" selected" * (position == selected)}>{text(name)}</option>'
        for position, name in enumerate(choices)
    )


def table(header: Iterable[str], rows: Iterable[Sequence[str]], css: str = "") -> str:
    """A table of cells; the first cell of a row is its heading."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    # A region that scrolls must be reachable from the keyboard.
    return (
        f'<div class="scroll" tabindex="0"><table class="{css}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def bar(value: float, ends: Sequence[float], css: str, shown: str) -> str:
    """A bar from zero to `value` on the range `ends`, and what is written beside it."""
    low, high = min(0.0, *ends), max(0.0, *ends)
    left, right = (_percent(end, low, high) for end in (min(value, 0.0), max(value, 0.0)))
    return (
        f'<span class="track"><span class="bar {css}" '
        f'style="left:{left:.2f}%;width:{right - left:.2f}%"></span></span>'
        f'<span class="number">{shown}</span>'
    )


def shaded(value: float, most: float, shown: str) -> str:
    """A number on a ground that is the darker the larger its size is, of `most` at the most."""
    share = 100 * abs(value) / (most or 1.0)
    kind = "negative" if value < 0 else "positive"
    return f'<span class="shade {kind}" style="--share:{share:.0f}%">{shown}</span>'


def whisker(
    value: float, ends: Sequence[float], low: float, high: float, *, zero: bool = True
) -> str:
    """An interval and its middle, drawn on the range from `low` to `high`; `zero` marks 0."""
    middle, left, right = (_percent(x, low, high) for x in (value, *ends))
    line = f'<span class="zero" style="left:{_percent(0.0, low, high):.2f}%"></span>' * zero
    return (
        f'<span class="whisker">{line}'
        f'<span class="reach" style="left:{left:.2f}%;width:{right - left:.2f}%"></span>'
        f'<span class="dot" style="left:{middle:.2f}%"></span></span>'
    )


def _percent(value: float, low: float, high: float) -> float:
    return 100 * (value - low) / ((high - low) or 1.0)


def _minus(number: str) -> str:
    return number.replace("-", "&minus;")
