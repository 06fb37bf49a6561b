"""Merges from file to file: bits, blocks, several at once, and what is refused."""

import json
import os
import runpy
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmerge import config as configs
from jaxmerge.checkpoints import digest, pool
from jaxmerge.checkpoints.survey import survey
from jaxmerge.errors import JaxmergeError
from jaxmerge.experiment import merge as merging
from jaxmerge.experiment.merge import merge
from jaxmerge.merge.linear import linear
from jaxmerge.sharding import make_mesh
from jaxmerge.streaming import files, pipeline

WEIGHTS = (0.3, -0.2, 0.9)
BF16 = np.dtype(ml_dtypes.bfloat16)
# More than a block of the smallest size, one of odd width, one value, none, and a vector.
SHAPES = {"wide": (70, 128), "odd": (61, 143), "one": (1,), "scalar": (), "none": (0, 4), "v": (9,)}


def make(directory: Path, count: int = 3, dtypes: Any = "bfloat16") -> Path:
    """Models of a type that no decoder is for; `dtypes` is one, or one per checkpoint."""
    for k in range(count):
        rng = np.random.default_rng(k)
        dtype = np.dtype(dtypes if isinstance(dtypes, str) else dtypes[k])
        tensors = {
            name: (rng.normal(size=shape) * 2.0 ** rng.integers(-9, 9, shape)).astype(dtype)
            for name, shape in SHAPES.items()
        }
        save(directory / f"m{k}", {**tensors, "counts": np.arange(5, dtype=np.int32)})
    return directory


def save(path: Path, tensors: dict[str, np.ndarray]) -> None:
    path.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    save_file(arrays, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps({"model_type": "unheard of"}))


