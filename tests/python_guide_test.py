"""What docs/python.md says to type does what it says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from jaxmerge.checkpoints import orbax
from jaxmerge.merge.linear import linear
from tests import tiny

ROOT = Path(__file__).parents[1]


def _from_python() -> str:
    """The lines of its whole search."""
    _, section = (ROOT / "docs/python.md").read_text().split("\n## A search in one script\n")
    (block,) = re.findall(r"```python\n(.*?)```", section.split("\n## ")[0], re.DOTALL)
    return block


@pytest.mark.slow
def test_from_python(tmp_path):
    """The very lines, in a new interpreter, with random models where they look for a pool."""
    tiny.pool(tmp_path / "pools" / "quickstart")
    subprocess.run(
        [sys.executable, "-W", "error", "-c", _from_python()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        check=True,
    )
    log = (tmp_path / "runs/python/candidates.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in log]
    assert len(found) == 100
    best = max(found, key=lambda each: sum(each["scores"].values()))
    exported = orbax.describe("merged", orbax.absolute(tmp_path / "runs/python/merged/orbax"))
    assert exported.architecture == tiny.model().architecture
    here = SingleDeviceSharding(jax.devices()[0])
    written = orbax.restore(
        exported,
        jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
            exported.abstract,
        ),
    )
    expected = linear(tiny.trees(3), np.array(best["weights"], np.float32))
    jax.tree.map(np.testing.assert_array_equal, written, expected)
