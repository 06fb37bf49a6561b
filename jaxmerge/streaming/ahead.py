"""Work on tensors by as many threads as there are cores, within a bound on their memory."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jaxmerge.streaming.pipeline import WORKERS


def done(
    items: Sequence[str], work: Callable[[str], Any], size: Callable[[str], int], memory_bytes: int
) -> Iterator[tuple[str, Any]]:
    """What has been made of items, each as soon as it is there.

    While one is read, another is merged, and a third is written.

    Args:
        items: names. The first of them that fits into what is left of the memory is begun next.
        work: called by several threads; the first error that it raises ends all.
        size: bytes that an item takes; one that takes more than there are is worked on alone.
        memory_bytes: of all that are worked on at a time.
    """
    shared = _Shared({item: min(size(item), memory_bytes) for item in items}, memory_bytes)
    results: queue.SimpleQueue[tuple[str, Any] | BaseException] = queue.SimpleQueue()

    def work_on() -> None:
        while (item := shared.take()) is not None:
            try:
                results.put((item, work(item)))
            except BaseException as error:
                results.put(error)
            finally:
                shared.give_back(item)

    with ThreadPoolExecutor(WORKERS) as workers:
        for _ in range(WORKERS):
            workers.submit(work_on)
        try:
            for _ in items:
                found = results.get()
                if isinstance(found, BaseException):
                    raise found
                yield found
        finally:
            shared.stop()


class _Shared:
    """Items that several threads take from, each with the bytes that it takes."""

    def __init__(self, sizes: dict[str, int], memory_bytes: int):
        self._waiting, self._working = dict(sizes), dict[str, int]()
        self._free, self._changed = memory_bytes, threading.Condition()

    def take(self) -> str | None:
        """The next item that there is room for, when there is; None: there is none any more."""
        with self._changed:
            while self._waiting:
                for item, size in self._waiting.items():
                    if size <= self._free:
                        self._free -= size
                        self._working[item] = self._waiting.pop(item)
                        return item
                self._changed.wait()
        return None

    def give_back(self, item: str) -> None:
        with self._changed:
            self._free += self._working.pop(item)
            self._changed.notify_all()

    def stop(self) -> None:
        """What has not been taken is not worked on."""
        with self._changed:
            self._waiting.clear()
            self._changed.notify_all()