def config_of(directory: Path, weights: Any = WEIGHTS, **export: Any) -> Any:
    config = configs.default()
    config.pool.checkpoints = (f"{directory}/*",)
    config.merge.weights = weights
    config.export.update({"formats": ("huggingface",), **export})
    config.compilation_cache = ""
    return config


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    """The tensors in all files of a directory."""
    files = sorted(path.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def reference(
    directory: Path, weights: Any, *, merged: Any = None, written: Any = None
) -> dict[str, np.ndarray]:
    """One product and one sum after the other in float32, rounded to nearest even at the end."""
    checkpoints = [tensors_of(path) for path in sorted(directory.iterdir())]
    found = {}
    for name, first in checkpoints[0].items():
        if first.dtype == np.int32:
            found[name] = first
            continue
        total = np.full(first.shape, -0.0, np.float32)
        for tensors, weight in zip(checkpoints, weights):
            value = tensors[name].astype(merged or first.dtype).astype(np.float32)
            total = np.add(total, np.multiply(np.float32(weight), value))
        rounded = np.asarray(total).astype(merged or first.dtype)
        found[name] = rounded.astype(written or rounded.dtype)
    return found


def assert_bits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        assert tensor.shape == expected[name].shape, name
        assert tensor.tobytes() == expected[name].tobytes(), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_bit(tmp_path, dtype):
    models = make(tmp_path / "models", dtypes=dtype)
    (path,) = merge(config_of(models), str(tmp_path / "run"))
    assert_bits(tensors_of(path), reference(models, WEIGHTS))


def test_steps_of_a_run_by_a_schedule(tmp_path):
    """As the trainer of transformers names them: step 1000 comes after step 500."""
    models = make(tmp_path / "models")
    for model, step in zip(sorted(models.iterdir()), (1000, 500, 1500)):
        model.rename(models / f"checkpoint-{step}")
    config = config_of(models, ())
    config.pool.checkpoints, config.pool.steps = (str(models),), "500:1500:500"
    config.merge.schedule = "sqrt"
    (path,) = merge(config, str(tmp_path / "run"))
    oldest, middle, newest = 3**-0.5, (2 / 3) ** 0.5 - 3**-0.5, 1 - (2 / 3) ** 0.5
    # Sorted by name, as the reference takes them, and so does not add them up in this order.
    expected = reference(models, (middle, newest, oldest), merged=np.dtype("float32"))
    for name, tensor in tensors_of(path).items():
        np.testing.assert_allclose(
            tensor.astype(np.float32), expected[name].astype(np.float32), rtol=2**-7, err_msg=name
        )
    card = (path / "README.md").read_text()
    assert "steps 500:1500:500 of one run" in card
    assert [line.split()[1] for line in card.splitlines() if line.startswith("| checkpoint-")] == [
        *("checkpoint-500", "checkpoint-1000", "checkpoint-1500")
    ]


@pytest.mark.parametrize(
    ("merged", "written"),
    [
        ("bfloat16", ""),
        ("float32", ""),
        ("float32", "bfloat16"),
        ("bfloat16", "float32"),
        ("float16", "bfloat16"),
    ],
)
def test_every_bit_of_mixed_types(tmp_path, merged, written):
    """What is stored as one type, merged as another and written as a third is rounded each time."""
    models = make(tmp_path / "models", dtypes=("float32", "bfloat16", "float16"))
    config = config_of(models, dtype=written)
    config.pool.dtype = merged
    (path,) = merge(config, str(tmp_path / "run"))
    expected = reference(
        models, WEIGHTS, merged=np.dtype(merged), written=np.dtype(written or merged)
    )
    assert_bits(tensors_of(path), expected)


def test_the_merge_in_memory_has_the_same_bits(tmp_path):
    models = make(tmp_path / "models")
    (path,) = merge(config_of(models), str(tmp_path / "run"))
    trees = [tensors_of(each) for each in sorted(models.iterdir())]
    found = linear(trees, np.array(WEIGHTS, np.float32))
    assert_bits({name: np.asarray(leaf) for name, leaf in found.items()}, tensors_of(path))


def test_blocks_smaller_than_a_tensor(tmp_path, monkeypatch):
    """The least memory that suffices gives the same files as plenty; too little is refused."""
    models = make(tmp_path / "models", dtypes=("float32", "bfloat16", "bfloat16"))
    config = config_of(models)
    config.pool.dtype = "bfloat16"
    (whole,) = merge(config, str(tmp_path / "whole"))
    config.merge.memory_bytes = 1
    with pytest.raises(JaxmergeError, match="memory does not suffice") as caught:
        merge(config, str(tmp_path / "refused"))
    assert caught.value.where == "merge.memory_bytes"
    least = int(caught.value.expected.removeprefix("at least "))
    sizes = set()
    merged = pipeline.Block.merge
    monkeypatch.setattr(
        pipeline.Block,
        "merge",
        lambda block, *args: (sizes.add(block.size), merged(block, *args))[1],
    )
    config.merge.memory_bytes = least
    (blocks,) = merge(config, str(tmp_path / "blocks"))
    assert max(sizes) < np.prod(SHAPES["wide"])
    name = "model.safetensors"
    assert (blocks / name).read_bytes() == (whole / name).read_bytes()


def test_several_merges_in_one_pass(tmp_path):
    models = make(tmp_path / "models")
    rows = (WEIGHTS, (1.0, 0.0, 0.0), (0.5, 0.5, 0.0))
    config = config_of(models, rows)
    config.merge.names = ("mine", "first", "half")
    paths = merge(config, str(tmp_path / "run"), "the command")
    assert [path.parent.name for path in paths] == ["mine", "first", "half"]
    for path, weights in zip(paths, rows):
        assert_bits(tensors_of(path), reference(models, weights))
        assert f"| m0 | {weights[0]:.6g} |" in (path / "README.md").read_text()


def test_several_merges_without_names(tmp_path):
    models = make(tmp_path / "models")
    paths = merge(config_of(models, (WEIGHTS, WEIGHTS)), str(tmp_path / "run"))
    assert [path.parent.name for path in paths] == ["0", "1"]


@pytest.mark.parametrize("names", [("a",), ("a", "a"), ("a", "../b"), ("a", "")])
def test_names_of_several_merges(tmp_path, names):
    config = config_of(make(tmp_path / "models"), (WEIGHTS, WEIGHTS))
    config.merge.names = names
    with pytest.raises(JaxmergeError, match="one name per merge"):
        merge(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("weights", [(), (0.5,), (WEIGHTS, (1.0,)), (WEIGHTS, 1.0, 2.0)])
def test_weights_that_do_not_fit(tmp_path, weights):
    with pytest.raises(JaxmergeError, match="one weight per checkpoint"):
        merge(config_of(make(tmp_path / "models"), weights), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_weights_are_finite(tmp_path):
    with pytest.raises(JaxmergeError, match="finite numbers"):
        merge(config_of(make(tmp_path / "models"), (0.5, float("nan"), 0.5)), str(tmp_path / "run"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_one_hot_weights_return_the_checkpoint(tmp_path, dtype):
    """Negative zero and subnormal values included, in every place of a block."""
    models = make(tmp_path / "models", dtypes=dtype)
    tensors = tensors_of(models / "m1")
    unsigned = {2: np.uint16, 4: np.uint32}[np.dtype(dtype).itemsize]
    tensors["wide"].view(unsigned)[:, ::2] = np.arange(64)  # the smallest numbers that there are
    tensors["wide"].view(unsigned)[:, 1] = 1 << (8 * np.dtype(dtype).itemsize - 1)
    save(models / "m1", tensors)
    (path,) = merge(config_of(models, (0.0, 1.0, 0.0)), str(tmp_path / "run"))
    assert_bits(tensors_of(path), tensors)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(("leaf", "place"), [("wide", 8959), ("odd", 0), ("scalar", 0)])
def test_values_that_are_not_finite(tmp_path, value, leaf, place):
    models = make(tmp_path / "models")
    tensors = tensors_of(models / "m2")
    tensors[leaf].reshape(-1)[place : place + 1] = value
    save(models / "m2", tensors)
    with pytest.raises(JaxmergeError, match=f"NaN or infinite values, in leaf {leaf}") as caught:
        merge(config_of(models), str(tmp_path / "run"))
    assert caught.value.where.endswith("m2")
    assert not (tmp_path / "run" / "merged" / "huggingface").exists()


def test_values_too_large_for_the_type(tmp_path):
    models = make(tmp_path / "models", dtypes="float32")
    tensors = tensors_of(models / "m0")
    tensors["v"][3] = 1e6
    save(models / "m0", tensors)
    with pytest.raises(JaxmergeError, match="leaf v has values that are too large for float16"):
        merge(config_of(models, dtype="float16"), str(tmp_path / "run"))


def test_integers_that_differ(tmp_path):
    models = make(tmp_path / "models")
    tensors = tensors_of(models / "m1")
    save(models / "m1", {**tensors, "counts": tensors["counts"] + 1})
    with pytest.raises(JaxmergeError, match="leaf counts is not floating point and differs"):
        merge(config_of(models), str(tmp_path / "run"))
    assert not (tmp_path / "run" / "merged" / "huggingface").exists()


def test_a_file_that_is_cut_short_while_it_is_merged(tmp_path, monkeypatch):
    models = make(tmp_path / "models")
    begin = pipeline.Pipeline.merge

    def cut(*args: Any) -> Any:
        with open(models / "m1" / "model.safetensors", "r+b") as stream:
            stream.truncate(2000)
        return begin(*args)

    monkeypatch.setattr(pipeline.Pipeline, "merge", cut)
    with pytest.raises(JaxmergeError, match="cut short") as caught:
        merge(config_of(models), str(tmp_path / "run"))
    assert "m1" in caught.value.where


def test_fingerprints_are_those_of_the_tensors(tmp_path):
    """As the checksum of each tensor, digested whole."""
    models = make(tmp_path / "models")
    merge(config_of(models), str(tmp_path / "run"))
    records = json.loads((tmp_path / "run" / "pool.json").read_text())["checkpoints"]
    for path, record in zip(sorted(models.iterdir()), records):
        tensors = tensors_of(path)
        assert record["fingerprint"] == digest.fingerprint(tensors, digest.digests(tensors))
        assert record["parameters"] == sum(tensor.size for tensor in tensors.values())


def test_checksums_of_the_merge_are_recorded(tmp_path):
    models = make(tmp_path / "models")
    (path,) = merge(config_of(models), str(tmp_path / "run"))
    files = json.loads((tmp_path / "run" / "merge.json").read_text())["files"]
    entry = files["model.safetensors"]
    assert entry["bytes"] == (path / "model.safetensors").stat().st_size
    expected = digest.digests({k: jnp.asarray(v) for k, v in tensors_of(path).items()})
    assert entry["outputs"]["0"] == {name: each.checksum for name, each in expected.items()}


def test_progress_counts_all_bytes(tmp_path, monkeypatch):
    counted, totals = [], []

    class Bar:
        def __init__(self, total: int, **_: Any):
            totals.append(total)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def update(self, count: int) -> None:
            counted.append(count)

    monkeypatch.setattr(merging, "tqdm", Bar)
    models = make(tmp_path / "models")
    merge(config_of(models), str(tmp_path / "run"))
    stored = [tensor.nbytes for path in models.iterdir() for tensor in tensors_of(path).values()]
    assert totals == [sum(stored)] == [sum(counted)]


def test_buffers_that_mean_nothing_are_left_out(tmp_path):
    models = make(tmp_path / "models")
    buffer = "layers.0.rotary_emb.inv_freq"
    for path in models.iterdir():
        save(path, {**tensors_of(path), buffer: np.ones(4, np.float32)})
    (path,) = merge(config_of(models), str(tmp_path / "run"))
    assert tensors_of(path).keys() == {*SHAPES, "counts"}


def test_a_directory_of_a_search_is_not_merged_into(tmp_path):
    models = make(tmp_path / "models")
    config = config_of(models)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(configs.plain(config)))
    with pytest.raises(JaxmergeError, match="made with another config") as caught:
        merge(config, str(run))
    assert "mode" in str(caught.value)


def test_formats_tell_blocks_from_leaves(tmp_path):
    """Orbax is written leaf by leaf, with the same values as the blocks."""
    models = make(tmp_path / "models")
    for path in models.iterdir():
        tensors = tensors_of(path)
        del tensors["none"]  # Orbax does not save leaves without values
        save(path, tensors)
    config = config_of(models)
    config.export.formats = ("orbax", "huggingface")
    paths = merge(config, str(tmp_path / "run"))
    assert [path.name for path in paths] == ["orbax", "huggingface"]
    shutil.copytree(paths[0], tmp_path / "pair" / "a")
    shutil.copytree(paths[0], tmp_path / "pair" / "b")
    loaded = pool.load(survey([f"{tmp_path}/pair/*"]), make_mesh(), ())
    found = {name: np.asarray(leaf) for name, leaf in loaded.trees[0].items()}
    assert_bits(found, tensors_of(paths[1]))


def test_without_the_calls_that_macos_lacks(tmp_path, monkeypatch):
    for name in ("sched_getaffinity", "posix_fadvise", "POSIX_FADV_SEQUENTIAL"):
        monkeypatch.delattr(os, name, raising=False)
    assert runpy.run_path(pipeline.__file__)["WORKERS"] == min(os.cpu_count() or 1, 16)
    for name in ("posix_fallocate", "fdatasync"):
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr(files, "_SYNC", runpy.run_path(files.__file__)["_SYNC"])
    models = make(tmp_path / "models")
    (path,) = merge(config_of(models), str(tmp_path / "run"))
    assert_bits(tensors_of(path), reference(models, WEIGHTS))
