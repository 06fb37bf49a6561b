"""Pools: what is found, what is loaded, and that everything that is wrong is said at once."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxmerge.checkpoints import orbax, pool
from jaxmerge.checkpoints.mergers import read_leaf
from jaxmerge.checkpoints.survey import survey
from jaxmerge.errors import JaxmergeError
from jaxmerge.models.decoder import SHARDING_RULES
from jaxmerge.planning.here import available_memory
from jaxmerge.sharding import make_mesh, shardings
from jaxmerge.trees import PyTree, named_leaves


def make_tree(seed: int, **changes: Any) -> PyTree:
    """A small checkpoint; `changes` replaces, adds or (with None) removes top-level leaves."""
    rng = np.random.default_rng(seed)
    tree = {
        "layers": {"query": jnp.asarray(rng.normal(size=(2, 16, 16, 4)), jnp.float32)},
        "embedding": jnp.asarray(rng.normal(size=(8, 4)), jnp.bfloat16),
        "steps": jnp.arange(3),
        **changes,
    }
    return {name: leaf for name, leaf in tree.items() if leaf is not None}


def survey_and_load(patterns: list[Path], **options: Any) -> pool.Pool:
    """What a run does before anything else."""
    sources = survey([str(pattern) for pattern in patterns])
    return pool.load(sources, make_mesh(fsdp=2, tensor=2), SHARDING_RULES, **options)


def refused(patterns: list[Path]) -> JaxmergeError:
    """The error that these checkpoints end in."""
    with pytest.raises(JaxmergeError) as caught:
        survey_and_load(patterns)
    return caught.value


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A pool of three; never changed."""
    directory = tmp_path_factory.mktemp("pool")
    for k, name in enumerate("abc"):
        orbax.save(directory / name, make_tree(k), architecture={"model": "toy", "layers": 2})
    (directory / "notes.txt").write_text("no checkpoint")
    (directory / "empty").mkdir()
    return directory


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return make_mesh(fsdp=2, tensor=2)


def save(path: Path, tree: PyTree, **architecture: Any) -> Path:
    """Saves one more checkpoint beside a pool."""
    orbax.save(path, tree, architecture={"model": "toy", "layers": 2} | architecture)
    return path


def assert_same(tree: PyTree, expected: PyTree) -> None:
    """The same structure and bytes."""
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for leaf, other in zip(jax.tree.leaves(tree), jax.tree.leaves(expected)):
        assert leaf.dtype == other.dtype
        assert np.asarray(leaf).tobytes() == np.asarray(other).tobytes()


def test_a_pool_as_saved(saved, mesh):
    """Names, trees, records and architecture; every leaf lies where the rules say."""
    seen: list[pool.Record] = []
    loaded = survey_and_load([saved / "*"], on_loaded=seen.append)
    assert loaded.names == ("a", "b", "c")
    assert loaded.architecture == {"model": "toy", "layers": 2}
    for k, tree in enumerate(loaded.trees):
        assert_same(tree, make_tree(k))
        placed = shardings(tree, SHARDING_RULES, mesh)
        for leaf, where in zip(jax.tree.leaves(tree), jax.tree.leaves(placed)):
            assert leaf.sharding.is_equivalent_to(where, leaf.ndim)
    assert tuple(seen) == loaded.records
    record = loaded.records[1]
    assert record.source == str(saved / "b")
    assert (record.name, record.format) == ("b", "orbax")
    assert (record.bytes, record.parameters) == (2048 * 4 + 32 * 2 + 3 * 4, 2048 + 32 + 3)
    assert record.dtype == "bfloat16,float32,int32"
    assert len({record.fingerprint for record in loaded.records}) == 3


def test_the_fingerprint_is_that_of_the_values(saved, tmp_path):
    """The same wherever and however often the checkpoint was saved."""
    again = save(tmp_path / "b", make_tree(1))
    loaded = survey_and_load([saved / "b", again, saved / "c"])
    first, second, third = (record.fingerprint for record in loaded.records)
    assert first == second != third


