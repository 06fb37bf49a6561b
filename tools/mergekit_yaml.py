"""What mergekit makes of the YAML files in tests/mergekit_yaml, kept for the suite to compare with.

    python -m venv /tmp/mergekit && /tmp/mergekit/bin/pip install torch==2.13.0 mergekit==0.1.5
    python tools/mergekit_yaml.py --environment=/tmp/mergekit

mergekit runs in an environment of its own, on models that `tests/mergekit_models.py` makes from a
seed. Beside each YAML stands what it made of it: the tensors in NAME.npz, bfloat16 as its bits; the
config, and how the tokenizer reads a few texts, in NAME.json.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests import mergekit_models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environment", type=Path, required=True, help="where mergekit is")
    parser.add_argument("--only", default="", help="names, separated by commas; all without it")
    given = parser.parse_args()
    wanted = given.only.split(",") if given.only else []
    with tempfile.TemporaryDirectory() as directory:
        mergekit_models.make(Path(directory))
        for case in mergekit_models.cases():
            if not wanted or case.stem in wanted:
                made = _mergekit(given.environment.absolute(), Path(directory), case)
                _keep(made, case)
                print(case.stem, case.with_suffix(".npz").stat().st_size, "bytes")


def _mergekit(environment: Path, directory: Path, case: Path) -> Path:
    """Runs mergekit in the directory of the models; where its merge is."""
    out = directory / "out" / case.stem
    several = "\n---" in case.read_text()
    command = [str(environment / "bin" / ("mergekit-multi" if several else "mergekit-yaml"))]
    if several:
        command += [str(case), "--out-path", str(out), "-I", str(directory / "between")]
    else:
        command += [str(case), str(out), "--lora-merge-cache", str(directory / "adapters")]
    subprocess.run(
        [*command, "--quiet"],
        cwd=directory,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        check=True,
    )
    return out


def _keep(made: Path, case: Path) -> None:
    tensors = mergekit_models.load(made)
    np.savez_compressed(
        case.with_suffix(".npz"),
        allow_pickle=False,
        **{
            name: values.view(np.uint16) if values.dtype.name == "bfloat16" else values
            for name, values in tensors.items()
        },
    )
    tokenizer = Tokenizer.from_file(str(made / "tokenizer.json"))
    tokens: dict[str, Any] = {
        "ids": tokenizer.get_vocab(with_added_tokens=True),
        "samples": [tokenizer.encode(text).tokens for text in mergekit_models.SAMPLES],
    }
    config = json.loads((made / "config.json").read_text())
    kept = {"config": config, "tokenizer": tokens}
    case.with_suffix(".json").write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    shutil.rmtree(made)


if __name__ == "__main__":
    main()
