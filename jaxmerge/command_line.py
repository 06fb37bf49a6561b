"""What the command lines have in common: flags, mistakes told in one message, and being stopped."""

from __future__ import annotations

import ast
import contextlib
import functools
import logging as python_logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from jaxmerge import config as configs
from jaxmerge import watch
from jaxmerge.errors import JaxmergeError
from jaxmerge.signals import end_on_signals


def start(
    main: Callable[[Sequence[str]], None],
    about: str,
    required: Sequence[str] = ("config", "workdir"),
) -> None:
    """Runs `main` with the flags --config and --workdir, and those that were defined before.

    A `JaxmergeError` ends the process with its message and exit code 2; SIGINT and
    SIGTERM end it at once, with exit codes 130 and 143.

    Args:
        main: takes the arguments that are no flags.
        about: what --help shows, above the fields of a config.
        required: flags that must be given.
    """
    if {"-h", "--help", "-help", "--helpfull"} & set(sys.argv[1:]):
        print(f"{about.strip()}\n\n{configs.reference()}")
        return
    sys.path.insert(0, os.getcwd())  # for the import paths in configs
    config_flags.DEFINE_config_file("config", None, "Path of the config file.")
    flags.DEFINE_string("workdir", None, "The run directory; made if it is missing.")
    end_on_signals(last=lambda name: watch.leave(f"it was told to stop by {name}"))
    try:
        app.run(main, flags_parser=functools.partial(_parse, required))
    except JaxmergeError as error:
        watch.leave(str(error))
        print(f"jaxmerge: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        # At once: reads that Orbax gave up would complain of it while Python shuts down.
        os._exit(2)
    except jax.errors.JaxRuntimeError:
        watch.outwait_loss()  # a collective fails first when another process is gone
        raise


def _parse(required: Sequence[str], argv: Sequence[str]) -> list[str]:
    """Parses the flags, config file included; what is wrong in them is the user's to mend."""
    try:
        rest = flags.FLAGS(argv)
        for name in required:
            if not flags.FLAGS[name].present:
                raise JaxmergeError(f"--{name} is missing; --help says how to use it")
        flags.FLAGS.config.to_dict()  # a config file that can't be loaded says so when it is used
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        said = str(error.args[0] if error.args else error)
        with contextlib.suppress(SyntaxError, ValueError):
            said = str(ast.literal_eval(said))  # a KeyError has its message in quotation marks
        raise JaxmergeError(said, where="command line or config file") from error
    if len(rest) > 1:
        raise JaxmergeError("these arguments are no flags", found=" ".join(rest[1:]))
    if not flags.FLAGS["verbosity"].present:
        _quiet()
    return rest


def _quiet() -> None:
    """Orbax tells of each file it opens, and of each read that it gives up on a damaged one;
    transformers of PyTorch, which nothing here needs.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logging.set_verbosity(logging.WARNING)
    python_logging.getLogger("asyncio").disabled = True
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited")
    sys.unraisablehook = lambda unraisable: logging.debug("%s", unraisable.exc_value)
