"""Hugging Face directories: read on any mesh, refused when anything is wrong with them."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from etils import epath
from safetensors.torch import load_file, save_file

from jaxmerge.checkpoints import huggingface, pool
from jaxmerge.checkpoints.source import Source
from jaxmerge.checkpoints.survey import survey
from jaxmerge.errors import JaxmergeError
from jaxmerge.models.decoder import SHARDING_RULES
from jaxmerge.sharding import make_mesh, shardings
from jaxmerge.trees import PyTree, named_leaves
from tests import huggingface_models

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Damage = Callable[[Path], object]


def describe(path: Path | str) -> Source:
    return huggingface.describe(Path(path).name, epath.Path(path))


def load(path: Path | str, **sizes: Any) -> PyTree:
    """The checkpoint on a mesh of these sizes."""
    source, mesh = describe(path), make_mesh(**sizes)
    placed = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        source.abstract,
        shardings(source.abstract, SHARDING_RULES, mesh),
    )
    return huggingface.restore(source, placed)


def refused(path: Path) -> JaxmergeError:
    with pytest.raises(JaxmergeError) as caught:
        load(path)
    return caught.value


def assert_same(tree: PyTree, expected: PyTree) -> None:
    """The same structure, dtypes and bytes."""
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for leaf, other in zip(jax.tree.leaves(tree), jax.tree.leaves(expected)):
        assert leaf.dtype == other.dtype
        assert np.asarray(leaf).tobytes() == np.asarray(other).tobytes()


def tensors_of(path: Path | str) -> dict[str, torch.Tensor]:
    """All tensors of a directory, read by the safetensors library."""
    files = Path(path).glob("*.safetensors")
    return {name: value for file in files for name, value in load_file(file).items()}


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Changes the tensors of a directory that has one file."""
    tensors = tensors_of(path)
    change(tensors)
    save_file(tensors, path / WEIGHTS)


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def copied(variant: str, to: Path) -> Path:
    """A directory of a random tiny model, to damage."""
    return Path(shutil.copytree(huggingface_models.tiny(variant).directory, to))


def sharded(variant: str, to: Path, shard_bytes: int = 30_000) -> Path:
    """The same in several files, as transformers splits them."""
    model = huggingface_models.tiny(variant).model
    model.save_pretrained(to, max_shard_size=shard_bytes)
    assert len(list(to.glob("*.safetensors"))) > 2
    return to


@pytest.mark.parametrize(
    ("variant", "sizes"),
    [
        ("llama biases", {}),
        ("llama biases", {"fsdp": 2, "tensor": 2}),
        ("smollm2", {"fsdp": 8}),
        ("smollm2", {"pop": 2, "tensor": 4}),
        ("cohere norms, biases, untied", {"tensor": 4}),
        ("phi3", {"fsdp": 4, "tensor": 2}),
        ("qwen3 moe", {"fsdp": 2, "tensor": 4}),
        ("gemma3", {"pop": 8}),
    ],
    ids=str,
)
def test_restored_on_any_mesh(variant, sizes):
    """Bit for bit, lying where it was asked to lie; the tree and architecture are the decoder's."""
    tiny = huggingface_models.tiny(variant)
    source = describe(tiny.directory)
    assert source.architecture == {"model": "decoder", **tiny.architecture.config.plain()}
    assert (source.format, source.directory) == ("huggingface", tiny.directory)
    tree = load(tiny.directory, **sizes)
    assert_same(tree, tiny.params)
    where = shardings(tree, SHARDING_RULES, make_mesh(**sizes))
    for leaf, place in zip(jax.tree.leaves(tree), jax.tree.leaves(where)):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


def test_blocks_and_short_reads(monkeypatch):
    """However much is read at once, and wherever that cuts leaves and tensors."""
    tiny = huggingface_models.tiny("phi3")
    for chunk, short in [(1, 0), (700, 0), (5000, 300), (2**23, 2**30)]:
        monkeypatch.setattr("jaxmerge.checkpoints.leaves._CHUNK", chunk)
        monkeypatch.setattr("jaxmerge.checkpoints.leaves._SHORT", short)
        assert_same(load(tiny.directory, fsdp=2, tensor=2), tiny.params)


def test_some_leaves_alone():
    """What is not asked for is not read; `keep` has the last word on a leaf."""
    tiny = huggingface_models.tiny("llama")
    source = describe(tiny.directory)
    wanted = {"layers": {"up": source.abstract["layers"]["up"]}}
    assert_same(
        huggingface.restore(source, wanted), {"layers": {"up": tiny.params["layers"]["up"]}}
    )
    named = huggingface.restore(source, wanted, lambda name, leaf: (name, leaf.shape))
    assert named == {"layers": {"up": ("layers/up", (2, 48, 32))}}