def test_patterns(saved):
    """Matches are sorted, what is no checkpoint is passed over, and the order of patterns holds."""

    def names(*patterns: str) -> list[str]:
        return [source.name for source in survey([str(saved / p) for p in patterns])]

    assert names("*") == ["a", "b", "c"]
    assert names("[bc]") == ["b", "c"]
    assert names("c", "[ab]") == ["c", "a", "b"]


def test_a_relative_path(saved, monkeypatch):
    """From the working directory; the source is absolute."""
    monkeypatch.chdir(saved)
    sources = survey(["a", "./c"])
    assert [source.path for source in sources] == [str(saved / "a"), str(saved / "c")]


def test_names_that_collide_get_parents(tmp_path):
    """As many as it takes, for all of them."""
    paths = [tmp_path / where for where in ("x/run1/last", "y/run1/last", "x/run2/last")]
    for k, path in enumerate(paths):
        save(path, make_tree(k))
    assert [source.name for source in survey(list(map(str, paths[1:])))] == [
        "run1/last",
        "run2/last",
    ]
    assert [source.name for source in survey(list(map(str, paths)))] == [
        "x/run1/last",
        "y/run1/last",
        "x/run2/last",
    ]


@pytest.mark.parametrize(
    ("patterns", "where", "said"),
    [
        (["a", "missing"], "missing", "no checkpoint here"),
        (["a", "missing/*"], "missing/*", "no checkpoint here"),
        (["a", "z*"], "z*", "no checkpoint here"),
        (["a", "empty"], "empty", "this is no checkpoint"),
        (["a", "notes.txt"], "notes.txt", "this is no checkpoint"),
        (["a", "."], "", "this is no checkpoint"),
    ],
)
def test_paths_without_a_checkpoint(saved, patterns, where, said):
    """Each names the path; nothing is read before all are found."""
    error = refused([saved / pattern for pattern in patterns])
    assert error.where == str(saved / where)
    assert said in error.what


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        ([], "at least two"),
        (["a"], "at least two"),
        (["a", "b", "a"], "more than once"),
        (["*", "b"], "more than once"),
        (["a", "../{parent}/a"], "more than once"),
    ],
)
def test_too_few_or_the_same_twice(saved, patterns, said):
    """The field and the checkpoint are named, however the path is spelt."""
    error = refused([saved / pattern.format(parent=saved.name) for pattern in patterns])
    assert error.where == "pool.checkpoints"
    assert said in error.what
    if len(patterns) > 1:
        assert error.found == str(saved / ("b" if "*" in patterns else "a"))


def test_every_difference_in_one_message(saved, tmp_path):
    """Names, shapes, dtypes and architecture of all checkpoints, before any data are read."""
    names = save(tmp_path / "names", make_tree(3, extra=jnp.ones(2), steps=None))
    shapes = save(tmp_path / "shapes", make_tree(4, embedding=jnp.ones((9, 4), jnp.bfloat16)))
    dtypes = save(tmp_path / "dtypes", make_tree(5, embedding=jnp.ones((8, 4))), layers=3)
    for path in (names, shapes, dtypes):
        shutil.rmtree(path / "state" / "ocdbt.process_0")
    error = refused([saved / "a", names, saved / "b", shapes, dtypes])
    assert error.where == "pool.checkpoints"
    assert error.what.splitlines()[1:] == [
        "  names: no leaf steps",
        "  names: leaf extra is not in a",
        "  shapes: leaf embedding is bfloat16[9,4], in a bfloat16[8,4]",
        "  dtypes: leaf embedding is float32[8,4], in a bfloat16[8,4]",
        "  dtypes: architecture layers is 3, in a 2",
    ]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite(saved, tmp_path, bad):
    """The checkpoint and the leaf are named, though the checksum is right."""
    tree = make_tree(3)
    tree["layers"]["query"] = tree["layers"]["query"].at[1, 2, 3, 0].set(bad)
    path = save(tmp_path / "bad", tree)
    error = refused([saved / "a", path])
    assert error.where == str(path)
    assert "NaN or infinite" in error.what
    assert error.what.endswith("leaf layers/query")


