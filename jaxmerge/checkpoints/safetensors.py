"""The safetensors container: one file of named arrays, read by byte range.

Eight bytes give the length of a JSON header, the header says where in the rest each tensor lies
(https://github.com/huggingface/safetensors#format). The header comes from others: all that it says
is checked here, before a byte of a tensor is read.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxmerge.errors import JaxmergeError
from jaxmerge.textfiles import parse_json

# As the format names them, in the order in which a file holds them (that of the safetensors
# library, descending). Of the 64-bit types there are integers alone, which are copied as words:
# JAX would make 32-bit ones of them.
DTYPES: Mapping[str, np.dtype] = {
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F32": np.dtype(np.float32),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_MAX_HEADER = 100_000_000  # bytes; the safetensors library refuses more
_MAX_AXES = 32


class Tensor(NamedTuple):
    """Where a tensor lies: bytes [start, stop) of a file, little-endian, in C order."""

    file: str  # a path, or an address as `epath` knows it
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(file: epath.Path) -> dict[str, Tensor]:
    """The tensors of a file, by name.

    Raises:
        JaxmergeError: the file can't be read, or its header is not what the format demands.
    """
    try:
        size = file.stat().length
        header = _header(file, size)
    except OSError as error:
        raise JaxmergeError(
            "the file can't be read",
            where=str(file),
            expected="a whole file of safetensors that this user may read; download or copy "
            "it anew",
            found=error.strerror or str(error),
        ) from error
    first, path = size - header.size, str(file)
    tensors = {
        name: _tensor(path, name, entry, first)
        for name, entry in header.entries.items()
        if name != "__metadata__"
    }
    _check_ranges(path, tensors, first, size)
    return tensors


def read_into(file: str, start: int, out: np.ndarray) -> None:
    """Fills a contiguous array with the bytes of a file from `start` on.

    Raises:
        JaxmergeError: the file can't be read, or ends too early.
    """
    _read(file, start, out, _pread if "://" not in file else _seek_and_read)


class OpenFiles:
    """Files that stay open for many reads from several threads."""

    def __init__(self) -> None:
        self._descriptors: dict[str, int] = {}
        self._opening = threading.Lock()

    def read_into(self, file: str, start: int, out: np.ndarray) -> None:
        """As the function `read_into`.

        Raises:
            JaxmergeError: the file can't be read, or ends too early.
        """
        _read(file, start, out, self._pread if "://" not in file else _seek_and_read)

    def close(self) -> None:
        """Closes all files; the next read opens them again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _pread(self, file: str, start: int, view: memoryview) -> int:
        descriptor = self._descriptors.get(file)
        return _pread_from(self._open(file) if descriptor is None else descriptor, start, view)

    def _open(self, file: str) -> int:
        with self._opening:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
                _read_ahead(self._descriptors[file])
        return self._descriptors[file]


def write_at(descriptor: int, start: int, values: np.ndarray) -> None:
    """Writes a contiguous array to a place in an open file."""
    view = values.reshape(-1).view(np.uint8).data
    while view:
        count = os.pwrite(descriptor, view, start)
        view, start = view[count:], start + count


def in_file_order(tensors: Mapping[str, np.dtype]) -> list[str]:
    """Names in the order in which the safetensors library writes tensors of these dtypes."""
    order = list(DTYPES.values())
    return sorted(tensors, key=lambda name: (order.index(tensors[name]), name.encode()))


def make_header(tensors: Iterable[tuple[str, np.dtype, tuple[int, ...]]]) -> bytes:
    """The beginning of a file that holds these tensors one after the other."""
    code = {dtype: name for name, dtype in DTYPES.items()}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, dtype, shape in tensors:
        stop = start + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": code[dtype], "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class _Header(NamedTuple):
    entries: dict[str, Any]
    size: int  # bytes of tensors that follow


