"""The safetensors container: what the library writes is read, what it would refuse is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from etils import epath
from safetensors.torch import save

from jaxmerge.checkpoints import safetensors
from jaxmerge.errors import JaxmergeError

TORCH = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.float8_e5m2,
    torch.float8_e4m3fn,
    torch.int16,
    torch.uint16,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.uint32,
    torch.float32,
]


def make_tensors() -> dict[str, torch.Tensor]:
    """One of each dtype, and names and shapes that are seldom."""
    tensors = {f"x{i:02}": torch.arange(6).reshape(2, 3).to(dtype) for i, dtype in enumerate(TORCH)}
    odd = {'é "\u2028': torch.ones(1), "scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4)}
    return tensors | odd


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> epath.Path:
    """A file with a header of our own: a text, or what JSON makes of an object."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + text + data)
    return epath.Path(path)


def test_what_the_library_writes(tmp_path):
    """Names, dtypes, shapes and bytes; the metadata are passed over."""
    tensors = make_tensors()
    path = tmp_path / "model.safetensors"
    path.write_bytes(save(tensors, {"format": "pt"}))
    found = safetensors.read_header(epath.Path(path))
    assert found.keys() == tensors.keys()
    for name, tensor in found.items():
        expected = tensors[name]
        assert tensor.shape == tuple(expected.shape)
        assert tensor.dtype.itemsize == expected.element_size()
        values = np.empty(tensor.shape, tensor.dtype)
        safetensors.read_into(tensor.file, tensor.start, values)
        assert values.tobytes() == expected.reshape(-1).view(torch.uint8).numpy().tobytes(), name


def test_headers_as_the_library_writes_them(tmp_path):
    """Byte for byte, order and padding included, however the tensors come."""
    tensors = make_tensors()
    path = tmp_path / "model.safetensors"
    path.write_bytes(save(tensors, {"format": "pt"}))
    found = safetensors.read_header(epath.Path(path))
    reverse = {name: found[name].dtype for name in sorted(found, reverse=True)}
    order = safetensors.in_file_order(reverse)
    header = safetensors.make_header((name, found[name].dtype, found[name].shape) for name in order)
    assert path.read_bytes().startswith(header)
    assert len(header) == min(tensor.start for tensor in found.values())


def test_written_in_any_order(tmp_path):
    """Each array to its place."""
    path = tmp_path / "file"
    values = np.arange(100, dtype=np.float32)
    with open(path, "wb") as stream:
        safetensors.write_at(stream.fileno(), 200, values[50:])
        safetensors.write_at(stream.fileno(), 0, values[:50])
    assert path.read_bytes() == values.tobytes()


def test_files_that_are_not_local_are_read_as_streams(tmp_path):
    """The same bytes; a short file is seen by their number."""
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    out = bytearray(40)
    assert safetensors._seek_and_read(str(path), 30, memoryview(out)) == 40
    assert out == bytes(range(30, 70))
    assert safetensors._seek_and_read(str(path), 90, memoryview(out)) == 10


def tensor(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | changes


WRONG: dict[str, tuple[Any, str]] = {
    "no JSON": (b'{"x": ', "this is no JSON"),
    "no text": (b'{"\xff": 1}', "this is no JSON"),
    "too deep": (b"[" * 100_000, "this is no JSON"),
    "no object": ([], "no JSON object"),
    "twice": (b'{"x": {}, "y": {}, "x": {}}', "x is there twice"),
    "a field twice": (b'{"x": {"dtype": "F32", "dtype": "F16"}}', "dtype is there twice"),
    "no dtype": ({"x": {"shape": [], "data_offsets": [0, 16]}}, "does not say where"),
    "one field more": ({"x": tensor(stride=1)}, "does not say where"),
    "negative": ({"x": tensor(shape=[-2, -2])}, "does not say where"),
    "a fraction": ({"x": tensor(shape=[2.0, 2])}, "does not say where"),
    "a truth": ({"x": tensor(shape=[True, 4])}, "does not say where"),
    "three offsets": ({"x": tensor(data_offsets=[0, 8, 16])}, "does not say where"),
    "too many axes": ({"x": tensor(shape=[1] * 40 + [4])}, "does not say where"),
    "64 bits": ({"x": tensor(dtype="F64", shape=[2])}, "dtype is not known"),
    "an unknown dtype": ({"x": tensor(dtype="F4")}, "dtype is not known"),
    "too many bytes": ({"x": tensor(shape=[2, 1])}, "contradicts itself"),
    "too few bytes": ({"x": tensor(shape=[2**62, 2**62])}, "contradicts itself"),
    "backwards": ({"x": tensor(data_offsets=[16, 0])}, "contradicts itself"),
    "behind the end": ({"x": tensor(shape=[5], data_offsets=[0, 20])}, "cut short"),
    "a gap at the start": ({"x": tensor(shape=[3], data_offsets=[4, 16])}, "gap before"),
    "a gap at the end": ({"x": tensor(shape=[3], data_offsets=[0, 12])}, "goes on after"),
    "an overlap": (
        {"y": tensor(), "x": tensor(shape=[2], data_offsets=[8, 16])},
        "overlaps another",
    ),
    "the same bytes": ({"y": tensor(), "x": tensor()}, "overlaps another"),
    "nothing": ({}, "goes on after"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_header_that_lies(tmp_path, case):
    """The file is named, and the tensor where one is at fault."""
    header, said = WRONG[case]
    file = write(tmp_path / "model.safetensors", header, bytes(16))
    with pytest.raises(JaxmergeError, match=said) as caught:
        safetensors.read_header(file)
    assert caught.value.where.startswith(str(file))
    if isinstance(header, dict) and header and "end" not in case:
        assert caught.value.where == f"{file}, tensor x"


@pytest.mark.parametrize("length", [0, 17, 10**8 + 1, 2**63, 2**64 - 1])
def test_a_length_that_lies(tmp_path, length):
    """Before any memory is taken for it."""
    file = write(tmp_path / "model.safetensors", b"{}", bytes(14), length=length)
    with pytest.raises(JaxmergeError) as caught:
        safetensors.read_header(file)
    assert str(file) in caught.value.where


def _cut_to(size: int) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_cut_to(0), "cut short"),
        (_cut_to(7), "cut short"),
        (_cut_to(100), "cut short"),
        (_cut_to(-1), "cut short"),
        (Path.unlink, "can't be read"),
    ],
)
def test_a_damaged_file(tmp_path, damage, said):
    path = tmp_path / "model.safetensors"
    path.write_bytes(save(make_tensors()))
    damage(path)
    with pytest.raises(JaxmergeError, match=said) as caught:
        safetensors.read_header(epath.Path(path))
    assert caught.value.where == str(path)


def test_cut_short_after_the_header_was_read(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(save({"x": torch.ones(100)}))
    found = safetensors.read_header(epath.Path(path))["x"]
    _cut_to(-40)(path)
    with pytest.raises(JaxmergeError, match="cut short") as caught:
        safetensors.read_into(found.file, found.start, np.empty(100, np.float32))
    assert caught.value.where == str(path)
    assert caught.value.expected == f"{found.stop} bytes"
    assert caught.value.found == f"{found.stop - 40} bytes"
