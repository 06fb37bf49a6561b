"""Orbax checkpoints as trainers write them: which part is merged, and what is written back."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as v0
import pytest
from flax import nnx
from orbax.checkpoint import v1

from jaxmerge import config as configs
from jaxmerge.checkpoints import orbax, parameters, pool
from jaxmerge.checkpoints.survey import find, survey
from jaxmerge.errors import JaxmergeError
from jaxmerge.experiment.merge import merge
from jaxmerge.merge.linear import linear
from jaxmerge.sharding import make_mesh
from jaxmerge.trees import named_leaves

# Trainers restore without saying where, which Orbax warns of.
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")


def weights(seed: int) -> dict[str, Any]:
    """Parameters whose keys have slashes and digits, in two dtypes."""
    rng = np.random.default_rng(seed)
    return {
        "transformer/layer_0/attn": {"w": jnp.asarray(rng.normal(size=(4, 6)), jnp.bfloat16)},
        "transformer/layer_10/attn": {"w": jnp.asarray(rng.normal(size=(4, 6)), jnp.bfloat16)},
        "norm": {"scale": jnp.asarray(rng.normal(size=(5,)), jnp.float32)},
    }


def moments() -> dict[str, Any]:
    """What an optimiser keeps of the same parameters."""
    return {"mu": jax.tree.map(jnp.zeros_like, weights(0)), "count": jnp.int32(3)}


def save_step(path: Path, custom: Mapping[str, Any] | None = None, **items: Any) -> Path:
    """A step as a `CheckpointManager` of Orbax writes it."""
    with v0.CheckpointManager(path.parent) as manager:
        args: dict[str, Any] = {name: v0.args.PyTreeSave(tree) for name, tree in items.items()}
        args["iter"] = v0.args.JsonSave({"at": 1})
        manager.save(int(path.name), args=v0.args.Composite(**args), custom_metadata=custom)
        manager.wait_until_finished()
    return path


def save_flat(path: Path, tree: Any) -> Path:
    """A tree that lies in the directory itself."""
    with v0.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return path


def describe(path: Path, **where: str) -> Any:
    return orbax.describe(path.name, orbax.absolute(path), **where)


def merged(
    out: Path, *members: Path, weights: tuple[float, ...], storage: str = "orbax", **fields: str
) -> Path:
    """The merge of members by name, by `--mode=merge`."""
    config = configs.default()
    config.pool.checkpoints = tuple(map(str, members))
    config.merge.weights, config.export.formats = weights, (storage,)
    for name, value in fields.items():
        config.pool[name] = value
    (path,) = merge(config, str(out))
    return path


def assert_same(found: Any, expected: Any) -> None:
    """Equal structures, dtypes and bytes."""
    found, expected = jax.device_get(found), jax.device_get(expected)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


@pytest.mark.parametrize(
    ("items", "chosen"),
    [
        (["items"], "items"),
        (["opt_state", "params"], "params"),
        (["model_params", "optimizer_state"], "model_params"),
        (["aux", "model", "opt"], "model"),
        (["aux", "default"], None),
        (["alpha", "zeta"], None),
        (["model", "params"], None),
        (["opt_state"], None),
        (["optimizer_state", "optimiser"], None),
    ],
)
def test_the_item_that_is_clear(items, chosen):
    """And no other: never the first by the alphabet, and never an optimiser's state."""
    if chosen:
        assert parameters.item("a/3", items, lambda name: True) == chosen
        return
    with pytest.raises(JaxmergeError, match=r"pool\.item") as caught:
        parameters.item("a/3", items, lambda name: True)
    assert caught.value.found == ", ".join(items)


