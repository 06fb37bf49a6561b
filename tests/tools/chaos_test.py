"""The tool that kills runs and lets their calls fail, for a moment: a long run of it is by hand."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "chaos.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("kills", "--job=merge", "--count=3"),
        ("faults", "--job=merge", "--kind=ENOSPC", "--every=60"),
    ],
    ids=lambda flags: flags[0],
)
def test_disturbed_merges_end_as_others(flags):
    """Killed, or on a disk that is full or takes a part: the next start makes the same merge."""
    if flags[0] == "faults" and not shutil.which("cc"):
        pytest.skip("faults.c is compiled here: a C compiler, which CI's machine has")
    command = [sys.executable, str(TOOL), *flags]
    done = subprocess.run(command, cwd=TOOL.parents[1], capture_output=True, text=True)
    tried = re.search(r"(\d+) tried, 0 wrong", done.stdout)
    assert tried, done.stdout[-3000:] + done.stderr[-3000:]
    assert int(tried[1]) >= 3
    assert done.returncode == 0
