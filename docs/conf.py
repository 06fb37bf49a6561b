"""For Sphinx: the pages of the public names. `bash tools/api_docs.sh` builds them."""

from typing import Any

project = "jaxmerge"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon"]
napoleon_use_ivar = True
default_role = "code"  # single backquotes, as the docstrings have them
autodoc_typehints = "signature"
autodoc_member_order = "groupwise"
autodoc_default_options = {"members": True, "special-members": "__call__"}
html_theme = "alabaster"
html_show_sourcelink = False


def setup(app: Any) -> None:
    """Leaves out what Python says of a tuple's fields: its docstring says more."""
    app.connect(
        "autodoc-skip-member",
        lambda app, what, name, member, skip, options: (
            True if str(member.__doc__).startswith("Alias for field number") else None
        ),
    )
