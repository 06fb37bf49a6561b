"""What the command lines have in common: flags, mistakes told in one message, and being stopped."""

from __future__ import annotations

import ast
import contextlib
import functools
import logging as python_logging
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from jaxmerge import config as configs
from jaxmerge import entry
from jaxmerge.config import Config
from jaxmerge.errors import JaxmergeError
from jaxmerge.hosts import processes, watch

# What absl and ml_collections raise for what was typed, or set in a config file.
_OF_FLAGS = (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError)

_PATHS = [dashes + name for dashes in ("-", "--") for name in ("config", "workdir", "out")]

FIELDS = "--help=fields lists the fields of a config, with their units and defaults."


def start(
    main: Callable[[Sequence[str]], None],
    about: str,
    required: Sequence[str] = ("config", "workdir"),
    *,
    members: bool = False,
) -> None:
    """Runs `main` with the flags --config and --workdir, and those that were defined before.

    However it ends, it ends with one message; see `jaxmerge.entry`.

    Args:
        main: takes the arguments that are no flags, after the name of the program.
        about: what --help shows; of a module of its own, above the fields of a config.
        required: flags that must be given.
        members: whether there may be arguments that are no flags, and need not be a config file.
    """
    asked = {"-h", "--help", "-help", "--helpfull", "--help=fields"} & set(sys.argv[1:])
    if asked:
        screen = sys.argv[0].startswith("jaxmerge ")  # a command of `jaxmerge`: one screen
        parts = [about.strip(), FIELDS] if screen else [about.strip(), configs.reference()]
        print(configs.reference() if "--help=fields" in asked else "\n\n".join(parts))
        return
    sys.path.insert(0, os.getcwd())  # for the import paths in configs
    if not members:
        flags.DEFINE_string("workdir", None, "The run directory; made if it is missing.")
    entry.begin()
    app.run(main, flags_parser=functools.partial(_parse, required, members))


def define_processes() -> None:
    """Defines the flags of a command that several processes can run."""
    flags.DEFINE_string("coordinator", "", "Several processes: host:port of the first, or auto.")
    flags.DEFINE_integer("processes", None, "How many they are; not with --coordinator=auto.")
    flags.DEFINE_integer("process", None, "Which of them this is, from 0; likewise.")


def typed(program: str) -> str:
    """The command as it was typed, for reports and model cards."""
    return f"{program} {shlex.join(sys.argv[1:])}"


def search(config: Config, workdir: str, command: str) -> None:
    """A search, of this process or of several, and the table of what it found."""
    _connect(workdir)
    from jaxmerge.experiment import results  # late, as all modes: each imports much of its own
    from jaxmerge.experiment import search as mode

    table = results.table(mode.search(config, workdir, command))
    _finish(f"{table}\n\nReport: {Path(workdir) / 'report.html'}")


def front(config: Config, workdir: str, command: str) -> None:
    """A search for a front: one whose config has points of a front, 8 unless it says how many."""
    config.front.points = config.front.points or 8
    search(config, workdir, command)


def evaluate(config: Config, workdir: str, command: str) -> None:
    """Checkpoints scored by themselves, and the table of their scores."""
    _connect(workdir)
    from jaxmerge.experiment import evaluate as mode

    _finish(mode.table(mode.evaluate(config, workdir, command)))


def merge(config: Config, workdir: str, command: str, out: str = "") -> None:
    """A merge with given weights, and where it was written; see `experiment.merge`."""
    from jaxmerge.experiment import merge as mode  # does without Flax, half a second

    entry.keep_traces_in(workdir)
    mode.set_up_host(config)
    written = mode.merge(config, workdir, command, out)
    for path in written:
        print(f"Merged: {path}", flush=True)
    if config.export.speech_bytes:
        from jaxmerge.experiment import speech

        speech.of_merge(config, Path(workdir), written)


def merge_yaml(config: Config, path: str, workdir: str, command: str, out: str) -> None:
    """The merge that mergekit's YAML describes, and where it was written."""
    from jaxmerge.experiment import mergekit as mode
    from jaxmerge.experiment.sources import host_alone

    entry.keep_traces_in(workdir)
    host_alone()
    for warning in mode.merge(config, path, workdir, command, out):
        print(f"jaxmerge: {warning}", file=sys.stderr)
    print(f"Merged: {out}")


def _connect(workdir: str) -> None:
    entry.keep_traces_in(workdir)
    given = flags.FLAGS
    processes.connect(given.coordinator, given.processes, given.process)


