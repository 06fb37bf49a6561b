"""Merges by name of what trainers wrote, loaded by those trainers again: are they what they say?

    python tools/check_by_name.py kauldron DIR [--python=VENV/bin/python]
    python tools/check_by_name.py easydel DIR

For trainers whose layouts jaxmerge does not know. Two random tiny models are saved by the trainer,
merged with `jaxmerge merge`, and the merges loaded by the trainer's own loader. Their parameters
must be those of the float32 weighted sum bit for bit, of weights 1 and 0 the first model's; their
outputs those of a model that has these parameters without a checkpoint. Then the trainer goes on
from the merge. Ends with 1 where something is not so.

The trainer runs in an environment of its own, `DIR/env-TRAINER`, which the first run makes with the
Python that runs this, or what `--make-with` names, unless `--python` is that of one.
"""

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tools.trainer_environments import environment

HERE = Path(__file__).resolve().parent
TRAINERS = ("kauldron", "easydel")
WEIGHTS = ("1,0", "0.25,0.75")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trainer", choices=TRAINERS)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--python", help="of an environment that is there")
    parser.add_argument("--make-with", default=sys.executable)
    said = parser.parse_args()
    directory = said.directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    python = said.python or environment(said.trainer, directory, said.make_with)
    at = directory / said.trainer
    at.mkdir()

    def in_trainer(what: str, *more: str) -> int:
        script = HERE / "in_trainer_by_name.py"
        return subprocess.run([python, script, what, said.trainer, at, *more]).returncode

    if in_trainer("save"):
        return 1
    for weights in WEIGHTS:
        members, out = (str(at / "0"), str(at / "1")), f"--out={at / weights}"
        command = [sys.executable, "-m", "jaxmerge", "merge", *members, f"--weights={weights}", out]
        subprocess.run(command, check=True, cwd=HERE.parent)
    return in_trainer("read", *WEIGHTS)


if __name__ == "__main__":
    sys.exit(main())