def test_several_items_in_a_step(tmp_path):
    """Named by the config, by the path, by the subtree, or clear by itself."""
    path = save_step(
        tmp_path / "3", params=weights(0), opt_state=moments(), aux={"ema": weights(1)}
    )
    parts = named_leaves(weights(0)).keys()
    for source in (
        describe(path),
        describe(path, item="params"),
        describe(path / "params"),
        describe(path, subtree="params"),
    ):
        assert (source.item, source.subtree) == ("params", "")
        assert named_leaves(source.abstract).keys() == parts
        (tree,) = pool.load([source], make_mesh(), ()).trees
        assert_same(tree, weights(0))
    other = describe(path, item="aux", subtree="ema")
    assert_same(pool.load([other], make_mesh(), ()).trees[0], weights(1))
    for where in ({"item": "parms"}, {"item": "iter"}):
        with pytest.raises(JaxmergeError, match="no item") as caught:
            describe(path, **where)
        assert caught.value.found == "aux, opt_state, params"
    with pytest.raises(JaxmergeError, match="no item 'aux'"):
        describe(path / "params", item="aux")


@pytest.mark.parametrize(
    ("tree", "path"),
    [
        ({"params": {"w": 1}, "opt_state": {}, "step": 1}, "params"),
        ({"params": {"params": {"w": 1}}, "opt_state": {}, "step": 1}, "params/params"),
        ({"params": {"params": {"w": 1}}}, "params/params"),
        ({"params": {"w": 1}, "batch_stats": {"mean": 1}}, ""),
        ({"params": {"w": 1}}, ""),
        ({"decoder": {"w": 1}}, ""),
        ({"weights": {"w": 1}, "opt_state": {}}, None),
        ({"model": {"w": 1}, "params": {"w": 1}, "optimizer": {}}, None),
    ],
)
def test_where_in_a_training_state_the_parameters_are(tree, path):
    if path is not None:
        assert parameters.subtree("a/3", tree) == path
        return
    with pytest.raises(JaxmergeError, match=r"pool\.subtree"):
        parameters.subtree("a/3", tree)


def test_written_back_as_it_came(tmp_path):
    """A step: item, keys above the parameters and the metadata of others, one-hot bit for bit."""
    custom = {"scan_layers": True}
    steps = [
        save_step(
            tmp_path / "run" / str(step),
            custom,
            items={"params": {"params": weights(step)}, "opt_state": moments(), "step": step},
        )
        for step in (1, 2)
    ]
    path = merged(tmp_path / "out", *(step / "items" for step in steps), weights=(0.0, 1.0))
    shutil.copytree(path, tmp_path / "new" / "0")  # the place of a step
    with v0.CheckpointManager(tmp_path / "new") as manager:
        found = manager.restore(0, args=v0.args.Composite(items=v0.args.PyTreeRestore()))
    assert_same(found["items"], {"params": {"params": weights(2)}})
    again = describe(path)
    assert (again.item, again.subtree, dict(again.custom)) == ("items", "params/params", custom)
    assert set(again.checksums) == set(named_leaves(weights(0)))
    survey([str(steps[0]), str(path)])  # alike


def test_what_is_beside_the_parameters_is_named(tmp_path, capsys):
    """Kauldron's running means: a merge without them would start from those of a new model."""
    stats = {"batch_stats": {"norm": {"mean": jnp.ones(3)}}}
    rest = {"opt_state": moments(), "step": jnp.int32(4)}
    for step, collections in (("1", stats), ("2", stats), ("3", {}), ("4", {})):
        state = {"params": weights(int(step)), "collections": collections, **rest}
        save_step(tmp_path / step, default=state)
    said = "jaxmerge: collections: beside params in the checkpoints, and not merged"
    merged(tmp_path / "with", tmp_path / "1", tmp_path / "2", weights=(0.5, 0.5))
    assert said in capsys.readouterr().err
    merged(tmp_path / "without", tmp_path / "3", tmp_path / "4", weights=(0.5, 0.5))
    assert "beside" not in capsys.readouterr().err
    members = (tmp_path / "1", tmp_path / "2")
    path = merged(tmp_path / "alone", *members, weights=(0.5, 0.5), subtree="collections")
    assert "beside" not in capsys.readouterr().err
    assert_same(v1.load(str(path), checkpointable_name="default"), {"collections": stats})


