"""Search for the linear combination of checkpoints that beats all of them.

    python -m jaxmerge.run --config=configs/quickstart.py --workdir=runs/quickstart

Loads the pool of checkpoints that the config names, scores every checkpoint, searches over merge
weights, tests the winner and all baselines on examples that the search never saw, and writes it all
to --workdir: results.json, report.html, every candidate in candidates.jsonl, and the winner as a
checkpoint in merged/. The same command on the same directory goes on where it was stopped.

--mode=front looks for many merges, along the trade-offs between the tasks, as many as
config.front.points says; each is tested, and `jaxmerge export` writes any of them.
--mode=merge only merges, with the weights of config.merge.weights, and evaluates nothing.
--mode=evaluate scores checkpoints by themselves, one or many, alike or not, on the test examples of
the config's tasks, and writes evaluation.json. Without a config file: jaxmerge merge, jaxmerge
evaluate and jaxmerge search.

Any field of the config can be set on the command line: --config.search.budget=400. The fields, with
their units and defaults, are in jaxmerge/config.py.
"""

from __future__ import annotations

from jaxmerge import entry

if __name__ == "__main__":  # before the imports, which take seconds
    entry.begin()

from collections.abc import Sequence

from absl import flags

from jaxmerge.errors import JaxmergeError
from jaxmerge.experiment import command_line


def main(_: Sequence[str]) -> None:
    """Does what --mode says with the config."""
    given, command = flags.FLAGS, command_line.typed("python -m jaxmerge.run")
    if given.mode == "merge" and given.coordinator:
        raise JaxmergeError(
            "a merge runs in one process",
            where="--coordinator",
            expected="the same command without --coordinator, on one machine",
        )
    mode = {
        "search": command_line.search,
        "front": command_line.front,
        "merge": command_line.merge,
        "evaluate": command_line.evaluate,
    }[given.mode]
    mode(given.config, given.workdir, command)


def console() -> None:
    """The command line: `python -m jaxmerge.run`."""
    flags.DEFINE_enum("mode", "search", ["search", "front", "merge", "evaluate"], "What to do.")
    command_line.define_processes()
    command_line.start(main, __doc__ or "")


if __name__ == "__main__":
    console()
