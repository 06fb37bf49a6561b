"""Every refusal says what would be right."""

import ast
from collections.abc import Iterator
from pathlib import Path

import jaxmerge
from jaxmerge.errors import JaxmergeError, of_system, way_out

PACKAGE = Path(jaxmerge.__file__).parent


def refusals() -> Iterator[tuple[str, set[str | None]]]:
    """Where a `JaxmergeError` is made, and the names of what it is given."""
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            if node.func.id == "JaxmergeError":
                place = f"{file.relative_to(PACKAGE)}:{node.lineno}"
                yield place, {each.arg for each in node.keywords}


def test_every_refusal_says_the_way_out():
    """`expected` is there, and is more than nothing where it is written down."""
    found = list(refusals())
    assert len(found) > 250  # it is the package that is read
    assert [place for place, given in found if "expected" not in given] == []


def test_what_the_system_refuses_has_a_way_out():
    """Of the usual errors; of others nothing is invented."""
    full, odd = OSError(28, "No space left on device", "/a/file"), OSError(9999, "odd")
    assert "room on that disk" in str(of_system(full))
    assert str(of_system(full)).startswith("/a/file: ")
    assert way_out(odd) == ""
    assert str(JaxmergeError("wrong", where="x", expected=way_out(odd))) == "x: wrong"


def test_what_was_found_is_told_by_its_ends_where_it_is_long():
    said = str(JaxmergeError("wrong", found="a" + "b" * 10_000 + "c"))
    assert len(said) < 5000
    assert "found:    ab" in said
    assert " ... 10,002 characters in all ... " in said
    assert said.endswith("bc")
