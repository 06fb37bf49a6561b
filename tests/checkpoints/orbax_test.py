"""Orbax checkpoints: written and read on any mesh, and refused when anything is wrong with them."""

import errno
import gc
import os
import shutil
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as orbax_v0
import pytest
from jax.sharding import Mesh

from jaxmerge.checkpoints import orbax, orbax_writing, survey
from jaxmerge.checkpoints.digest import check_digests, digests
from jaxmerge.checkpoints.source import Source
from jaxmerge.errors import JaxmergeError
from jaxmerge.models.architecture import DecoderConfig
from jaxmerge.models.decoder import SHARDING_RULES
from jaxmerge.sharding import make_mesh, shardings
from jaxmerge.trees import PyTree, named_leaves

ARCHITECTURE = {"model": "decoder", "layers": 2, "rope_theta": 1e4, "tied_embeddings": True}


def make_tree() -> PyTree:
    """Every dtype that checkpoints have, odd sizes and a scalar.

    Shards of more than 1 KiB stand in the data file as they are; smaller ones in compressed nodes.
    """
    rng = np.random.default_rng(0)
    return {
        "layers": {
            "query": jnp.asarray(rng.normal(size=(2, 16, 8, 8)), jnp.float32),
            "up": jnp.asarray(rng.normal(size=(2, 32, 64)), jnp.bfloat16),
            "scale": jnp.asarray(rng.normal(size=(3, 5)), jnp.float16),
        },
        "embedding": jnp.asarray(rng.normal(size=(1024, 16)), jnp.float32),
        "step": jnp.asarray(7, jnp.int32),
        "mask": jnp.asarray([True, False, True]),
    }


def place(tree: PyTree, mesh: Mesh) -> PyTree:
    """The tree on a mesh, by the decoder's rules."""
    return jax.device_put(tree, shardings(tree, SHARDING_RULES, mesh))


def describe(path: Path, subtree: str = "") -> Source:
    """What is known of the checkpoint at a path."""
    return orbax.describe(path.name, orbax.absolute(path), subtree)


def load(path: Path, mesh: Mesh, subtree: str = "") -> PyTree:
    """The checkpoint on a mesh, checked."""
    source = describe(path, subtree)
    placed = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        source.abstract,
        shardings(source.abstract, SHARDING_RULES, mesh),
    )
    tree = orbax.restore(source, placed)
    check_digests(source, digests(tree))
    return tree


def assert_same_bytes(tree: PyTree, expected: PyTree) -> None:
    """Equal names, dtypes, shapes and bytes."""
    found = named_leaves(jax.device_get(tree))
    for name, leaf in named_leaves(jax.device_get(expected)).items():
        other = found.pop(name)
        assert (other.dtype, other.shape) == (leaf.dtype, leaf.shape)
        assert other.tobytes() == leaf.tobytes(), name
    assert not found


def data_file(path: Path) -> Path:
    """The largest file below a checkpoint: the one with the array data."""
    return max((file for file in path.rglob("*") if file.is_file()), key=lambda f: f.stat().st_size)


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return make_mesh(fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, mesh) -> Path:
    """A checkpoint written from a mesh; never changed."""
    path = tmp_path_factory.mktemp("orbax") / "saved"
    orbax.save(path, place(make_tree(), mesh), architecture=ARCHITECTURE)
    return path


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.mark.parametrize(
    "sizes",
    [{}, {"fsdp": 2, "tensor": 2}, {"tensor": 4}, {"pop": 2, "fsdp": 4}, {"pop": 8}],
    ids=str,
)
def test_restored_on_any_mesh(saved, sizes):
    """Bit for bit, and lying where it was asked to lie."""
    mesh = make_mesh(**sizes)
    tree = load(saved, mesh)
    assert_same_bytes(tree, make_tree())
    for leaf, where in zip(
        jax.tree.leaves(tree), jax.tree.leaves(shardings(tree, SHARDING_RULES, mesh))
    ):
        assert leaf.sharding.is_equivalent_to(where, leaf.ndim)


def test_described_without_reading_data(copy):
    """Names, shapes, dtypes, architecture and checksums, though the data are gone."""
    data_file(copy).unlink()
    source = describe(copy)
    expected = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), make_tree())
    assert source.abstract == expected
    assert source.architecture == ARCHITECTURE
    known = {name: digest.checksum for name, digest in digests(make_tree()).items()}
    assert source.checksums == known


