"""Merge checkpoints, score them, and search for the merge that beats all of them.

    jaxmerge merge models/a models/b --weights=0.3,0.7 --out=merged
    jaxmerge evaluate models/a models/b --task=jsonl:questions.jsonl --out=runs/scores
    jaxmerge search models/* --task=jsonl:questions.jsonl --out=runs/mine

    jaxmerge front models/* --task=jsonl:code.jsonl --task=jsonl:chat.jsonl --out=runs/front
    jaxmerge export runs/front --point=3 --out=merged

    jaxmerge plan --config=FILE                   what a run needs before it starts
    jaxmerge sweep --config=FILE --workdir=DIR --sweep=FIELD=VALUE,VALUE     a run for each value
    jaxmerge report DIR [DIR ...]                 the page of a run, or one that compares several

Checkpoints are Hugging Face directories, PEFT adapters, Orbax, zarr or .npz. The same command goes
on where it was stopped. `jaxmerge COMMAND --help` says more of a command, and --help=fields lists
every field of a config: --config.FIELD=VALUE sets one, with or without a config file. Runs with a
config file: python -m jaxmerge.run --config=FILE --workdir=DIR.
"""

from __future__ import annotations

import gc
import importlib
import sys

from jaxmerge import entry

COMMANDS = {  # each a function without arguments, which is documented for --help
    "merge": "jaxmerge.experiment.jobs:merge",
    "evaluate": "jaxmerge.experiment.jobs:evaluate",
    "search": "jaxmerge.experiment.jobs:search",
    "front": "jaxmerge.experiment.jobs:front",
    "export": "jaxmerge.experiment.export_run:export",
    "plan": "jaxmerge.plan:console",
    "sweep": "jaxmerge.sweep.__main__:console",
    "report": "jaxmerge.report.__main__:console",
}


def main() -> int | None:
    """Runs the command that the arguments name."""
    entry.begin()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help", "help"):
        print((__doc__ or "").strip())
        return 0
    if name.startswith("-"):  # as python -m jaxmerge.run
        return importlib.import_module("jaxmerge.run").console()
    if name not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, 1) or ["--help"]
        print(f"jaxmerge: no such command: {name}; try jaxmerge {near[0]}", file=sys.stderr)
        return 2
    module, _, function = COMMANDS[name].partition(":")
    sys.argv[:2] = [f"jaxmerge {name}"]
    gc.disable()  # what is imported stays; to look for garbage in it again and again takes time
    command = getattr(importlib.import_module(module), function)
    gc.freeze()
    gc.enable()
    return command()


if __name__ == "__main__":
    sys.exit(main())