def _header(file: epath.Path, size: int) -> _Header:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise JaxmergeError(
                "this is no safetensors file, or it is cut short",
                where=str(file),
                expected=f"a header of at most {max(min(_MAX_HEADER, size - 8), 0)} bytes",
                found=f"one of {length} bytes, in a file of {size}",
            )
        text = stream.read(length)
    entries = parse_json(text, f"{file}, header")
    if not isinstance(entries, dict):
        raise JaxmergeError(
            "the header is no JSON object",
            where=str(file),
            expected="a whole file of safetensors; download or copy it anew",
        )
    return _Header(entries, size - 8 - length)


def _tensor(file: str, name: str, entry: Any, first: int) -> Tensor:
    """A tensor as the header describes it, if dtype, shape and range are one."""
    where = f"{file}, tensor {name}"
    match entry:
        case {"dtype": str(code), "shape": list(shape), "data_offsets": [start, stop]} if (
            len(entry) == 3
            and len(shape) <= _MAX_AXES
            and all(type(number) is int and number >= 0 for number in (*shape, start, stop))
        ):
            pass
        case _:
            raise JaxmergeError(
                "the header does not say where the tensor is",
                where=where,
                expected="dtype, shape and data_offsets",
                found=str(entry)[:200],
            )
    if code not in DTYPES:
        raise JaxmergeError(
            "the dtype is not known", where=where, expected=", ".join(DTYPES), found=code
        )
    expected = math.prod(shape) * DTYPES[code].itemsize
    if stop - start != expected:
        raise JaxmergeError(
            "the header contradicts itself",
            where=where,
            expected=f"{expected} bytes for {code}{shape}",
            found=f"data_offsets [{start}, {stop}], which are {stop - start}",
        )
    return Tensor(file, DTYPES[code], tuple(shape), first + start, first + stop)


def _check_ranges(file: str, tensors: Mapping[str, Tensor], first: int, size: int) -> None:
    """Raises unless the tensors fill the file: the format allows neither gaps nor overlaps."""
    at = first
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1][3:]):
        if tensor.start != at:
            raise JaxmergeError(
                "the tensor overlaps another" if tensor.start < at else "a gap before the tensor",
                where=f"{file}, tensor {name}",
                expected=f"data_offsets that begin at {at - first}",
                found=str(tensor.start - first),
            )
        at = tensor.stop
    if at != size:
        raise JaxmergeError(
            "the file is cut short" if at > size else "the file goes on after the last tensor",
            where=file,
            expected=f"{at} bytes",
            found=f"{size} bytes",
        )


def _read(
    file: str, start: int, out: np.ndarray, read: Callable[[str, int, memoryview], int]
) -> None:
    view = out.reshape(-1).view(np.uint8).data
    try:
        done = read(file, start, view)
    except OSError as error:
        raise JaxmergeError(
            "the file can't be read",
            where=file,
            expected="a whole file of safetensors that this user may read; download or copy "
            "it anew",
            found=error.strerror or str(error),
        ) from error
    if done < len(view):
        raise JaxmergeError(
            "the file is cut short",
            where=file,
            expected=f"{start + len(view)} bytes",
            found=f"{start + done} bytes",
        )


def _read_ahead(descriptor: int) -> None:
    """Has the system read a file ahead, where it takes such advice: macOS does not."""
    advise = getattr(os, "posix_fadvise", None)
    if advise:
        advise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)


def _pread(file: str, start: int, view: memoryview) -> int:
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _pread_from(descriptor, start, view)
    finally:
        os.close(descriptor)


def _pread_from(descriptor: int, start: int, view: memoryview) -> int:
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], start + done)
        if not count:
            break
        done += count
    return done


def _seek_and_read(file: str, start: int, view: memoryview) -> int:
    done = 0
    with epath.Path(file).open("rb") as stream:
        stream.seek(start)
        while done < len(view):
            data = stream.read(len(view) - done)
            if not data:
                break
            view[done : done + len(data)] = data
            done += len(data)
    return done