def test_fields_that_a_decoder_has_got_since(tmp_path, mesh):
    """Checkpoints of versions that did not know them are alike with those of today."""
    whole = {"model": "decoder", **DecoderConfig(8, 4, 2, 2, 1, 2, 6).plain()}
    older = {name: value for name, value in whole.items() if name != "residual_scale"}
    later = {**whole, "of_next_year": 1}
    for name, architecture in (("whole", whole), ("older", older), ("later", later)):
        orbax.save(tmp_path / name, place(make_tree(), mesh), architecture=architecture)
    found = {each.name: each.architecture for each in survey.survey([str(tmp_path / "[wo]*")])}
    assert found == {"whole": whole, "older": whole}
    with pytest.raises(JaxmergeError, match="architecture of_next_year is"):
        survey.survey([str(tmp_path / "*")])


@pytest.mark.parametrize("name", ["embedding", "layers/query", "layers/up"])
def test_a_flipped_bit_is_refused_with_the_leafs_name(copy, mesh, name):
    """Orbax itself loads it silently, as the damaged leaf without the check shows."""
    # Eight bytes of the last row lie next to each other in every shard, and stand nowhere else.
    needle = _expected(name)[(-1,) * (_expected(name).ndim - 1)].tobytes()[:8]
    (file,) = [file for file in copy.rglob("*") if file.is_file() and needle in file.read_bytes()]
    data = bytearray(file.read_bytes())
    data[data.index(needle) + 3] ^= 0x10
    file.write_bytes(data)
    with pytest.raises(JaxmergeError, match=f"in leaf {name}\n") as caught:
        load(copy, mesh)
    assert caught.value.where == str(copy)
    unchecked = jax.tree.map(np.asarray, named_leaves(orbax.restore(describe(copy), make_tree())))
    changed = [other for other in unchecked if (unchecked[other] != _expected(other)).any()]
    assert changed == [name]


def _expected(name: str) -> np.ndarray:
    return np.asarray(named_leaves(make_tree())[name])


def _cut(fraction: float):
    def damage(file: Path) -> None:
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * fraction)])

    return damage


@pytest.mark.parametrize(
    "damage", [_cut(0.0), _cut(0.3), _cut(0.9), Path.unlink], ids=["empty", "30%", "90%", "deleted"]
)
def test_missing_data_are_refused(copy, mesh, damage):
    """One error of three lines: the directory, what to do, and what TensorStore said."""
    damage(data_file(copy))
    with pytest.raises(JaxmergeError, match="missing or cut short") as caught:
        load(copy, mesh)
    assert caught.value.where == str(copy)
    assert caught.value.found
    assert len(str(caught.value).splitlines()) == 3


def test_what_is_no_files_fault_is_not_called_one(copy, mesh, monkeypatch):
    """A device without memory, as JAX says it."""

    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(jax, "block_until_ready", full)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        load(copy, mesh)


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "state/_METADATA"])
@pytest.mark.parametrize(
    "damage", [_cut(0.5), _cut(0.0), Path.unlink], ids=["50%", "empty", "gone"]
)
def test_damaged_metadata_are_refused(copy, mesh, name, damage):
    """Rather than taken for a checkpoint that has no checksums."""
    damage(copy / name)
    with pytest.raises(JaxmergeError, match="can't be read") as caught:
        load(copy, mesh)
    assert str(copy) in caught.value.where


