"""Directories of zarr arrays, as Levanter and EasyDeL write them with JAX's own serialisation."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.array_serialization import serialization

from jaxmerge import config as configs
from jaxmerge.checkpoints import pool, zarr
from jaxmerge.checkpoints.orbax import absolute
from jaxmerge.checkpoints.survey import survey
from jaxmerge.errors import JaxmergeError
from jaxmerge.experiment.merge import merge
from jaxmerge.sharding import make_mesh
from jaxmerge.trees import named_leaves
from tests.checkpoints.npz_test import assert_same


def weights(seed: int) -> dict[str, Any]:
    """Parameters in two dtypes, one of them zeros, one without an axis."""
    rng = np.random.default_rng(seed)
    return {
        "transformer/layers/stacked/mlp/up_proj/weight": jnp.asarray(rng.normal(size=(2, 4, 6))),
        "transformer/norm/weight": jnp.asarray(rng.normal(size=5), jnp.bfloat16),
        "transformer/norm/bias": jnp.zeros(5),
        "scale": jnp.float32(seed),
    }


def state(seed: int) -> dict[str, Any]:
    """What a trainer writes: beside the model an optimiser's state, a step and a key."""
    model = {f"model/{name}": leaf for name, leaf in weights(seed).items()}
    rest = {"opt_state/0/mu/scale": jnp.ones(3), "step": jnp.int32(seed)}
    return model | rest | {"training_key": jnp.zeros(2, jnp.uint32)}


def levanter(path: Path, seed: int, *, database: bool = True) -> Path:
    """A step of Levanter: in one OCDBT database, or as older versions wrote it."""
    leaves, manager = state(seed), serialization.GlobalAsyncCheckpointManager()
    for name in leaves if not database else ():
        (path / name).mkdir(parents=True)
    path.mkdir(exist_ok=True)
    base = {"driver": "file", "path": str(path)}
    specs = [
        {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": base, "path": name}}
        if database
        else {"driver": "zarr", "kvstore": {"driver": "file", "path": str(path / name)}}
        for name in leaves
    ]
    manager.serialize([*leaves.values()], specs, on_commit_callback=lambda: None)
    manager.wait_until_finished()
    said = {"step": seed, "timestamp": "2026-01-01T00:00:00", "is_temporary": True}
    (path / "metadata.json").write_text(json.dumps(said))
    if database:  # older versions wrote none
        of = {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in leaves.items()}
        keys = ("path", "shape", "dtype", "chunk_shape")
        arrays = [dict(zip(keys, (name, *each, each[0]))) for name, each in of.items()]
        said = {"format_version": 1, "array_driver": "zarr3", "kvstore_driver": "ocdbt"}
        (path / "manifest.json").write_text(json.dumps({**said, "arrays": arrays}))
    return path


def easydel(path: Path, seed: int) -> Path:
    """A training state of EasyDeL: the same in directories, with an index, and what is in it."""
    levanter(path, seed, database=False)
    said = {"step": seed, "is_temporary": False, "has_optimizer_state": True}
    (path / "metadata.json").write_text(json.dumps(said))
    (path / "tx_structure.json").write_text('{"format": "pytree-structure", "prefix": "tx"}')
    entries: dict[str, Any] = {}
    for name, leaf in state(seed).items():
        entry = {"path": name, "shape": list(leaf.shape), "dtype": str(leaf.dtype)}
        entries.setdefault(name.split("/")[0], []).append(entry)
    index = {"format": "tensorstore", "version": "0.0.101", "prefixes": entries}
    (path / "tensorstore_index.json").write_text(json.dumps(index))
    return path


def restored(path: Path) -> dict[str, Any]:
    """A merge as the trainers read it, with JAX's own deserialisation."""
    names = [f"model/{name}" for name in weights(0)]
    base = {"driver": "file", "path": str(path)}
    if (path / "manifest.ocdbt").exists():
        base, driver = {"driver": "ocdbt", "base": base, "path": ""}, "zarr3"
    else:
        base, driver = {**base, "path": f"{path}/"}, "zarr"
    specs = [{"driver": driver, "kvstore": {**base, "path": base["path"] + n}} for n in names]
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    manager = serialization.GlobalAsyncCheckpointManager()
    found = manager.deserialize([here] * len(names), specs)
    return {name.removeprefix("model/"): leaf for name, leaf in zip(names, found)}


@pytest.mark.parametrize("kind", ["levanter", "levanter before", "easydel"])
def test_merged_by_name_and_written_as_it_came(tmp_path, kind):
    """The model alone, in the same storage, one-hot the member bit for bit."""
    for seed in (1, 2):
        path = tmp_path / f"step-{seed}"
        if kind == "easydel":
            easydel(path, seed)
        else:
            levanter(path, seed, database=kind == "levanter")
    sources = survey([str(tmp_path / "step-*")])
    assert [(each.name, each.format, each.subtree) for each in sources] == [
        *(("step-1", "zarr", "model"), ("step-2", "zarr", "model"))
    ]
    mesh = make_mesh(fsdp=2)
    loaded = pool.load(sources, mesh, (("up_proj", (None, "fsdp")),), residency="disk")
    leaf = loaded.merged([1.0, 0.0])
    expected = {name: np.asarray(each) for name, each in weights(1).items()}
    assert_same({name: leaf(name) for name in named_leaves(sources[0].abstract)}, expected)
    config = configs.default()
    config.pool.checkpoints = (str(tmp_path / "step-*"),)
    config.merge.weights, config.export.formats = (0.0, 1.0), ("zarr",)
    (path,) = merge(config, str(tmp_path / "out"))
    assert_same(restored(path), {name: np.asarray(each) for name, each in weights(2).items()})
    assert (path / "manifest.ocdbt").exists() == (kind == "levanter")
    if kind == "easydel":
        index = json.loads((path / "tensorstore_index.json").read_text())
        assert {name: len(entries) for name, entries in index["prefixes"].items()} == {"model": 4}
        # EasyDeL looks for an optimiser's state where these say that there is one.
        said = {"step": 1, "is_temporary": False, "has_optimizer_state": False}
        assert json.loads((path / "metadata.json").read_text()) == said
        assert not (path / "tx_structure.json").exists()
    else:
        said = {"step": 1, "timestamp": "2026-01-01T00:00:00", "is_temporary": False}
        assert json.loads((path / "metadata.json").read_text()) == said
    if kind == "levanter":  # which opens all that its manifest has
        before, after = (
            json.loads((of / "manifest.json").read_text()) for of in (tmp_path / "step-1", path)
        )
        model = [each for each in before["arrays"] if each["path"].startswith("model/")]
        assert after == {**before, "arrays": sorted(model, key=lambda each: each["path"])}
    survey([str(path), str(tmp_path / "step-1")])  # alike


def test_what_can_not_be_read(tmp_path):
    path = levanter(tmp_path / "step-1", 1, database=False)
    source = zarr.describe("m", absolute(path))
    with pytest.raises(JaxmergeError, match="is an array"):
        zarr.describe("m", absolute(path), "model/scale")
    (path / "model" / "scale" / ".zarray").write_text("{")
    with pytest.raises(JaxmergeError, match="model/scale: this can't be read"):
        zarr.describe("m", absolute(path))
    with pytest.raises(JaxmergeError, match="model/scale: this can't be read"):
        zarr.restore(source, source.abstract)
    assert not zarr.recognises(absolute(tmp_path))