def _finish(said: str) -> None:
    watch.leave()
    if processes.first():
        print(said)


def _parse(required: Sequence[str], members: bool, argv: Sequence[str]) -> list[str]:
    """Parses the flags, config file included; what is wrong in them is the user's to mend."""
    argv = _at_home(argv)
    try:
        if members and not any(each.split("=")[0] == "--config" for each in argv[1:]):
            config_flags.DEFINE_config_dict("config", configs.default(), "The config.")
        else:
            config_flags.DEFINE_config_file("config", None, "Path of the config file.")
        rest = flags.FLAGS(argv)
        for name in required:
            if not flags.FLAGS[name].present:
                raise JaxmergeError(
                    f"--{name} is missing", expected=f"--{name}=...; --help says more"
                )
        flags.FLAGS.config.to_dict()  # a config file that can't be loaded says so when it is used
    except JaxmergeError:
        raise
    except Exception as error:  # a config file is a program of the user's: it can raise anything
        raise _of_config(error, argv) from error
    if len(rest) > 1 and not members:
        raise JaxmergeError(
            "these arguments are no flags",
            expected="--NAME=VALUE; checkpoints are --config.pool.checkpoints=\"('a', 'b')\"",
            found=" ".join(rest[1:]),
        )
    if not flags.FLAGS["verbosity"].present:
        _quiet()
    return rest


def _of_config(error: Exception, argv: Sequence[str]) -> JaxmergeError:
    """What is wrong in the flags or the config file; raises an error again that is of neither."""
    said = str(error.args[0] if error.args else error)
    file = next((each.partition("=")[2] for each in argv if each.startswith("--config=")), "")
    line, raised = _raised_in(file.partition(":")[0], error)
    # ml_collections has the whole trace in the message of some, and has no name for others.
    nameless = not isinstance(error, _OF_FLAGS) or "Error whilst parsing config" in said
    if line and nameless:
        return JaxmergeError(
            f"the config file fails with {type(raised).__name__}: {raised}",
            where=f"{file}, line {line}",
            expected="a file of Python whose get_config() returns a config",
        )
    if not isinstance(error, _OF_FLAGS):
        raise error
    with contextlib.suppress(SyntaxError, ValueError):
        said = str(ast.literal_eval(said))  # a KeyError has its message in quotation marks
    if isinstance(error, KeyError) and " " not in said:  # the name alone
        return JaxmergeError(
            "there is no such field to set",
            where="command line or config file",
            expected=f"a field that the config file sets; {FIELDS}",
            found=said,
        )
    return JaxmergeError(said, where="command line or config file", expected=FIELDS)


def _raised_in(file: str, error: BaseException) -> tuple[int, BaseException]:
    """The line of a file that an error, or what led to it, comes from; 0: it is not of there."""
    if not file:
        return 0, error
    path = os.path.realpath(file)
    if isinstance(error, SyntaxError) and os.path.realpath(error.filename or "") == path:
        return error.lineno or 0, error
    frames = traceback.extract_tb(error.__traceback__)
    lines = [each.lineno or 0 for each in frames if os.path.realpath(each.filename) == path]
    led = error.__cause__ or error.__context__
    if lines or led is None:
        return (lines or [0])[-1], error
    return _raised_in(file, led)


def _at_home(argv: Sequence[str]) -> list[str]:
    """Paths such as `--workdir ~/run` as --workdir=/home/me/run: no shell replaces the ~ of all."""
    made: list[str] = []
    for argument in argv:
        if made and made[-1] in _PATHS:  # the value stands by itself
            argument = f"{made.pop()}={argument}"
        flag, equals, path = argument.partition("=")
        named = equals and flag in _PATHS
        made.append(f"--{flag.lstrip('-')}={os.path.expanduser(path)}" if named else argument)
    return made


def _is_no_repetition(record: python_logging.LogRecord) -> bool:
    """Orbax tells, with a trace, of an error that it raises then."""
    return "run() raised an exception" not in str(record.msg)


def _quiet() -> None:
    """Orbax tells of each file it opens, and of each read that it gives up on a damaged one;
    transformers of PyTorch, which nothing here needs.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logging.set_verbosity(logging.WARNING)
    logging.get_absl_handler().addFilter(_is_no_repetition)
    python_logging.getLogger("asyncio").disabled = True
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited")
    sys.unraisablehook = lambda unraisable: logging.debug("%s", unraisable.exc_value)