def test_integers_that_differ(saved, tmp_path):
    """They can't be averaged; the checkpoint and the leaf are named."""
    path = save(tmp_path / "later", make_tree(3, steps=jnp.array([0, 1, 3])))
    error = refused([saved / "a", saved / "b", path])
    assert error.where == str(path)
    assert "leaf steps" in error.what


def _cut(data: bytearray) -> None:
    del data[len(data) // 2 :]


def _flip(data: bytearray) -> None:
    data[len(data) // 2] ^= 1


@pytest.mark.parametrize(
    ("damage", "said"),
    [(_cut, "can't be read"), (_flip, "not those that were saved, in leaf layers/query")],
)
def test_a_damaged_checkpoint_is_found_while_loading(saved, tmp_path, damage, said):
    """The others of the pool are fine; `on_loaded` has heard of those before it alone."""
    damaged = Path(shutil.copytree(saved / "b", tmp_path / "b"))
    file = max(damaged.rglob("ocdbt.process_0/d/*"), key=lambda file: file.stat().st_size)
    data = bytearray(file.read_bytes())
    damage(data)
    file.write_bytes(data)
    seen: list[pool.Record] = []
    with pytest.raises(JaxmergeError, match=said) as caught:
        survey_and_load([saved / "a", damaged, saved / "c"], on_loaded=seen.append)
    assert caught.value.where == str(damaged)
    assert [record.name for record in seen] == ["a"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_cast(saved, dtype):
    """Floating-point leaves are rounded to nearest; integers and the records stay as stored."""
    loaded = survey_and_load([saved / "*"], dtype=dtype)
    for k, tree in enumerate(loaded.trees):
        stored = make_tree(k)
        assert tree["embedding"].dtype == tree["layers"]["query"].dtype == dtype
        np.testing.assert_array_equal(tree["steps"], stored["steps"])
        for leaf, other in zip(jax.tree.leaves(tree), jax.tree.leaves(stored)):
            # float32 first: NumPy has no direct way from bfloat16 to float16, and it is exact.
            expected = np.asarray(other).astype(np.float32).astype(leaf.dtype)
            np.testing.assert_array_equal(np.asarray(leaf), expected)
    assert loaded.records == survey_and_load([saved / "*"]).records


def test_members_of_different_dtypes(saved, tmp_path):
    """Refused with what would help, unless they are cast to one; then all are, leaf by leaf."""
    other = save(tmp_path / "other", make_tree(1, embedding=jnp.ones((8, 4), jnp.float32)))
    error = refused([saved / "a", other])
    assert error.what.endswith("other: leaf embedding is float32[8,4], in a bfloat16[8,4]")
    assert "pool.dtype" in error.expected
    sources = survey([str(saved / "a"), str(other)], dtype="float16")
    loaded = pool.load(sources, make_mesh(fsdp=2, tensor=2), SHARDING_RULES, dtype="float16")
    assert {str(tree["embedding"].dtype) for tree in loaded.trees} == {"float16"}
    assert [record.dtype for record in loaded.records] == [
        "bfloat16,float32,int32",
        "float32,int32",
    ]


def test_no_cast_helps_where_more_is_different(saved, tmp_path):
    """So none is advised; integers are never cast."""
    for name, changes in (
        ("x", {"embedding": jnp.ones((9, 4))}),
        ("y", {"steps": jnp.arange(3.0)}),
    ):
        path = save(tmp_path / name, make_tree(1, **changes))
        assert "pool." not in refused([saved / "a", path]).expected
        with pytest.raises(JaxmergeError, match="can't be merged"):
            survey([str(saved / "a"), str(path)], dtype="float32")


# Run alone, with one CPU device: what the process needs at most while it loads a pool.
MEASURE = """
import gc, json, sys, threading, time
from pathlib import Path
import jax, jax.numpy as jnp
jax.config.update("jax_platforms", "cpu")
from jaxmerge.checkpoints import orbax, pool
from jaxmerge.checkpoints.survey import survey
from jaxmerge.sharding import make_mesh

directory, count, megabytes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
# Leaves of several sizes, the largest a third of the checkpoint.
parts = {"embedding": 0.33, "up": 0.25, "down": 0.25, "query": 0.1, "out": 0.07}

def tree(seed):
    keys = jax.random.split(jax.random.key(seed), len(parts))
    return {
        name: jax.random.normal(key, (int(part * megabytes * 2**20 / 4096), 1024))
        for key, (name, part) in zip(keys, parts.items())
    }

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

def loaded(number):
    sources = survey([str(directory / f"model{k:02}") for k in range(number)])
    return pool.load(sources, make_mesh(), ())

for k in range(count):
    orbax.save(directory / f"model{k:02}", tree(k))
loaded(2)  # all code is compiled and all libraries are loaded
gc.collect()
import ctypes
ctypes.CDLL("libc.so.6").malloc_trim(0)
baseline = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
start = time.monotonic()
trees = loaded(count).trees
seconds = time.monotonic() - start
size = sum(leaf.nbytes for leaf in jax.tree.leaves(trees))
print(json.dumps({
    "baseline": baseline, "peak": status("VmHWM"), "pool": size, "seconds": seconds,
}))
"""


@pytest.mark.slow
def test_peak_host_memory(tmp_path):
    """Loading 16 checkpoints of 200 MB takes no more than the pool and one checkpoint."""
    count, megabytes = 16, 200
    if available_memory() < 12 * 2**30 or shutil.disk_usage(tmp_path).free < 8 * 2**30:
        pytest.skip("a pool of 3.2 GB and its files: 12 GB of memory and 8 of disk, which CI has")
    command = [sys.executable, "-c", MEASURE, str(tmp_path), str(count), str(megabytes)]
    done = subprocess.run(command, capture_output=True, text=True)
    shutil.rmtree(tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    one = found["pool"] // count
    above = found["peak"] - found["baseline"] - found["pool"]
    print(
        f"pool {found['pool'] / 2**20:.0f} MiB, peak {found['peak'] / 2**20:.0f} MiB over a "
        f"baseline of {found['baseline'] / 2**20:.0f}: {above / 2**20:.0f} MiB besides the pool, "
        f"a checkpoint being {one / 2**20:.0f}; {found['seconds']:.1f} s"
    )
    assert above < one


@pytest.mark.parametrize(
    "tree",
    [
        {"a/b": jnp.ones((2, 2)), "c": {"d/e": jnp.zeros(3)}},
        {"a": {"x": jnp.ones(2)}, "a/b": jnp.zeros(3), "a/b/c": jnp.ones(4)},
    ],
    ids=("deep", "one begins with another"),
)
def test_keys_with_slashes(tmp_path, tree):
    """A leaf is found whichever of the slashes are parts of keys."""
    orbax.save(tmp_path / "m", tree)
    source = orbax.describe("m", orbax.absolute(tmp_path / "m"))
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for name, leaf in named_leaves(tree).items():
        np.testing.assert_array_equal(read_leaf(source, name, where), leaf)


@pytest.mark.parametrize("change", ["written", "replaced", "removed"])
def test_a_checkpoint_that_changes_while_it_is_loaded(saved, tmp_path, monkeypatch, change):
    """By its size, its time or its place on the disk, which a new file of its name has."""
    shutil.copytree(saved / "a", tmp_path / "a")
    shutil.copytree(saved / "b", tmp_path / "b")
    file, finish = next((tmp_path / "b").rglob("_METADATA")), pool.digest.finish

    def changed(computing: Any) -> Any:
        if file.exists() and len(computed) == 1:
            data = file.read_bytes()
            if change != "written":
                file.unlink()
            if change != "removed":
                file.write_bytes(data)
        computed.append(computing)
        return finish(computing)

    computed: list[Any] = []
    monkeypatch.setattr(pool.digest, "finish", changed)
    error = refused([tmp_path / "a", tmp_path / "b"])
    assert "written to while they were read" in error.what
    assert (error.where, error.found) == (str(tmp_path / "b"), str(file))
