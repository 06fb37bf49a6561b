"""Tensors side by side: within the memory, and ended by the first error."""

import threading
import time

import pytest

from jaxmerge.streaming import ahead


@pytest.fixture(autouse=True)
def workers(monkeypatch):
    monkeypatch.setattr(ahead, "WORKERS", 4)


def test_never_more_than_the_memory():
    """Whatever is large is alone, and what fits goes before it."""
    sizes = {"a": 6, "b": 99, "c": 4, "d": 3, "e": 3, "f": 3}
    lock, now, most, together = threading.Lock(), [], [], []
    beside = threading.Event()

    def work(item: str) -> str:
        with lock:
            now.append(item)
            most.append(sum(min(sizes[each], 10) for each in now))
            together.append(set(now))
        if item == "c":
            beside.set()
        if item == "a":
            assert beside.wait(60)  # c is begun meanwhile
        with lock:
            now.remove(item)
        return item.upper()

    found = dict(ahead.done([*sizes], work, sizes.__getitem__, 10))
    assert found == {item: item.upper() for item in sizes}
    assert max(most) <= 10
    assert {"a", "c"} in together
    assert all(each == {"b"} for each in together if "b" in each)


def test_the_first_error_ends_it():
    begun = []

    def work(item: str) -> None:
        begun.append(item)
        if item == "3":
            raise ValueError("no")
        time.sleep(0.005)

    items = [str(number) for number in range(200)]
    with pytest.raises(ValueError, match="no"):
        list(ahead.done(items, work, lambda _: 1, 100))
    assert len(begun) < len(items)
