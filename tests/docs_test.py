"""The site: the guides, and the pages of the public names and of the fields of a config."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import jaxmerge
from jaxmerge import config
from jaxmerge.rundir import flat
from jaxmerge.tasks import BUILDERS

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_builds_without_warnings_and_has_every_name(tmp_path):
    built = tmp_path / "docs"
    subprocess.run(["bash", ROOT / "tools" / "docs.sh", built], check=True)
    page = (built / "api.html").read_text()
    for name in dir(jaxmerge):
        assert f'id="jaxmerge.{name}"' in page
    for build in BUILDERS.values():
        assert f'id="jaxmerge.tasks.{build.__name__}"' in page
    fields = re.sub("<[^>]*>", "", (built / "fields.html").read_text())
    for field in flat(config.plain(config.default())):
        assert f"config.{field} = " in fields


@pytest.mark.slow
def test_a_docstring_that_is_garbled_fails(tmp_path):
    (tmp_path / "garbled.py").write_text('"""Of a list:\n\n    * one\n  two `three\n"""\n')
    (tmp_path / "conf.py").write_text((ROOT / "docs" / "conf.py").read_text())
    (tmp_path / "index.rst").write_text("Garbled\n=======\n\n.. automodule:: garbled\n")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", ".", "out"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode
    assert "WARNING" in done.stderr
