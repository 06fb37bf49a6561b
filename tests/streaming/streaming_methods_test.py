"""Merges by other methods than the weighted sum, from checkpoints to a checkpoint."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxmerge import config as configs
from jaxmerge.checkpoints import orbax
from jaxmerge.checkpoints.stream import LeafStream
from jaxmerge.checkpoints.survey import find
from jaxmerge.errors import JaxmergeError
from jaxmerge.experiment import methods
from jaxmerge.experiment.merge import merge
from jaxmerge.merge.methods import merge_tensor
from jaxmerge.streaming import recipes
from jaxmerge.trees import named_leaves
from tests.streaming.streaming_test import BF16, config_of, save, tensors_of


def make(directory, count=3):
    """Fine-tunes of one base, in bfloat16."""
    rng = np.random.default_rng(0)
    base = {"w": rng.normal(size=(12, 16)), "v": rng.normal(size=(12, 16))}
    save(directory / "base", {name: x.astype(BF16) for name, x in base.items()} | COUNTS)
    for k in range(count):
        tuned = {name: x + 0.1 * rng.normal(size=x.shape) for name, x in base.items()}
        save(directory / "pool" / f"m{k}", {n: x.astype(BF16) for n, x in tuned.items()} | COUNTS)
    return directory


LLAMA = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
COUNTS = {"counts": np.arange(5, dtype=np.int32)}


def config_by(directory, method, weights=(), **genes):
    config = config_of(directory / "pool", weights)
    config.pool.base = str(directory / "base")
    config.merge.method = method
    config.merge.genes.update(genes)
    return config


@pytest.mark.parametrize("variant", ["paper", "mergekit"])
def test_streamed_is_what_is_merged_in_memory(tmp_path, variant):
    """By names and seed: draws too. Integers are copied."""
    make(tmp_path)
    config = config_by(tmp_path, "dare_ties", (0.5, 0.3, 0.4), density=(0.5, 0.6, 0.7))
    config.merge.variant, config.seed = variant, 3
    (written,) = merge(config, str(tmp_path / "run"), "the command")
    checkpoints = [tensors_of(tmp_path / "pool" / f"m{k}") for k in range(3)]
    base, found = tensors_of(tmp_path / "base"), tensors_of(written)
    for name in ("v", "w"):
        genes = {"weight": (0.5, 0.3, 0.4), "density": (0.5, 0.6, 0.7)}
        expected = merge_tensor(
            "dare_ties",
            [each[name] for each in checkpoints],
            base[name],
            genes,
            name=name,
            seed=3,
            variant=variant,
        )
        np.testing.assert_array_equal(found[name], expected)
    np.testing.assert_array_equal(found["counts"], base["counts"])
    card = (written / "README.md").read_text()
    assert "dare_ties" in card
    assert "| base | base |" in card
    assert "density (0.5, 0.6, 0.7)" in card


@pytest.mark.parametrize("wanted", [("huggingface",), ("orbax", "huggingface")])
def test_models_that_have_a_decoder(tmp_path, wanted):
    """Tensor by tensor, or leaf by leaf where Orbax is wanted too; and again, when it is there."""
    shape = transformers.LlamaConfig.from_dict(LLAMA)
    for k, path in enumerate(("base", "pool/a", "pool/b")):
        torch.manual_seed(k)
        transformers.LlamaForCausalLM(shape).save_pretrained(tmp_path / path)
    config = config_by(tmp_path, "ties", (1.0, 0.5), density=0.5)
    config.export.formats = wanted
    written = merge(config, str(tmp_path / "run"))
    base, *tuned = (tensors_of(tmp_path / path) for path in ("base", "pool/a", "pool/b"))
    found, name = tensors_of(written[-1]), "model.layers.1.mlp.up_proj.weight"
    assert found.keys() == base.keys()
    genes = {"weight": (1.0, 0.5), "density": 0.5}
    expected = merge_tensor("ties", [each[name] for each in tuned], base[name], genes, name=name)
    np.testing.assert_array_equal(found[name], expected)
    before = (tmp_path / "run" / "pool.json").read_bytes()
    assert merge(config, str(tmp_path / "run")) == written
    assert (tmp_path / "run" / "pool.json").read_bytes() == before


def test_layers_of_a_stacked_leaf_are_merged_by_themselves(tmp_path):
    """From Orbax to Orbax, each with its own angle."""
    rng = np.random.default_rng(0)
    trees = [
        {"layers": {"w": jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32)}} for _ in range(2)
    ]
    for k, tree in enumerate(trees):
        orbax.save(tmp_path / "pool" / f"m{k}", tree, architecture={"layers": 2})
    config = configs.default()
    config.pool.checkpoints = (f"{tmp_path}/pool/*",)
    config.merge.method, config.merge.genes.t = "slerp", 0.3
    config.export.formats, config.compilation_cache = ("orbax",), ""
    (written,) = merge(config, str(tmp_path / "run"))
    stream = LeafStream(find([str(written)]), jax.devices()[0])
    (found,) = stream("layers/w")
    for layer in range(2):
        two = [tree["layers"]["w"][layer] for tree in trees]
        expected = merge_tensor("slerp", two, None, {"t": 0.3}, name="any")
        np.testing.assert_array_equal(found[layer], expected)


@pytest.mark.parametrize(
    ("method", "weights", "genes", "where"),
    [
        ("karcher", (1, 1, 1), {}, "merge.weights"),
        ("ties", (1, 1), {}, "merge.weights"),
        ("ties", (1, 1, 1), {"densty": 1}, "merge.genes"),
        ("ties", (1, 1, 1), {"density": (1, 1)}, "merge.genes.density"),
        ("ties", (1, 1, 1), {"density": float("nan")}, "merge.genes.density"),
        ("ties", (1, 1, 1), {"weight": 1}, "merge.genes.weight"),
        ("slerp", (), {"t": 0.5}, "merge.method"),
        ("no such", (), {}, "merge.method"),
        ("linear", (1, 1, 1), {"normalize": True}, "merge.genes"),
    ],
)
def test_what_a_method_does_not_take_is_refused(tmp_path, method, weights, genes, where):
    make(tmp_path)
    with pytest.raises(JaxmergeError) as caught:
        merge(config_by(tmp_path, method, weights, **genes), str(tmp_path / "run"))
    assert caught.value.where == where
    assert not (tmp_path / "run").exists()


def test_a_base_is_needed(tmp_path):
    make(tmp_path)
    config = config_by(tmp_path, "ties", (1, 1, 1))
    config.pool.base = ""
    with pytest.raises(JaxmergeError, match=r"pool\.base"):
        merge(config, str(tmp_path / "run"))


def test_a_merge_that_was_stopped_keeps_its_finished_files(tmp_path, monkeypatch):
    """Two merges of one run, each of two files; the second is stopped in its second file."""
    make(tmp_path)
    config = config_by(tmp_path, "ties", ((1, 1, 1), (1, 2, 3)), density=0.5)
    config.export.shard_bytes = 400  # a tensor is 384 bytes
    config.merge.names = ("one", "two")
    whole = merge(config, str(tmp_path / "whole"))
    made = []
    of_tensor = recipes.merge_tensor

    def counted(*args, **kwargs):
        made.append(kwargs["name"])
        if len(made) == 4:
            raise KeyboardInterrupt
        return of_tensor(*args, **kwargs)

    monkeypatch.setattr(recipes, "merge_tensor", counted)
    with pytest.raises(KeyboardInterrupt):
        merge(config, str(tmp_path / "run"))
    again = merge(config, str(tmp_path / "run"))
    assert made == ["v", "w", "v", "w", "w"]
    for one, other in zip(whole, again):
        for name, tensor in tensors_of(one).items():
            np.testing.assert_array_equal(tensors_of(other)[name], tensor)


def test_a_merge_of_orbax_checkpoints_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """In the middle, and in the writing of the checkpoint; of other inputs nothing is kept."""
    rng = np.random.default_rng(0)
    shapes = {"layers": {"u": (2, 3, 4), "w": (2, 3, 4)}, "head": (4, 5), "steps": ()}

    def made_of(seed):
        tree = jax.tree.map(
            lambda shape: rng.normal(size=shape), shapes, is_leaf=lambda x: isinstance(x, tuple)
        )
        return jax.tree.map(jnp.float32, tree) | {"ids": jnp.arange(3)}

    for name in ("pool/a", "pool/b", "base"):
        orbax.save(tmp_path / name, made_of(0), architecture={"layers": 2})
    config = config_by(tmp_path, "ties", (1.0, 2.0), density=0.5)
    config.export.formats, config.export.shard_bytes = ("orbax",), 100  # of a leaf or two
    (whole,) = merge(config, str(tmp_path / "whole"))
    merged, of_tensor = [], methods.merge_tensor

    def counted(*args, **kwargs):
        merged.append(kwargs["name"])
        if len(merged) == 4:
            raise KeyboardInterrupt
        return of_tensor(*args, **kwargs)

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(methods, "merge_tensor", counted)
    with monkeypatch.context() as patched:
        patched.setattr(orbax, "save", stopped)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                merge(config, str(tmp_path / "run"))
    names = ["head", "layers/u/0", "layers/u/1", "layers/w/0", "layers/w/1", "steps"]
    assert merged == [*names[:4], *names[3:]]
    (again,) = merge(config, str(tmp_path / "run"))
    assert merged[7:] == []
    assert [path.name for path in (tmp_path / "run" / "merged").iterdir()] == ["orbax"]
    assert not (tmp_path / "run" / ".merged.partial").exists()
    one, other = (LeafStream(find([str(path)]), jax.devices()[0]) for path in (whole, again))
    for name in named_leaves(one.abstract):
        np.testing.assert_array_equal(one(name)[0], other(name)[0])
    pools = [(tmp_path / run / "pool.json").read_text() for run in ("whole", "run")]
    assert pools[0] == pools[1]


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_weights_by_group_of_a_table(tmp_path, method):
    """From a file, of decoder leaves; what has no layer has a group of its own."""
    shape = transformers.LlamaConfig.from_dict(LLAMA)
    for k, path in enumerate(("base", "pool/a", "pool/b")):
        torch.manual_seed(k)
        transformers.LlamaForCausalLM(shape).save_pretrained(tmp_path / path)
    of_group = {"rest": [0.5, 0.5], "layer 0": [1.0, 0.0], "layer 1": [0.25, 0.75]}
    table = {"weights": of_group, "genes": {"density": {"rest": 1, "layer 0": 1, "layer 1": 0.5}}}
    config = config_by(tmp_path, method)
    if method == "linear":
        del table["genes"]
    config.space.granularity = "layer"
    config.merge.weights_file = str(tmp_path / "table.json")
    (tmp_path / "table.json").write_text(json.dumps(table))
    (written,) = merge(config, str(tmp_path / "run"))
    base, *tuned = (tensors_of(tmp_path / path) for path in ("base", "pool/a", "pool/b"))
    found = tensors_of(written)
    for name, group in (
        ("model.norm.weight", "rest"),
        ("model.layers.0.mlp.up_proj.weight", "layer 0"),
        ("model.layers.1.mlp.up_proj.weight", "layer 1"),
    ):
        genes = {"weight": of_group[group]}
        genes |= {"density": table["genes"]["density"][group]} if method == "ties" else {}
        expected = merge_tensor(
            method,
            [x[name] for x in tuned],
            base[name] if method == "ties" else None,
            genes,
            name=name,
        )
        np.testing.assert_array_equal(found[name], expected)
    table["weights"] = {"rest": [0.5, 0.5]}
    (tmp_path / "table.json").write_text(json.dumps(table))
    with pytest.raises(JaxmergeError, match="layer 0"):
        merge(config, str(tmp_path / "other"))


def test_memory_of_tensors_is_used_again():
    """Of each read its own, as large as was needed so far; of large tensors it is given back."""
    memory = recipes._Memory(100)
    one, two = memory.take(0, 50), memory.take(1, 50)
    assert not np.shares_memory(one, two)
    assert np.shares_memory(memory.take(0, 20), one)
    assert memory.take(0, 0).size == 0
    large = memory.take(0, 8192)
    assert large.size == 8192
    assert not np.shares_memory(memory.take(0, 8192), large)
    assert np.shares_memory(memory.take(0, 100), one)
