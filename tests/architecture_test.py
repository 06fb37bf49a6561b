"""Imports point one way: what is lower knows nothing of what is higher.

`python -m tests.architecture_test` counts rooms (top-level modules and packages), floors and the
imports between rooms; with the directory of another checkout as its argument, that one's.
"""

import ast
import functools
import sys
from pathlib import Path

import pytest

import jaxmerge

PACKAGE = Path(__file__).parents[1] / "jaxmerge"

# Highest first, as in BUILD.md. A room may import rooms that stand below it, and itself.
ROOMS = (
    *("run", "plan", "sweep", "lm_eval_model"),
    *("experiment", "config", "mergekit", "search", "planning", "streaming"),
    *("evaluation", "checkpoints", "merge", "tasks", "report"),
    *("models", "sandbox", "scores", "entry", "hosts"),
    *("rundir", "durable", "sharding", "textfiles", "trees", "errors"),
)
MOST_ROOMS = 26
MOST_LINES = 400  # of a file
SCREEN = 70  # lines of a function; a longer one has its reason in a comment just above it

# They run where there is no JAX, or before it is set up.
WITHOUT_JAX = ("entry", "report", "scores", "rundir", "errors", "checkpoints/card", "search/space")


def room_of(path: Path, package: Path = PACKAGE) -> str:
    return path.relative_to(package).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """What a file imports of jaxmerge, by full names: modules, or names in them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("jaxmerge.")}


def files_of(package: Path) -> list[Path]:
    """Its modules; `__init__` and `__main__` on top only know where things are."""
    return [path for path in package.rglob("*.py") if path.parent != package or path.stem[0] != "_"]


def arrows(package: Path) -> dict[str, set[str]]:
    """The rooms that each room imports."""
    found: dict[str, set[str]] = {}
    for path in files_of(package):
        own = room_of(path, package)
        found.setdefault(own, set()).update(
            room for name in imports_of(path) if (room := name.split(".")[1]) != own
        )
    return found


def floors(rooms: dict[str, set[str]]) -> dict[str, int]:
    """How many rooms stand under each, one on the other."""

    @functools.cache
    def floor(room: str) -> int:
        return 1 + max((floor(below) for below in rooms[room]), default=0)

    return {room: floor(room) for room in rooms}


FILES = files_of(PACKAGE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = ROOMS.index(room_of(path))
    upward = {name for name in imports_of(path) if ROOMS.index(name.split(".")[1]) < own}
    assert not upward


def test_the_rooms_are_those_of_the_map():
    rooms = {room_of(path) for path in FILES}
    assert rooms == set(ROOMS)
    assert len(rooms) <= MOST_ROOMS


@pytest.mark.parametrize("path", [*Path(jaxmerge.__path__[0]).parent.glob("t*s/**/*.py"), *FILES])
def test_a_file_has_one_subject(path):
    """It is short; so are its functions, or a comment above says why not."""
    text = path.read_text()
    lines = text.splitlines()
    assert len(lines) <= MOST_LINES, path
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and _height(node) > SCREEN:
            assert lines[node.lineno - 2].startswith("#"), f"{path}: {node.name}"


def _height(node: ast.FunctionDef) -> int:
    assert node.end_lineno
    return node.end_lineno - node.lineno + 1


def test_tests_stand_where_the_package_has_what_they_test():
    folders = {path.name for path in Path(__file__).parent.iterdir() if any(path.glob("*_test.py"))}
    assert folders <= {*ROOMS, "tools"}


@pytest.mark.parametrize("start", WITHOUT_JAX)
def test_without_jax(start):
    """Neither it nor what it imports of jaxmerge imports jax."""
    place = PACKAGE / start
    waiting = [*place.rglob("*.py")] if place.is_dir() else [place.with_suffix(".py")]
    seen = set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        assert not {"jax", "flax", "orbax"} & {
            (alias.name if isinstance(node, ast.Import) else node.module or "").split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }, path
        for name in imports_of(path):
            parts = name.split(".")[1:]
            places = [PACKAGE.joinpath(*parts[:i]) for i in range(1, len(parts) + 1)]
            waiting += [
                file
                for each in places
                for file in (each.with_suffix(".py"), each / "__init__.py")
                if file.exists()
            ]
    assert len(seen) > 1 or start == "errors"


def test_a_reader_and_a_writer_know_orbax():
    users = [path.name for path in FILES if "orbax.checkpoint" in path.read_text()]
    assert users == ["orbax.py", "orbax_writing.py"]


def test_public_names_are_what_they_say():
    """Each can be had, is documented, and is not hidden by a module of the same name."""
    modules = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in FILES}
    for name in dir(jaxmerge):
        assert name not in modules
        assert getattr(jaxmerge, name).__doc__, name
    with pytest.raises(AttributeError, match="no_such"):
        jaxmerge.__getattr__("no_such")


if __name__ == "__main__":
    counted = arrows(Path(sys.argv[1]) / "jaxmerge" if sys.argv[1:] else PACKAGE)
    between = sum(map(len, counted.values()))
    print(
        f"{len(counted)} rooms, {max(floors(counted).values())} floors, {between} imports between"
    )
