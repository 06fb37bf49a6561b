"""For Sphinx: the guides and the pages of the public names. `bash tools/docs.sh` builds them."""

import re
from typing import Any

project = "jaxmerge"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3  # links such as tasks.md#splits, which GitHub knows too
napoleon_use_ivar = True
default_role = "code"  # single backquotes, as the docstrings have them
autodoc_typehints = "signature"
autodoc_member_order = "groupwise"
autodoc_preserve_defaults = True  # as the source has them: a lambda has no other name
maximum_signature_line_length = 88  # longer ones have a parameter a line
autodoc_default_options = {"members": True, "special-members": "__call__"}
html_theme = "furo"
html_theme_options = {"light_css_variables": {"code-font-size": "75%"}}  # 96 columns of code
html_title = "jaxmerge"
html_show_copyright = False
html_show_sourcelink = False
highlight_language = "text"  # blocks that name no language are commands and what they print


def setup(app: Any) -> None:
    """Leaves out what Python says of a tuple's fields: its docstring says more."""
    app.connect(
        "autodoc-skip-member",
        lambda app, what, name, member, skip, options: (
            True if str(member.__doc__).startswith("Alias for field number") else None
        ),
    )
    app.connect("source-read", _fields_of_a_config)


def _fields_of_a_config(app: Any, page: str, source: list[str]) -> None:
    """Adds to fields.md every field with its comment and default, a section for each group."""
    if page != "fields":
        return
    from jaxmerge import config  # here, so that other pages can be built without the package

    sections: dict[str, list[str]] = {}
    comment: list[str] = []
    for line in map(str.strip, config.reference().splitlines()[1:]):
        field = re.match(r"config\.(\w+)(\.\w+)?", line)
        comment.append(line)
        if field:
            group = field[1] if field[2] else "general"
            sections.setdefault(group, []).extend(comment)
            comment = []
    for group, lines in sections.items():
        source[0] += f"\n## {group}\n\n```python\n" + "\n".join(lines) + "\n```\n"
