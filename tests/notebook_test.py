"""The Colab notebook, from top to bottom in a fresh kernel."""

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "tools" / "colab.ipynb"


def test_is_valid_and_has_no_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells
    assert not any(cell.outputs or cell.execution_count for cell in cells)


def _printed(cell: nbformat.NotebookNode) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


@pytest.mark.slow
def test_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """In its small form, on the CPU, with the jaxmerge of this checkout: nothing is installed."""
    monkeypatch.setenv("JAXMERGE_NOTEBOOK", "small")
    monkeypatch.setenv("JAXMERGE_CHECKOUT", str(ROOT))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # an installation would fail
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(
        notebook, kernel_name="python3", timeout=900, resources={"metadata": {"path": tmp_path}}
    ).execute()
    cells = {cell.id: cell for cell in notebook.cells}
    assert _printed(cells["install"]) == "jaxmerge for cpu\n"
    assert "sums" in _printed(cells["pool"])
    assert "The searched merge against the best single checkpoint" in _printed(cells["search"])
    (page,) = cells["report"].outputs
    assert page.data["text/html"].startswith("<div><iframe srcdoc=")
    assert (tmp_path / "merged.zip").stat().st_size > 10_000
    assert list((tmp_path / "runs/mine/merged").iterdir()) == [tmp_path / "runs/mine/merged/orbax"]
