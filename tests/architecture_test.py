"""Imports point one way: what is lower knows nothing of what is higher."""

import ast
from pathlib import Path

import pytest

import jaxmerge

PACKAGE = Path(__file__).parents[1] / "jaxmerge"

# Lowest first. A module may import modules of lower layers, and of its own layer.
LAYERS = (
    {
        "errors",
        "trees",
        "pareto",
        "objective",
        "formatting",
        "stats",
        "requests",
        "tokenizer",
        "models",
        "processes",
        "signals",
        "watch",
    },
    {"sharding", "merge", "space"},
    {"checkpoints", "generate", "batches", "sandbox"},
    {"respond", "tasks"},
    {"evaluate", "remember"},
    {"rundir"},
    {"search"},
    {"planning"},
    {"export", "streaming"},
    {
        *("progress", "tensorboard", "live", "analyses"),
        *("config", "results", "card", "report", "command_line", "grid"),
    },
    {"sources", "searches", "sized"},
    {"held", "lm_eval_model", "prepare"},
    {"merging", "scoring", "phases"},
    {"run"},
    {"plan", "sweep"},
)
# They run where there is no JAX, or before it is set up.
WITHOUT_JAX = (
    *("report", "card", "objective", "formatting", "stats", "pareto", "rundir"),
    *("errors", "space"),
)


def _imports(path: Path) -> set[str]:
    """The top-level modules of jaxmerge that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith("jaxmerge.")}


def _layer(module: str) -> int:
    (layer,) = [i for i, layer in enumerate(LAYERS) if module in layer]
    return layer


FILES = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_down(path):
    module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    upward = {name for name in _imports(path) if _layer(name) > _layer(module)}
    assert not upward, f"{module} imports {upward}"


def test_every_layer_has_files():
    modules = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert modules == set().union(*LAYERS)


@pytest.mark.parametrize("module", WITHOUT_JAX)
def test_without_jax(module):
    """Neither it nor what it imports of jaxmerge imports jax."""
    waiting, seen = [module], set()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        for path in (PACKAGE / f"{name}.py", *(PACKAGE / name).rglob("*.py")):
            if not path.exists():
                continue
            assert not {"jax", "flax", "orbax"} & {
                (alias.name if isinstance(node, ast.Import) else node.module or "").split(".")[0]
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Import | ast.ImportFrom)
                for alias in node.names
            }
            waiting += [other for other in _imports(path) if other not in seen]


def test_one_file_knows_the_experimental_orbax():
    users = [path for path in FILES if "orbax.checkpoint" in path.read_text()]
    assert [path.name for path in users] == ["orbax.py"]


def test_public_names_are_what_they_say():
    """Each can be had, is documented, and is not hidden by a module of the same name."""
    modules = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in FILES}
    for name in dir(jaxmerge):
        assert name not in modules
        assert getattr(jaxmerge, name).__doc__, name
    with pytest.raises(AttributeError, match="no_such"):
        jaxmerge.__getattr__("no_such")
