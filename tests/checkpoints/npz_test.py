"""Files of NumPy arrays: what big_vision writes, merged by name and written as it came."""

import io
import zipfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge import config as configs
from jaxmerge.checkpoints import npz, pool
from jaxmerge.checkpoints.orbax import absolute
from jaxmerge.checkpoints.survey import find, survey
from jaxmerge.errors import JaxmergeError
from jaxmerge.experiment.merge import merge
from jaxmerge.sharding import make_mesh
from jaxmerge.trees import named_leaves


def arrays(seed: int, prefix: str = "params/") -> dict[str, np.ndarray]:
    """Parameters as big_vision names them, in several types, one in Fortran's order."""
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(4, 6)).astype(np.float32)
    return {
        f"{prefix}img/head/kernel": np.asfortranarray(kernel),
        f"{prefix}img/head/bias": rng.normal(size=6).astype(jnp.bfloat16),
        f"{prefix}llm/scale": rng.normal(size=()).astype(np.float16),
        f"{prefix}llm/ids": np.arange(3, dtype=np.int32),
    }


def moments(seed: int) -> dict[str, np.ndarray]:
    return {f"opt/0/mu/{name}": value * 0 for name, value in arrays(seed, "").items()}


def stored(path: Path) -> dict[str, np.ndarray]:
    """A file as big_vision reads it."""
    with np.load(path) as file:
        found = {name: file[name] for name in file.files}
    void = {name for name, value in found.items() if value.dtype.kind == "V"}
    return found | {name: found[name].view(jnp.bfloat16) for name in void}


def assert_same(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        one = np.asarray(found[name])
        assert (one.dtype, one.shape) == (value.dtype, value.shape), name
        np.testing.assert_array_equal(one, value, err_msg=name)


@pytest.mark.parametrize("residency", ["device", "disk"])
def test_merged_by_name_and_written_as_it_came(tmp_path, residency):
    """Plain or compressed, with a step behind the name; one-hot, it is the member."""
    paths = [tmp_path / "a.npz", tmp_path / "b.npz-000000200"]
    np.savez(paths[0], allow_pickle=False, **arrays(0), **moments(0))
    with paths[1].open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **arrays(1), **moments(1))
    sources = survey(list(map(str, paths)))
    assert [(each.format, each.subtree) for each in sources] == [("npz", "params")] * 2
    loaded = pool.load(sources, make_mesh(fsdp=2), ((r"kernel", ("fsdp",)),), residency=residency)
    leaf = loaded.merged([0.0, 1.0])
    assert_same(
        {f"params/{name}": leaf(name) for name in named_leaves(sources[0].abstract)}, arrays(1)
    )
    config = configs.default()
    config.pool.checkpoints = tuple(map(str, paths))
    config.merge.weights, config.export.formats = (0.0, 1.0), ("npz", "orbax")
    by_name, orbax = merge(config, str(tmp_path / "out"))
    assert by_name.name == "merged.npz"
    assert_same(stored(by_name), arrays(1))
    (again,) = find([str(orbax)])
    assert named_leaves(again.abstract).keys() == named_leaves(sources[0].abstract).keys()


@pytest.mark.parametrize(
    ("prefix", "more", "subtree"),
    [
        ("params/", {}, "params"),
        ("params/", {"batch_stats/mean": np.zeros(2, np.float32)}, ""),
        ("params/", {"opt/target/w": np.zeros(1)}, "params"),
        ("opt/target/", {"opt/state/step": np.zeros((), int)}, "opt/target"),
        ("", {}, ""),
    ],
)
def test_where_the_parameters_are(tmp_path, prefix, more, subtree):
    np.savez(tmp_path / "m.npz", allow_pickle=False, **arrays(0, prefix), **more)
    source = npz.describe("m", absolute(tmp_path / "m.npz"))
    assert source.subtree == subtree
    found = named_leaves(npz.restore(source, source.abstract))
    assert_same(found, arrays(0, "" if subtree else prefix) | ({} if subtree else more))


def test_generators_and_counters_are_the_firsts(tmp_path):
    for k in (0, 1):
        step = {"step": np.int32(k), "rng": np.full(2, k, np.uint32)}
        np.savez(tmp_path / f"{k}.npz", allow_pickle=False, **arrays(k, ""), **step)
    sources = survey([str(tmp_path / "*.npz")])
    leaf = pool.load(sources, make_mesh(), ()).merged([0.0, 1.0])
    npz.save(tmp_path / "out.npz", sources[0].abstract, leaf, sources[0])
    first = {"step": np.int32(0), "rng": np.zeros(2, np.uint32)}
    assert_same(stored(tmp_path / "out.npz"), arrays(1, "") | first)


def test_what_a_sharded_trainer_keeps_elsewhere(tmp_path):
    """Arrays of shape [0], in all members alike, are no weights; Orbax writes none at all."""
    for k in (0, 1):
        path = tmp_path / f"m{k}.npz"
        empty = {"img/proj": np.zeros(0, np.float32), "llm/w": np.zeros((0, 3), np.float32)}
        np.savez(path, allow_pickle=False, **arrays(k, ""), **empty)
    with pytest.raises(JaxmergeError, match=r"shape \[0\]") as raised:
        survey([str(tmp_path / "m*")])
    assert raised.value.found == "1 of 6: img/proj"
    assert "gathered weights" in raised.value.expected


def npy(array: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.npy", npy(np.zeros(3)), "numbers of 32 bits at most"),
        ("a.npy", npy(np.array([{}], object), allow_pickle=True), "can't be merged"),
        ("a.npy", npy(np.zeros(3, "V4")), "can't be merged"),
        ("a.npy", npy(np.zeros(3, "f4"))[:-1], "contradicts itself"),
        ("a.npy", npy(np.zeros(3, "f4")).replace(b"(3,)", b"(9,)"), "contradicts itself"),
        ("a.npy", b"garbage", "can't be read"),
        ("a.txt", b"", "no array"),
        ("b/c.npy", npy(np.zeros(3, "f4")), "below another"),
    ],
)
def test_what_is_no_file_of_arrays(tmp_path, name, data, said):
    path = tmp_path / "m.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, data)
        archive.writestr("b.npy", npy(np.zeros(2, "f4")))
    with pytest.raises(JaxmergeError, match=said):
        npz.describe("m", absolute(path))


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damage_within_a_compressed_array_is_noticed(tmp_path, compression):
    """Each compression has errors of its own kind."""
    path = tmp_path / "m.npz"
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("w.npy", npy(np.arange(5000, dtype="f4")))
    whole = bytearray(path.read_bytes())
    whole[40:80] = bytes(each ^ 0x5A for each in whole[40:80])
    path.write_bytes(whole)
    with pytest.raises(JaxmergeError, match="array w: this can't be read"):
        npz.describe("m", absolute(path))


def test_damage_is_noticed(tmp_path):
    """Cut short, and one bit of a value."""
    path = tmp_path / "m.npz"
    np.savez(path, allow_pickle=False, w=np.ones(9, np.float32))
    whole = path.read_bytes()
    source = npz.describe("m", absolute(path))
    at = whole.index(np.float32(1).tobytes() * 9)
    path.write_bytes(whole[:at] + b"\1" + whole[at + 1 :])
    with pytest.raises(JaxmergeError, match=r"array w: this can't be read(.|\n)*CRC"):
        npz.restore(source, source.abstract)
    path.write_bytes(whole[:-9])
    with pytest.raises(JaxmergeError, match="can't be read"):
        npz.describe("m", absolute(path))
