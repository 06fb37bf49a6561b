"""Runs over a grid of config values, in one process that loads the pool and compiles once.

    python -m jaxmerge.sweep --config=configs/quickstart.py --workdir=runs/sweep \\
        --sweep=search.strategy=CMA_ES,SNES --sweep=seed=0,1,2

Each cell of the grid is a run of its own, with a run directory of its own in --workdir, such as
runs/sweep/search.strategy=SNES,seed=1: what `python -m jaxmerge.run` would have left there, and
what it can go on with. Cells whose configs agree share the pool in memory, the tasks and the
compiled programs; and what was scored for one is not scored again for another (its `seconds` in
candidates.jsonl are then those of looking it up). Nothing else differs from separate runs.

The same command goes on where it was stopped. A cell that fails is told of, and the others go on;
the exit code is then 2. --shard=i/n, with i from 1 to n, makes the i-th part of the cells only, for
as many machines. At the end there is a table of the cells, and comparison.html in --workdir; cells
of several shards are compared by `python -m jaxmerge.report DIR DIR ...`.

Values are read like those of flags: --sweep=search.sigma=0.3,0.6 as two numbers; several tuples are
written --sweep="objective.tasks=('a','b'),('c',)". --config.FIELD=VALUE sets a field of all cells.
"""

from __future__ import annotations

from jaxmerge import entry

if __name__ == "__main__":  # before the imports, which take seconds
    entry.begin()

import shlex
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from jaxmerge import report
from jaxmerge.errors import JaxmergeError
from jaxmerge.experiment import command_line
from jaxmerge.sweep import grid
from jaxmerge.sweep.runs import COMMAND, sweep, table


def main(_: Sequence[str]) -> None:
    """Runs what the flags say; prints the table, and fails when a cell did."""
    given, workdir = flags.FLAGS["config"], flags.FLAGS.workdir
    overrides = config_flags.get_override_values(given)
    entry.keep_traces_in(workdir)
    start = [f"--config={config_flags.get_config_filename(given)}"]
    swept = [axis.partition("=")[0] for axis in flags.FLAGS.sweep]
    start += [
        f"--config.{field}={grid.as_text(value)}"
        for field, value in overrides.items()
        if field not in swept
    ]
    outcome = sweep(
        flags.FLAGS.config,
        flags.FLAGS.sweep,
        workdir,
        shard=flags.FLAGS.shard,
        command=f"{COMMAND} {shlex.join(start)}",
    )
    if outcome.finished:
        print(table(outcome.finished))
    if len(outcome.finished) > 1:
        directories = [Path(workdir) / name for name in outcome.finished]
        print(f"\nReport: {report.compare(directories, Path(workdir) / 'comparison.html')}")
    if outcome.failed:
        raise JaxmergeError(
            f"{len(outcome.failed)} of {len(outcome.finished) + len(outcome.failed)} cells failed",
            where=workdir,
            expected="the same command again, which tries only those",
            found="\n".join(f"{name}: {message}" for name, message in outcome.failed.items()),
        )


def console() -> None:
    """The command line: `jaxmerge sweep`, or `python -m jaxmerge.sweep`."""
    flags.DEFINE_multi_string("sweep", [], "FIELD=VALUE,VALUE,...; may be given several times.")
    flags.DEFINE_string("shard", "1/1", "i/n: the i-th of n parts of the cells.")
    command_line.start(main, __doc__ or "")


if __name__ == "__main__":
    console()
