"""What stands around every command: from its first moment on, whatever happens ends in one message.

A command begins with `begin()`, before its other imports, which take seconds. From then on

    exit code   what happened
    2           something that the user can mend: a `JaxmergeError`, or what the system refuses
    3           another process of the run is gone, see `hosts.watch`
    70          an error that nobody foresaw: its trace is in a file, whose path is said
    130, 143    stopped by Ctrl-C or by SIGTERM; what was done stays
    141         nobody reads what is printed any more, as in `... | head`
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from types import TracebackType

from jaxmerge.errors import JaxmergeError, told
from jaxmerge.hosts.signals import end_on_signals

# Whatever else it needs is imported when it is needed: until `begin` Python ends as it likes.

WRONG = 2  # exit code: the user can mend it
UNFORESEEN = 70  # EX_SOFTWARE of sysexits.h
_UNREAD = 141  # as of a process that SIGPIPE has ended

# Of the distributions that a trace may lead to.
_VERSIONS = ("jaxmerge", "jax", "jaxlib", "flax", "orbax-checkpoint", "transformers", "numpy")

_places: list[str] = []  # directories where a trace may be kept, the best first
_begun = False


def begin() -> None:
    """From now on this process ends in one message, whatever ends it."""
    global _begun
    if _begun:
        return
    _begun = True
    end_on_signals(last=lambda name: _leave(f"it was told to stop by {name}"))
    sys.excepthook = _end
    # Names of files need not be UTF-8; what can't be printed as it is, is escaped.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def keep_traces_in(directory: str | os.PathLike[str]) -> None:
    """The trace of an error that nobody foresaw goes here, if it is a directory then."""
    _places.insert(0, os.path.abspath(directory))


def _leave(why: str) -> None:
    """Tells the other processes of a run, if there are any."""
    watch = sys.modules.get("jaxmerge.hosts.watch")
    if watch:
        watch.leave(why)


def _end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Says what ended the process, and ends it: a hook of `sys`."""
    code, said = _verdict(error)
    _leave(said)
    if code == _UNREAD:
        os._exit(code)
    with contextlib.suppress(OSError, ValueError):  # a stream that nobody reads
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        shown = f"jaxmerge: {said}".encode(errors="backslashreplace").decode()
        print(shown, file=sys.stderr, flush=True)
    # At once: reads that Orbax gave up would complain of it while Python shuts down.
    os._exit(code)


def _verdict(error: BaseException) -> tuple[int, str]:
    """The exit code, and what is said."""
    if isinstance(error, JaxmergeError):
        return WRONG, str(error)
    if isinstance(error, BrokenPipeError) and _unread():
        return _UNREAD, "nobody reads what is printed"
    if isinstance(error, RuntimeError) and type(error).__name__ == "JaxRuntimeError":
        from jaxmerge.hosts import watch

        watch.outwait_loss()  # a collective fails first when another process is gone
    foreseen = told(error)
    if foreseen:
        return WRONG, str(foreseen)
    return UNFORESEEN, unforeseen(error)


def _unread() -> bool:
    """Whether the other end of what is printed into is closed."""
    printed = select.poll()
    printed.register(1, 0)
    return any(event & select.POLLERR for _, event in printed.poll(0))


def unforeseen(error: BaseException) -> str:
    """Keeps the trace of an error in a file; one line that says where, and what it is about."""
    import tempfile
    import time
    import traceback

    what = (traceback.format_exception_only(error)[-1].strip().splitlines() or [""])[0][:300]
    text = f"{_about()}\n\n{''.join(traceback.format_exception(error))}"
    name = f"error-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}.log"
    for place in (*_places, tempfile.gettempdir()):
        path = os.path.join(place, name)
        with contextlib.suppress(OSError), open(path, "w", errors="backslashreplace") as file:
            file.write(text)
            return (
                f"this should not have happened: {what}. What was done stays. Please report it, "
                f"with the trace in {path}"
            )
    return f"this should not have happened; please report it, with this trace:\n{text}"


def _about() -> str:
    """The command and the versions, for whoever reads a trace."""
    import platform
    import shlex
    from importlib import metadata

    lines = [shlex.join(sys.argv), f"Python {platform.python_version()}, {platform.platform()}"]
    for name in _VERSIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            lines.append(f"{name} {metadata.version(name)}")
    return "\n".join(lines)
