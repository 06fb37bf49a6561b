"""Ending at once on SIGINT (Ctrl-C) and SIGTERM (preemption), whatever the program is doing.

Everything that a run knows is on disk as soon as it is known, so a process can end at any instant.
Python's own handlers wait for the main thread, which may be inside a compiled program for minutes,
and a KeyboardInterrupt inside a callback of JAX would be lost.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable

_PATIENCE = 1.0  # seconds that a full pipe has to take the last line


def end_on_signals(last: Callable[[str], None] = lambda why: None) -> None:
    """From now on SIGINT and SIGTERM end this process, with exit code 128 + their number.

    Args:
        last: called before with the signal's name; must not wait.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    # The C handler of Python writes the number of a signal here, whatever the main thread does.
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)

    def wait() -> None:
        number = signal.Signals(os.read(read, 1)[0])
        last(number.name)
        # Not through sys.stderr, which the main thread may hold; and whoever reads it may be gone.
        with contextlib.suppress(OSError):
            if select.select([], [2], [], _PATIENCE)[1]:
                os.write(2, b"\njaxmerge: stopped; the same command goes on from here\n")
        os._exit(128 + number)

    threading.Thread(target=wait, daemon=True).start()