def test_several_files(tmp_path):
    """As transformers splits them; and as links, as the cache of the Hugging Face hub has them."""
    path = sharded("llama", tmp_path / "sharded")
    expected = huggingface_models.tiny("llama").params
    assert_same(load(path), expected)
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(sorted(path.iterdir())):
        file.rename(tmp_path / "blobs" / f"{number:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064x}")
    assert_same(load(snapshot), expected)


@pytest.mark.parametrize(
    ("stored", "read"),
    [
        (torch.bfloat16, "bfloat16"),
        (torch.float16, "float16"),
        (torch.float32, "float32"),
        (torch.float8_e4m3fn, "bfloat16"),
        (torch.float8_e5m2, "bfloat16"),
    ],
)
def test_dtypes(tmp_path, stored, read):
    """float8 is widened, which is exact; norms may have another dtype than the rest."""
    path = copied("llama", tmp_path / "x")

    def cast(tensors):
        for name, value in tensors.items():
            tensors[name] = value.to(torch.float32 if "norm" in name else stored)

    rewrite(path, cast)
    leaves, tensors = named_leaves(load(path, fsdp=2)), tensors_of(path)
    for name, leaf in leaves.items():
        assert leaf.dtype == ("float32" if "norm" in name else read)
    up = [tensors[f"model.layers.{i}.mlp.up_proj.weight"].float().numpy() for i in range(2)]
    np.testing.assert_array_equal(np.asarray(leaves["layers/up"]).astype(np.float32), up)


def test_dtypes_that_differ_within_a_leaf(tmp_path):
    """The leaf gets the narrowest that holds both."""
    path = copied("llama", tmp_path / "x")

    def cast(tensors):
        for i, dtype in enumerate((torch.bfloat16, torch.float16)):
            name = f"model.layers.{i}.mlp.up_proj.weight"
            tensors[name] = tensors[name].to(dtype)

    rewrite(path, cast)
    up = load(path)["layers"]["up"]
    assert up.dtype == "float32"
    expected = [tensors_of(path)[f"model.layers.{i}.mlp.up_proj.weight"].float() for i in range(2)]
    np.testing.assert_array_equal(up, torch.stack(expected).numpy())


def test_every_tensor_that_is_wrong_in_one_message(tmp_path):
    """Missing, unknown and of another shape; what is known to mean nothing is passed over."""
    path = copied("llama", tmp_path / "x")

    def change(tensors):
        del tensors["model.norm.weight"], tensors["model.layers.0.self_attn.q_proj.weight"]
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.ones(48, 32)
        tensors["model.layers.1.self_attn.q_proj.bias"] = torch.ones(32)
        tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(32, 48)

    rewrite(path, change)
    error = refused(path)
    assert error.where == str(path)
    assert sorted(error.what.splitlines()[1:]) == [
        "  no tensor model.layers.0.self_attn.q_proj.weight",
        "  no tensor model.norm.weight",
        "  tensor model.layers.1.mlp.up_proj.weight is [32, 48], by the config [48, 32]",
        "  tensor model.layers.1.self_attn.q_proj.bias is not known",
        "  tensor model.layers.2.mlp.up_proj.weight is not known",
    ]


def test_tied_embeddings_that_are_there_twice(tmp_path):
    """Passed over where they are the same, and refused where they are not."""
    path = copied("smollm2", tmp_path / "x")
    rewrite(path, lambda x: x.update({"lm_head.weight": x["model.embed_tokens.weight"].clone()}))
    assert_same(load(path), huggingface_models.tiny("smollm2").params)
    rewrite(path, lambda x: x["lm_head.weight"][50, 3].add_(1))
    assert "lm_head.weight differs from model.embed_tokens.weight" in refused(path).what
    rewrite(path, lambda x: x.update({"lm_head.weight": torch.ones(3, 3)}))
    assert "lm_head.weight is not known" in refused(path).what


@pytest.mark.parametrize("more", [False, True])
def test_a_tied_head_that_one_member_has(tmp_path, more):
    """In a pool of the decoder's leaves it is no difference, whichever member comes first."""
    paths = [copied("smollm2", tmp_path / name) for name in "ab"]
    rewrite(
        paths[more], lambda x: x.update({"lm_head.weight": x["model.embed_tokens.weight"].clone()})
    )
    trees = pool.load(survey(list(map(str, paths))), make_mesh(), SHARDING_RULES).trees
    for tree in trees:
        assert_same(tree, huggingface_models.tiny("smollm2").params)


@pytest.mark.parametrize("file", [WEIGHTS, "model-00001-of-00002.safetensors"])
def test_an_index_beside_a_single_file(tmp_path, file):
    """It names that file, or is left of shards that are gone: it says nothing."""
    path = copied("llama", tmp_path / "x")
    names = dict.fromkeys(tensors_of(path), file)
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert describe(path).architecture["model"] == "decoder"
    assert_same(load(path), huggingface_models.tiny("llama").params)


def _rename_in_index(file: str) -> Damage:
    def damage(path: Path) -> None:
        edit_json(path / INDEX, lambda x: x["weight_map"].update({"lm_head.weight": file}))

    return damage