def test_steps_of_a_run_by_a_schedule(tmp_path, capsys):
    """The steps that are named alone, in the order of their numbers, oldest first."""
    for step in (500, 1000, 1500, 2000):
        save_step(tmp_path / "run" / str(step), items={"params": {"params": weights(step)}})
    config = configs.default()
    config.pool.checkpoints, config.pool.steps = (str(tmp_path / "run"),), "500:1500:500"
    config.merge.schedule, config.export.formats = "sqrt", ("orbax",)
    (path,) = merge(config, str(tmp_path / "out"))
    assert "steps 500:1500:500 of one run. Weights are those of" in capsys.readouterr().err
    said = json.loads((tmp_path / "out" / "pool.json").read_text())["checkpoints"]
    assert [each["name"] for each in said] == ["500", "1000", "1500"]
    (found,) = pool.load([describe(path)], make_mesh(), ()).trees
    expected = linear(
        [weights(step) for step in (500, 1000, 1500)],
        np.array([3**-0.5, (2 / 3) ** 0.5 - 3**-0.5, 1 - (2 / 3) ** 0.5], np.float32),
    )
    assert_same(found, expected)
    config.merge.weights = (0.5, 0.25, 0.25)
    with pytest.raises(JaxmergeError, match=r"merge\.weights"):
        merge(config, str(tmp_path / "other"))


def test_written_back_flat(tmp_path):
    """What has no items has none afterwards, nor does it need the mark that newer ones bear."""
    members = [save_flat(tmp_path / f"m{seed}", weights(seed)) for seed in (1, 2)]
    (members[0] / "_CHECKPOINT_METADATA").unlink()
    path = merged(tmp_path / "out", *members, weights=(1.0, 0.0))
    with v0.StandardCheckpointer() as checkpointer:
        assert_same(checkpointer.restore(path), weights(1))
    assert describe(path).checksums.keys() == named_leaves(weights(1)).keys()


@pytest.mark.parametrize("residency", ["device", "disk"])
def test_keys_with_slashes(tmp_path, residency):
    """As Google's Gemma has them: read whole, and leaf by leaf."""
    members = [save_flat(tmp_path / f"m{seed}", weights(seed)) for seed in (1, 2)]
    loaded = pool.load(survey(list(map(str, members))), make_mesh(), (), residency=residency)
    leaf = loaded.merged([0.0, 1.0])
    for name, expected in named_leaves(weights(2)).items():
        assert_same(leaf(name), expected)


def test_a_counter_of_64_bits_is_kept(tmp_path):
    count = np.int64(2**40 + 5)
    paths = [save_flat(tmp_path / name, {**weights(0), "step": count}) for name in "ab"]
    with v0.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(merged(tmp_path / "out", *paths, weights=(0.5, 0.5)))
    assert found["step"] == count


def test_parameters_of_64_bits_are_refused(tmp_path):
    wide = {"w": np.ones(2), "b": np.ones(2, np.float32)}
    with pytest.raises(JaxmergeError, match="leaf w: the array is of a type that"):
        describe(save_flat(tmp_path / "theirs", wide))
    with pytest.raises(JaxmergeError, match="leaf w: the array is of a type that"):
        orbax.save(tmp_path / "ours", wide)
    assert not (tmp_path / "ours").exists()


def test_names_that_collide_are_refused(tmp_path):
    tree = {"a/b": {"c": jnp.ones(2)}, "a": {"b/c": jnp.zeros(2)}}
    with pytest.raises(JaxmergeError, match="same name"):
        describe(save_flat(tmp_path / "m", tree))


class _Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(2, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(3, 3, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)])


