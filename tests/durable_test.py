"""Directories that are whole or not there."""

import os
import subprocess
import sys

from jaxmerge.durable import appear, making


def test_what_killed_processes_left_is_removed(tmp_path):
    target = tmp_path / "merged"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left, running, other = (
        tmp_path / name
        for name in (
            f".merged.{gone.pid}.tmp",
            f".merged.{os.getppid()}.tmp",
            f".merged2.{gone.pid}.tmp",
        )
    )
    for directory in (left, running, other):
        directory.mkdir()
    with making(target, "the merge") as new:
        (new / "file").write_text("whole")
        appear(new, target)
    assert (target / "file").read_text() == "whole"
    assert not left.exists()
    assert running.exists()
    assert other.exists()
