"""The job that writes what a finished search found, once more or another part of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from jaxmerge.checkpoints.export import FORMATS
from jaxmerge.durable import read_json
from jaxmerge.errors import JaxmergeError, as_written
from jaxmerge.experiment import command_line
from jaxmerge.experiment.jobs import set_fields, set_format, unindented
from jaxmerge.rundir import flat

_OF_METHOD = ("merge.method", "merge.variant")  # its numbers stand in results.json


def export() -> None:
    """Write what a search found once more: another point of its front, or another format.

        jaxmerge export runs/front --point=3 --out=merged
        jaxmerge export runs/mine --format=huggingface --out=merged

    --out=DIR        the merged checkpoint: a new directory
    --point=N        the point of the front; without it, the winner
    --format=NAME    as `jaxmerge merge` has it

    The checkpoints are read from where the run found them, and must be the same still. If they have
    moved, --config.pool.checkpoints="('a', 'b')" says where they are, in the order of pool.json.
    Other paths of the run's config that are relative, such as pool.base, are so to this directory.
    """
    flags.DEFINE_integer("point", 0, "Of the front; 0: the winner.", lower_bound=0)
    flags.DEFINE_enum("format", None, FORMATS, "The format of the merge.")
    flags.DEFINE_string("out", None, "Where the merge goes.")
    command_line.start(_export, unindented(export.__doc__ or ""), required=("out",), members=True)


def _export(arguments: Sequence[str]) -> None:
    config, out = flags.FLAGS.config, flags.FLAGS.out
    if len(arguments) != 2:
        raise JaxmergeError(
            "needs the directory of one run",
            expected="jaxmerge export RUN --out=DIR",
            found=" ".join(arguments[1:]) or "none",
        )
    run = Path(arguments[1]).expanduser()
    finished = run / "results.json"
    if not finished.exists():
        raise JaxmergeError(
            "this is no directory of a finished search",
            where=str(finished),
            expected="the directory that a search wrote its results.json to",
        )
    set_fields(config, _of_run(run))
    config.merge.weights_file, config.merge.point = str(finished), flags.FLAGS.point
    set_format(config, out)
    place = Path(out).expanduser().absolute()
    workdir = place.with_name(f".{place.name}.jaxmerge")
    command_line.merge(config, str(workdir), command_line.typed("jaxmerge export"), out)


def _of_run(run: Path) -> dict[str, Any]:
    """The fields of a run's config that say what it merged; checkpoints are where it found them."""
    with as_written(str(run), "this is no directory of a search"):
        fields = flat(read_json(run / "config.json"))
        pool = read_json(run / "pool.json")
        own = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in fields.items()
            if name.partition(".")[0] in ("seed", "pool", "space", "export") or name in _OF_METHOD
        }
        return own | {
            "pool.checkpoints": tuple(one["source"] for one in pool["checkpoints"]),
            "pool.steps": "",
        }