def test_what_is_recognised(saved, tmp_path):
    """A checkpoint; no missing, empty or other directory, no file, and no part of a checkpoint."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").write_bytes(b"")
    (tmp_path / "file").write_text("")
    assert orbax.recognises(orbax.absolute(saved))
    for name in ("missing", "empty", "other", "file"):
        assert not orbax.recognises(orbax.absolute(tmp_path / name)), name
    assert not orbax.recognises(orbax.absolute(saved.parent))


def test_an_existing_path_is_never_written_to(copy, tmp_path):
    """Be it a checkpoint, an empty directory or a file; what is there stays as it was."""
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    for path in (copy, tmp_path / "empty", tmp_path / "file"):
        with pytest.raises(JaxmergeError, match="something here") as caught:
            orbax.save(path, make_tree())
        assert caught.value.where == str(path)
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before
    assert not list((tmp_path / "empty").iterdir())
    assert (tmp_path / "file").read_text() == "mine"


def test_leaves_are_made_when_their_turn_comes(tmp_path, mesh, monkeypatch):
    """Those before are gone by then, and nothing is left of a checkpoint that fails."""
    monkeypatch.setattr(orbax_writing, "_AT_ONCE", 1)
    tree = {f"leaf{i}": np.full(3, i, np.float32) for i in range(6)}
    alive: list[Any] = []

    def leaf(name: str) -> jax.Array:
        gc.collect()
        alive[:] = [each for each in alive if each() is not None]
        assert len(alive) <= 2  # of six: one that was written, and one that is being
        found = jnp.asarray(tree[name])
        alive.append(weakref.ref(found))
        return found

    orbax.save(tmp_path / "whole", tree, leaf=leaf)
    assert_same_bytes(load(tmp_path / "whole", mesh), tree)

    def fails(name: str) -> jax.Array:
        if name == "leaf4":
            raise JaxmergeError("damaged")
        return leaf(name)

    with pytest.raises(JaxmergeError, match="damaged"):
        orbax.save(tmp_path / "failed", tree, leaf=fails)
    assert [each.name for each in tmp_path.iterdir()] == ["whole"]


def test_a_full_disk_is_told_at_once(tmp_path, monkeypatch):
    """As soon as the item's directory can't be made: what writes into it does not wait for it."""
    makes = os.mkdir

    def mkdir(path: Any, *args: Any, **kwargs: Any) -> None:
        if Path(path).name.startswith("state."):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        makes(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", mkdir)
    begun = time.monotonic()
    with pytest.raises(JaxmergeError, match="No space left"):
        orbax.save(tmp_path / "saved", make_tree())
    assert time.monotonic() - begun < 60  # Orbax's own patience is 300 s
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def training_state(tmp_path_factory) -> Path:
    """What a training loop writes with Orbax v0: parameters, optimiser state and a step."""
    path = tmp_path_factory.mktemp("v0") / "7"
    params = make_tree()
    state: Any = {"params": params, "momentum": {"mu": params["layers"]}, "step": 7}
    with orbax_v0.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state)
    return path


def test_a_subtree_of_a_plain_checkpoint(training_state, mesh):
    """Orbax v0's `StandardCheckpointer` writes no checksums; the rest of the state is not read."""
    source = describe(training_state, "params")
    assert (source.architecture, source.checksums) == ({}, {})
    params = make_tree()
    assert named_leaves(source.carried).keys() == {"step"}  # a counter, which is not merged
    del params["step"]
    assert_same_bytes(load(training_state, mesh, "params"), params)
    nested = {"query": make_tree()["layers"]["query"]}
    assert named_leaves(load(training_state, mesh, "momentum/mu")).keys() > nested.keys()


@pytest.mark.parametrize(
    ("subtree", "said"),
    [
        ("parameters", r"no subtree 'parameters'(.|\n)*momentum.*params.*step"),
        ("params/layers/query/kernel", "no further keys"),
        ("", "leaf step: a leaf of the checkpoint is no array(.|\n)*pool.subtree"),
    ],
)
def test_a_wrong_subtree_is_refused(training_state, subtree, said):
    """With the keys that are there; the whole state is refused for its step count."""
    with pytest.raises(JaxmergeError, match=said) as caught:
        describe(training_state, subtree)
    assert str(training_state) in caught.value.where


SAVER = """
import sys
import jax, jax.numpy as jnp
jax.config.update("jax_platforms", "cpu")
from jaxmerge.checkpoints import orbax
orbax.save(sys.argv[1], {f"leaf{i}": jnp.full((1024, 1024, 8), float(i)) for i in range(8)})
"""


@pytest.mark.slow
def test_killed_while_saving(tmp_path):
    """Nothing that could be taken for a checkpoint is there, and saving again just works."""

    def bytes_written(directory: Path) -> int:
        found = subprocess.run(["du", "-sb", directory], capture_output=True, text=True)
        return int(found.stdout.split()[0])

    for megabytes in (1, 60, 200):  # of 256: at the start, in the middle, near the end
        path = tmp_path / str(megabytes) / "model"
        path.parent.mkdir()
        process = subprocess.Popen([sys.executable, "-c", SAVER, str(path)])
        while process.poll() is None and bytes_written(path.parent) < megabytes * 2**20:
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -9, "it had finished: the kill came too late"
        (left,) = path.parent.iterdir()
        assert bytes_written(left) >= 2**20
        assert not orbax.recognises(orbax.absolute(left))
        assert not orbax.recognises(orbax.absolute(path))
        orbax.save(path, {"x": jnp.ones(3)})
        assert_same_bytes(load(path, make_mesh()), {"x": jnp.ones(3)})
        shutil.rmtree(path.parent)