@pytest.mark.parametrize("pure", [False, True], ids=["state", "pure dict"])
def test_an_nnx_model_with_generators(tmp_path, pure):
    """Generators and counts are the first's, the rest is merged, and the model goes on from it."""
    models = [_Net(nnx.Rngs(seed)) for seed in (1, 2)]
    models[1].dropout(jnp.ones(4))  # counts on
    members = []
    for seed, model in enumerate(models):
        state: Any = nnx.split(model)[1]
        members.append(save_flat(tmp_path / f"m{seed}", nnx.to_pure_dict(state) if pure else state))
    path = merged(tmp_path / "out", *members, weights=(0.0, 1.0))
    fresh: Any = nnx.split(_Net(nnx.Rngs(3)))[1]
    with v0.StandardCheckpointer() as checkpointer:
        found: Any = checkpointer.restore(path, nnx.to_pure_dict(fresh) if pure else fresh)

    def values(state: Any) -> dict[str, np.ndarray]:
        plain = state if isinstance(state, dict) else nnx.to_pure_dict(state)
        return {
            name: np.asarray(
                jax.random.key_data(leaf)
                if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
                else leaf
            )
            for name, leaf in named_leaves(plain).items()
        }

    first, second = (values(nnx.split(model)[1]) for model in models)
    random = {name for name in first if "rngs" in name}
    assert len(random) >= 4
    assert not np.array_equal(first["dropout/rngs/count"], second["dropout/rngs/count"])
    for name, value in values(found).items():
        np.testing.assert_array_equal(value, (first if name in random else second)[name])


def test_what_is_carried_over():
    """By name and type: a mask of the same type is compared, and so is a step that was merged."""
    tree = {
        "rngs": {"key": jnp.zeros(2, jnp.uint32), "noise": jnp.zeros(2)},
        "blocks": [{"dropout_rng": jnp.zeros(2, jnp.uint32)}, {"w": jnp.zeros(2)}],
        "step": {"value": jnp.int32(1)},
        "steps": jnp.zeros(2, jnp.int32),
        "mask": jnp.zeros(2, jnp.uint32),
        "typed": jax.random.key(0),
    }
    tree = jax.eval_shape(lambda: tree)
    merged, carried = parameters.split(tree, {})
    assert set(named_leaves(carried)) == {
        *("rngs/key", "blocks/0/dropout_rng", "step/value", "typed"),
    }
    assert set(named_leaves(merged)) == {"rngs/noise", "blocks/1/w", "steps", "mask"}
    assert jax.tree.structure(parameters.joined(merged, carried)) == jax.tree.structure(tree)
    assert "step/value" in named_leaves(parameters.split(tree, {"step/value": ""})[0])


def test_patterns_anywhere_and_steps_in_order(tmp_path):
    for run in ("a", "b"):
        for step in (1000, 200):
            orbax.save(tmp_path / run / "checkpoints" / str(step), {"w": jnp.ones(2)})
        (tmp_path / run / "checkpoints" / "5").mkdir()
    found = [source.name for source in find([f"{tmp_path}/*/checkpoints/*"])]
    assert found == [f"{run}/checkpoints/{step}" for run in "ab" for step in (200, 1000)]
    assert [each.name for each in find([f"{tmp_path}/*/checkpoints/200"])] == [
        *("a/checkpoints/200", "b/checkpoints/200")
    ]
    with pytest.raises(JaxmergeError, match="no checkpoint here"):
        find([f"{tmp_path}/*/checkpoints/5"])
    with pytest.raises(JaxmergeError, match=r"the ones in here are '.*/checkpoints/\*'"):
        find([f"{tmp_path}/a/checkpoints"])


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize(
    "storage", [{"use_zarr3": True}, {"use_zarr3": False}, {"use_ocdbt": False}], ids=str
)
def test_all_storages(tmp_path, storage, marked):
    """zarr 2 and 3, in one database or a directory each, with newer Orbax's mark or without."""
    path = tmp_path / "step" / "state"
    with v0.Checkpointer(v0.PyTreeCheckpointHandler(**storage)) as checkpointer:
        checkpointer.save(path, args=v0.args.PyTreeSave(weights(3)))
    if not marked:
        (path / "_CHECKPOINT_METADATA").unlink()
        assert_same(pool.load([describe(path.parent)], make_mesh(), ()).trees[0], weights(3))
    assert_same(pool.load([describe(path)], make_mesh(), ()).trees[0], weights(3))


def test_what_v1_writes(tmp_path):
    """Items of its own making, one of them without an array."""
    path = tmp_path / "7"
    items = {"model_params": weights(0), "optimizer_state": moments(), "about": {"step": 7}}
    v1.save_checkpointables(path, items)
    source = describe(path)
    assert source.item == "model_params"
    assert_same(pool.load([source], make_mesh(), ()).trees[0], weights(0))