def _write_index(text: str) -> Damage:
    return lambda path: (path / INDEX).write_text(text)


def _drop_from_index(path: Path) -> None:
    edit_json(path / INDEX, lambda x: x["weight_map"].pop("model.layers.0.mlp.up_proj.weight"))


def _copy_to_another_file(path: Path) -> None:
    names = json.loads((path / INDEX).read_text())["weight_map"]
    first, last = sorted(set(names.values()))[0], names["lm_head.weight"]
    assert first != last
    tensors = load_file(path / first)
    save_file(tensors | {"lm_head.weight": torch.ones(2)}, path / first)


@pytest.mark.parametrize(
    ("damage", "said", "where"),
    [
        (_write_index('{"weight_map": {}}'), "no weight_map", ""),
        (_write_index("[]"), "no weight_map", ""),
        (_write_index("{"), "no JSON", ""),
        (_write_index('{"weight_map": {"x": "a", "x": "b"}}'), "x is there twice", ""),
        (_rename_in_index("../model.safetensors"), "need not be in its directory", "lm_head"),
        (_rename_in_index("/etc/x.safetensors"), "need not be in its directory", "lm_head"),
        (_rename_in_index("sub/x.safetensors"), "need not be in its directory", "lm_head"),
        (_rename_in_index("sub\\x.safetensors"), "need not be in its directory", "lm_head"),
        (_rename_in_index("pytorch_model.bin"), "need not be in its directory", "lm_head"),
        (_rename_in_index("x.safetensors\n"), "need not be in its directory", "lm_head"),
        (_rename_in_index("missing.safetensors"), "can't be read", "missing.safetensors"),
        (_rename_in_index("model-00001-of-00004.safetensors"), "do not agree", ""),
        (_drop_from_index, "up_proj.weight is in .* no such tensor", ""),
        (_copy_to_another_file, "lm_head.weight is in model-00001", ""),
        (lambda path: save_file({"x": torch.ones(2)}, path / WEIGHTS), "which goes before", ""),
    ],
)
def test_an_index_that_is_wrong(tmp_path, damage, said, where):
    """The file is named, and the tensor where one is at fault; nothing outside is opened."""
    path = sharded("llama", tmp_path / "x", shard_bytes=30_000)
    damage(path)
    error = refused(path)
    assert re.search(said, error.what)
    assert str(path) in error.where
    assert where in error.where


def _pickle_alone(path: Path) -> None:
    (path / WEIGHTS).rename(path / "pytorch_model.bin")


def _cut(path: Path) -> None:
    os.truncate(path / WEIGHTS, 20_000)


def _quantise(path: Path) -> None:
    edit_json(path / "config.json", lambda x: x.update(quantization_config={"bits": 4}))


@pytest.mark.parametrize(
    ("damage", "said", "file"),
    [
        (_pickle_alone, "the weights are pickled", ""),
        (_quantise, "quantised", "config.json"),
        (_cut, "cut short", WEIGHTS),
        (lambda path: (path / "config.json").write_text("{"), "JSON", "config.json"),
        (lambda path: (path / "config.json").write_text("[]"), "JSON object", "config.json"),
    ],
)
def test_directories_that_are_refused(tmp_path, damage, said, file):
    """With the file and what to do about it; `recognises` takes them, so that they are refused."""
    path = copied("llama", tmp_path / "x")
    damage(path)
    assert huggingface.recognises(epath.Path(path))
    error = refused(path)
    assert said in error.what
    assert str(path / file) in error.where


def test_what_is_recognised(tmp_path):
    assert huggingface.recognises(epath.Path(huggingface_models.tiny("llama").directory))
    (tmp_path / "config.json").write_text("{}")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "config.json"):
        assert not huggingface.recognises(epath.Path(path))


@pytest.mark.parametrize("config", ['{"model_type": "unheard-of"}', ""])
def test_a_model_without_a_decoder(tmp_path, config):
    """Its tensors are its leaves, by their names; the architecture says of which type it is."""
    tensors = {
        "encoder.weight": torch.randn(4, 3, 2, dtype=torch.bfloat16),
        "encoder.position_ids": torch.arange(5, dtype=torch.int32),
        "scale": torch.tensor(2.5),
    }
    save_file(tensors, tmp_path / WEIGHTS)
    if config:
        (tmp_path / "config.json").write_text(config)
    source = describe(tmp_path)
    assert source.architecture == ({"model": "", "model_type": "unheard-of"} if config else {})
    tree = load(tmp_path)
    assert tree.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (
            np.asarray(tree[name]).tobytes()
            == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    huggingface.save(
        tmp_path / "again",
        huggingface.layout(str(tmp_path)),
        tree.__getitem__,
        abstract=source.abstract,
        like=str(tmp_path),
    )
    assert_same(load(tmp_path / "again"), tree)
    assert (tmp_path / "again" / "config.json").exists() == bool(config)
