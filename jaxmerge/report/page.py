"""A page that needs nothing but itself: skeleton, style, data and scripts in one file."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import json
import os
import re
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs

from jaxmerge.errors import at
from jaxmerge.report.markup import text

# Where plotly.js makes ready to draw maps, surfaces and 40 other kinds of traces: 0.4 of the time
# that a page takes. Ours are all `scatter`, which is part of its core and not in this list.
_OTHER_KINDS = re.compile(r"\.register\(\[(?:[\w$]+\(\),){9,}[\w$]+\(\)\]\)")


def assemble(title: str, body: str, data: Any, script: str) -> str:
    """The page.

    Args:
        title: plain text.
        body: markup.
        data: what the script finds as `data`.
        script: name of the file that draws; `plots.js` goes before it.
    """
    plotly, ours = _plotly(), _file("plots.js") + _file(script)
    before, after = _file("page.html").split("<!-- data and scripts -->")
    fields = {
        "policy": " ".join(_hash(source) for source in (plotly, ours)),
        "title": text(title),
        "style": _file("page.css"),
        "body": body,
    }
    # The scripts go in last and by concatenation: what is in them is nobody's placeholder.
    return "".join(
        [
            Template(before).substitute(fields),
            f'<script type="application/json" id="data">{embedded(data)}</script>\n',
            f"<script>{plotly}</script>\n<script>{ours}</script>",
            after,
        ]
    )


def embedded(data: Any) -> str:
    """JSON that cannot end the script element that holds it."""
    said = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return said.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def save(page: str, path: Path) -> Path:
    """Writes the page whole, or leaves what was there.

    Raises:
        JaxmergeError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with at(path):
        try:
            # Newlines as they are: the policy holds hashes of the scripts.
            with temporary.open("w", encoding="utf-8", errors="replace", newline="\n") as file:
                file.write(page)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            with contextlib.suppress(OSError):  # it may be that it could not be made either
                temporary.unlink(missing_ok=True)
    return path


@functools.cache
def _plotly() -> str:
    """plotly.js of the Python package, for `scatter` alone; whole if it is built otherwise."""
    whole = get_plotlyjs()
    lean, lists = _OTHER_KINDS.subn(".register([])", whole)
    return lean if lists == 1 else whole


def _file(name: str) -> str:
    return resources.files("jaxmerge.report").joinpath(name).read_text("utf-8")


def _hash(source: str) -> str:
    digest = hashlib.sha256(source.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
