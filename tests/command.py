"""jaxmerge as users start it: in a process of its own, with a config file, on a tiny pool."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

CONFIG_FILE = """
from jaxmerge import config as configs
from tests import tiny

def get_config():
    config = tiny.run_config(configs.default(), {pool!r})
    config.mesh.pop = config.mesh.cpu_devices = 2
    config.compilation_cache = {cache!r}
    {change}
    return config
"""


class Command:
    """A command line on the tiny pool; all of them share what is compiled."""

    module = "jaxmerge.run"

    def __init__(self, directory: Path, pool: Path, change: str = ""):
        self.workdir = directory / "run"
        self.config = directory / "config.py"
        cache = os.environ["JAXMERGE_TESTS_CACHE"]
        self.config.write_text(CONFIG_FILE.format(pool=str(pool), cache=cache, change=change))

    def start(self, *flags: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", self.module),
                *(f"--config={self.config}", f"--workdir={self.workdir}", *flags),
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    def run(self, *flags: str) -> tuple[int, str, str]:
        process = self.start(*flags)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err
