"""A Python process in bubblewrap: what it sees of the machine, and how all of it is ended.

It sees the interpreter, the standard library and the system's shared libraries, read-only, but no
installed packages, and a small /tmp of its own. It has no network, no /proc, no environment, no
capabilities, and namespaces of its own for everything.

As root there are two bubblewraps, one in the other. The kernel does not bound the processes of uid
0, not even in a namespace; and another uid may be unable to reach the interpreter (in /root, say).
So an outer one, still root, binds the same directories where anyone can reach them, `setpriv`
changes to a uid that owns nothing, and the inner one is what everybody else's is.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from jaxmerge.errors import JaxmergeError
from jaxmerge.sandbox import seccomp

_NOBODY = "65534"
_SYSTEM = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache")
_ALL_NAMESPACES = ("--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL")
_SIZES_TMPFS = (0, 7)  # the version since which a tmpfs can be bounded; before, /tmp is read-only


@contextlib.contextmanager
def container(
    source: str,
    *,
    stdin: int,
    stdout: int,
    stderr: int = subprocess.DEVNULL,
    descriptors: Sequence[int] = (),
    tmp_bytes: int,
) -> Iterator[None]:
    """Runs Python in a sandbox; after the block no process of it is left.

    Args:
        source: the text of the program.
        stdin: what it reads; `stdout` and `stderr` alike.
        descriptors: further ones that it inherits, under their numbers.
        tmp_bytes: the size of its /tmp.

    Raises:
        JaxmergeError: bubblewrap is missing, or the machine is of a kind that is not known.
    """
    told, tell = os.pipe()
    with open(told, "rb") as info:
        with open(tell, "wb") as into, in_memory(seccomp.filter_program()) as calls:
            process = subprocess.Popen(
                [*_command(tmp_bytes, calls.fileno(), into.fileno()), source],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                pass_fds=(into.fileno(), calls.fileno(), *descriptors),
                env={},
            )
        first = None
        try:
            first = _first_process(info.read())
            yield
        finally:
            _end(process, first)


def _first_process(info: bytes) -> int | None:
    """A descriptor of the sandbox's process 1; None when bubblewrap did not come so far.

    Args:
        info: what bubblewrap says about the sandbox, as JSON.
    """
    if not info:
        return None
    try:
        return os.pidfd_open(json.loads(info)["child-pid"])
    except ProcessLookupError:
        return None


def _end(process: subprocess.Popen[bytes], first: int | None) -> None:
    """Kills process 1 of the sandbox, which ends after all others in its namespace."""
    if first is not None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(first, signal.SIGKILL)
        ended = select.poll()
        ended.register(first, select.POLLIN)
        ended.poll()
        os.close(first)
    else:
        process.kill()
    process.wait()


def in_memory(content: bytes) -> BinaryIO:
    """A new file in memory, to be read from its start."""
    file = open(os.memfd_create("jaxmerge"), "w+b", buffering=0)
    file.write(content)
    file.seek(0)
    return file


def _command(tmp_bytes: int, calls: int, info: int) -> list[str]:
    """The command line; the text that Python runs comes after it.

    Args:
        tmp_bytes: the size of /tmp.
        calls: descriptor of the filter of system calls.
        info: descriptor where bubblewrap says which process is the first of the sandbox.
    """
    bwrap = _tool("bwrap", "bubblewrap")
    binds, python = _view()
    sized = ("--size", str(tmp_bytes), "--tmpfs", "/tmp")
    inner = [bwrap, *_ALL_NAMESPACES, "--clearenv", *binds, "--dev", "/dev"]
    inner += sized if _version(bwrap) >= _SIZES_TMPFS else ("--dir", "/tmp")
    inner += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp"]
    inner += ["--setenv", "PYTHONHOME", f"{sys.base_prefix}:{sys.base_exec_prefix}"]
    inner += ["--setenv", "PYTHONHASHSEED", "0", "--seccomp", str(calls)]
    if os.geteuid() == 0:
        inner = [*_as_nobody(bwrap, binds, info), *inner]
    else:
        inner += ["--info-fd", str(info)]
    return [*inner, python, "-P", "-s", "-S", "-B", "-X", "utf8", "-c"]


def _as_nobody(bwrap: str, binds: Sequence[str], info: int) -> list[str]:
    """The outer sandbox and the change of uid, for root."""
    setpriv = _tool("setpriv", "util-linux")
    outer = [bwrap, "--unshare-pid", "--die-with-parent", "--clearenv", "--cap-drop", "ALL"]
    outer += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--info-fd", str(info)]
    outer += [*binds, *_directories((bwrap, setpriv, "/tmp/any")), "--dev", "/dev"]
    outer += ["--bind", "/proc", "/proc"]
    for tool in (bwrap, setpriv):
        outer += ["--ro-bind", tool, tool]
    change = [f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups"]
    return [*outer, setpriv, *change, "--inh-caps=-all", "--bounding-set=-all", "--"]


@functools.cache
def _view() -> tuple[tuple[str, ...], str]:
    """What is bound, as arguments of bubblewrap, and the path of the interpreter in it."""
    python = os.path.realpath(sys.executable)
    prefixes = (sys.base_prefix, sys.base_exec_prefix)
    libraries = [f"{prefix}/{name}" for prefix in prefixes for name in ("lib", "lib64")]
    paths = [path for path in dict.fromkeys((*libraries, *_SYSTEM, python)) if os.path.exists(path)]
    binds = _directories(paths)
    for path in paths:
        if os.path.islink(path):
            binds += ["--symlink", os.readlink(path), path]
        else:
            binds += ["--ro-bind", path, path]
    for library in (path for path in paths if not os.path.islink(path)):
        for packages in sorted(Path(library).glob("python*/*-packages")):  # may hold answers
            binds += ["--tmpfs", str(packages), "--remount-ro", str(packages)]
    return tuple(binds), python


def _directories(paths: Sequence[str]) -> list[str]:
    """Makes the directories above these paths, for everybody to pass through."""
    above = {str(parent) for path in paths for parent in Path(path).parents[:-1]}
    return [word for path in sorted(above) for word in ("--perms", "0755", "--dir", path)]


def _tool(name: str, package: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise JaxmergeError(
            "code that a model wrote runs only inside bubblewrap, and a program is missing:"
            f" apt-get install {package}",
            expected=name,
            found="not on the path",
        )
    return os.path.realpath(path)


@functools.cache
def _version(bwrap: str) -> tuple[int, ...]:
    said = subprocess.run([bwrap, "--version"], capture_output=True, text=True, check=True).stdout
    return tuple(int(part) for part in re.findall(r"\d+", said))
