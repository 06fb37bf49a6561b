"""Processes that watch each other, so that none waits for ever for one that is gone.

A collective waits for its peers, and a killed process answers nobody: without this, the others
would hang until JAX gives up and aborts them. Every process holds a connection to process 0. When
one breaks or falls silent, all the others end, and each says which process is missing and why.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

from jaxmerge.errors import JaxmergeError

BEAT = 5.0  # seconds between two signs of life
SILENCE = 45.0  # seconds without one after which a process counts as gone
LOST = 3  # exit code of a process that ends because another is gone

_GRACE = 2.0  # seconds to end by itself when another process has said why it ends
_ABORT = 15.0  # seconds that an abort waits for the watch, which a busy thread may hold up
_HANDSHAKE = 5.0  # seconds for a connection to say whose it is
_PATIENCE = 60.0  # seconds to reach process 0

_watch: Watch | None = None  # of this process


def begin(index: int, count: int, from_first: Callable[[Callable[[], bytes]], bytes]) -> None:
    """Has this process watch the others, and be watched, until it calls `leave`; see `Watch`."""
    global _watch
    _watch = _watch or Watch(index, count, from_first)
    ctypes.CDLL(None).signal(signal.SIGABRT, _speak_first)


# JAX's client aborts the process some 15 ms after process 0 is gone, from a thread of its own, and
# Python's handlers run in the main thread, which may be at work. So C's handler has it wait.
@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _speak_first(_: int) -> None:
    """Gives the watch time to say who is gone and to end the process; else the abort goes on."""
    time.sleep(_ABORT)


def leave(why: str = "") -> None:
    """Tells the others that this process ends: in order, or because of what `why` says."""
    if _watch:
        _watch.leave(why)


def outwait_loss() -> None:
    """Returns when no process can be gone that has not been missed; else this one has ended."""
    if _watch:
        time.sleep(SILENCE + BEAT)


class Watch:
    """This process's part in the watch, from when it is made until `leave`.

    Args:
        index: of this process.
        count: of all.
        from_first: gives all processes what process 0 says; see `jaxmerge.hosts.processes`.

    Raises:
        JaxmergeError: process 0 can't be reached.
    """

    def __init__(self, index: int, count: int, from_first: Callable[[Callable[[], bytes]], bytes]):
        self._index, self._count = index, count
        self._connections: dict[int, socket.socket] = {}
        self._lock = threading.Lock()  # of the connections, and of who reports a loss
        self._left: set[int] = set()
        self._leaving = False
        listener = socket.create_server(("", 0), backlog=count) if index == 0 else None

        def address() -> bytes:
            assert listener
            port = listener.getsockname()[1]
            return f"{_own_address()} {port} {secrets.token_hex(16)}".encode()

        where, port, self._token = from_first(address).decode().split()
        if listener:
            self._accept(listener)
        else:
            self._reach(where, int(port))
        for peer, connection in self._connections.items():
            threading.Thread(target=self._read, args=(peer, connection), daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    def leave(self, why: str = "") -> None:
        """Tells the others that this process ends: in order, or because of what `why` says."""
        self._leaving = True
        line = " ".join(why.split())
        self._send(f"failed {line}" if why else "ended")

    def _accept(self, listener: socket.socket) -> None:
        deadline = time.monotonic() + _PATIENCE
        while len(self._connections) < self._count - 1:
            listener.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                missing = sorted({*range(1, self._count)} - {*self._connections})
                raise JaxmergeError(
                    f"did not come within {_PATIENCE:g} seconds",
                    where=f"processes {missing}",
                    expected="all processes of the run, started together with the same --processes",
                ) from None
            connection.settimeout(_HANDSHAKE)
            with contextlib.suppress(OSError):  # whoever says nothing is no process of ours
                said = connection.recv(len(self._greeting(0)), socket.MSG_WAITALL)
                for peer in range(1, self._count):
                    if secrets.compare_digest(said, self._greeting(peer)):
                        connection.settimeout(SILENCE)
                        self._connections[peer] = connection
        listener.close()

    def _reach(self, host: str, port: int) -> None:
        try:
            connection = socket.create_connection((host, port), timeout=_PATIENCE)
        except OSError as error:
            raise JaxmergeError(
                "process 0 can't be reached; the processes must reach each other on any port",
                where=f"{host}:{port}",
                expected="its machine up, and no firewall between the machines",
                found=str(error),
            ) from error
        connection.settimeout(SILENCE)
        connection.sendall(self._greeting(self._index))
        self._connections[0] = connection

    def _greeting(self, index: int) -> bytes:
        return f"{self._token}{index:08}".encode()

    def _beat(self) -> None:
        while not self._leaving:
            self._send("here")
            time.sleep(BEAT)

    def _send(self, line: str, beside: int = -1) -> None:
        for peer, connection in self._connections.items():
            if peer == beside:
                continue
            with contextlib.suppress(OSError):  # its reader finds out, and says so
                connection.sendall(f"{line}\n".encode())

    def _read(self, peer: int, connection: socket.socket) -> None:
        gone = f"process {peer} is gone: it was killed, or its machine was lost"
        try:
            for line in connection.makefile():
                kind, _, text = line.strip().partition(" ")
                if kind == "ended":
                    self._left.add(peer)
                elif kind == "failed":
                    time.sleep(_GRACE)  # what is wrong may be wrong here too, and be said here
                    self._lost(peer, f"process {peer} ended: {text}")
                elif kind == "lost":
                    self._lost(peer, text)
        except TimeoutError:
            self._lost(peer, f"process {peer} has given no sign of life for {SILENCE:g} seconds")
        except OSError:
            self._lost(peer, f"{gone}, the connection broke")
        self._lost(peer, gone)

    def _lost(self, peer: int, why: str) -> None:
        with self._lock:
            if self._leaving or peer in self._left:
                return
            self._leaving = True
            self._send(f"lost {why}", beside=peer)
            message = f"{why}. Process {self._index} stops; the same command goes on from here."
            print(f"\njaxmerge: {message}", file=sys.stderr, flush=True)
            os._exit(LOST)


def _own_address() -> str:
    """The address that other machines know this one by; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address that nobody has (RFC 5737)
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"  # no network: the processes are on this machine
