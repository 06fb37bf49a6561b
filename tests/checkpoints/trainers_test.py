"""Checkpoints of JAX trainers: told by their trees, read as the decoder's, written as theirs."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as v0
import pytest

from jaxmerge import config as configs
from jaxmerge.checkpoints import gemma, huggingface, orbax, trainers
from jaxmerge.checkpoints.survey import find
from jaxmerge.checkpoints.tables import AXES, Change, Leaf, covers, from_decoder, to_decoder
from jaxmerge.errors import JaxmergeError
from jaxmerge.experiment.merge import merge
from jaxmerge.models import families
from jaxmerge.models.decoder import decoder
from jaxmerge.trees import named_leaves
from tests.checkpoints.orbax_others_test import assert_same, merged, save_flat

# Where these read a checkpoint as it is stored they do not say where, which Orbax warns of.
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")

# Sizes that are all different, so that no two axes can be taken for each other, but for the width
# of Gemma: its root is exact, and that of bfloat16 with it.
SIZES = {
    **{"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 6},
    **{"max_position_embeddings": 64, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
}
LLAMA31 = {
    **{"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 32},
}
GEMMA = {
    **{"tie_word_embeddings": True, "query_pre_attn_scalar": 4, "sliding_window": 4},
    "hidden_activation": "gelu_pytorch_tanh",
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rope_parameters": LLAMA31},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3"},
    "qwen3_moe": {
        **{"model_type": "qwen3_moe", "num_experts": 5, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 20, "num_hidden_layers": 3},
    },
    "gemma2": {"model_type": "gemma2", **GEMMA, "num_hidden_layers": 4},
    "gemma3": {"model_type": "gemma3_text", **GEMMA, "num_hidden_layers": 8},
}
# One of each kind: what `known` and `tables` make of the other families goes the same ways.
FORMS = [
    *((name, "maxtext") for name in ("llama", "qwen3_moe", "gemma2", "gemma3")),
    *((name, "maxtext_unscanned") for name in ("mixtral", "gemma2")),
    *((name, "gemma") for name in ("gemma2", "gemma3")),
    *((name, "tunix") for name in ("qwen2", "qwen3_moe", "gemma3")),
    *((name, "levanter") for name in ("qwen2", "qwen3")),
]


def directory(at: Path, family: str, **changes: Any) -> Path:
    """A Hugging Face directory with nothing but a config."""
    at.mkdir()
    (at / "config.json").write_text(json.dumps({**SIZES, **FAMILIES[family], **changes}))
    return at


def params(base: Path, seed: int = 0) -> Any:
    """Random leaves of the decoder."""
    model = trainers.known(str(base))
    assert model
    init = decoder(model.config).init
    assert init
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), "float32"), shapes)


def written(at: Path, layout: str, base: Path, seed: int = 0, **options: Any) -> Path:
    """A checkpoint of a trainer."""
    leaves = named_leaves(params(base, seed))
    trainers.write(at, layout, str(base), leaves.__getitem__, **options)
    return at


def restored(path: Path, base: Path, **options: Any) -> Any:
    """A checkpoint of a trainer as one of the decoder."""
    (source,) = find([str(path)], base=str(base), **options)
    return source, trainers.restore(source, source.abstract)


@pytest.mark.parametrize(("family", "layout"), FORMS)
def test_there_and_back(tmp_path, family, layout):
    """Written and read again: the same leaves, to the rounding of what was multiplied."""
    base = directory(tmp_path / "base", family)
    source, tree = restored(written(tmp_path / "m", layout, base), base)
    assert source.format == layout.split("_")[0]
    found, expected = named_leaves(tree), named_leaves(params(base))
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        # A product and a quotient, or a sum and a difference with 1, of values up to 5.
        np.testing.assert_allclose(found[name], leaf, rtol=1e-6, atol=1e-6, err_msg=name)


def test_every_letter_of_every_leaf():
    """The axes that the tables are written in are those of the decoder."""
    for family in FAMILIES:
        config = {**SIZES, **FAMILIES[family]}
        known = families.from_config(_config(config), family)
        assert known
        shapes = {
            name: leaf.shape
            for name, leaf in trainers.abstract(trainers.Known("", known.config)).items()
        }
        for name, shape in shapes.items():
            inner = shape[1:] if name.startswith("layers/") else shape
            assert Leaf(AXES[name], (name,)).sizes(known.config) == inner, name


def _config(values: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(**values)


def test_a_table_that_lacks_a_layer_is_no_table():
    leaves = {"layers/up": jax.ShapeDtypeStruct((2, 3, 4), "float32")}
    both = Leaf("LFD", ("layers/up",), (0, 1))
    assert covers({"a": both}, leaves)
    assert covers({"a": both._replace(layers=(1,)), "b": both._replace(layers=(0,))}, leaves)
    assert not covers({"a": both._replace(layers=(1,))}, leaves)
    assert not covers({"a": both, "b": both}, leaves)
    assert not covers({"a": both}, {})


def test_interleaved_heads(tmp_path):
    """As MaxText's own conversion has them: the two halves of a head in turns."""
    base = directory(tmp_path / "base", "llama")
    known = trainers.known(str(base))
    assert known
    leaf = Leaf("DJC", ("layers/key",), (0,), Change(interleaved=True))
    stored = np.arange(16 * 4 * 6, dtype=np.float32).reshape(16, 4, 6)
    found = to_decoder(jnp.asarray(stored), leaf, "layers/key", known.config)
    halves = np.concatenate([stored[..., ::2], stored[..., 1::2]], -1)
    np.testing.assert_array_equal(found[0], np.transpose(halves, (1, 2, 0)))
    back = from_decoder({"layers/key": found}, leaf, known.config)
    np.testing.assert_array_equal(back, stored)


def test_the_order_of_heads_is_not_guessed(tmp_path):
    """A Llama whose rope is not scaled may be either; said, it is read so and not otherwise."""
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    base = directory(tmp_path / "base", "llama", **plain)
    with pytest.raises(JaxmergeError, match=r"two orders(.|\n)*pool\.rope_type"):
        written(tmp_path / "m", "maxtext", base)
    path = written(tmp_path / "m", "maxtext", base, rope_type="llama3.1")
    with pytest.raises(JaxmergeError, match=r"two orders(.|\n)*pool\.rope_type"):
        find([str(path)], base=str(base))
    expected = named_leaves(params(base))
    for rope_type, same in (("llama3.1", True), ("default", False)):
        found = named_leaves(restored(path, base, rope_type=rope_type)[1])
        np.testing.assert_array_equal(found["layers/value"], expected["layers/value"])
        assert np.array_equal(found["layers/key"], expected["layers/key"]) == same
    with pytest.raises(JaxmergeError, match="unknown choice"):
        find([str(path)], base=str(base), rope_type="yarn")


@pytest.mark.parametrize("damage", ["more", "less", "shape"])
def test_what_is_nearly_a_layout_is_refused(tmp_path, damage):
    """With what differs, and the way to merge it all the same."""
    base = directory(tmp_path / "base", "qwen3")
    path = written(tmp_path / "m", "maxtext", base)
    tree = orbax.restore(*_stored(path))
    if damage == "more":
        tree["decoder"]["layers"]["self_attention"]["sinks"] = jnp.ones(3)
    elif damage == "less":
        del tree["decoder"]["layers"]["mlp"]["wo"]
    else:
        tree["decoder"]["decoder_norm"]["scale"] = jnp.ones(17)
    orbax.save(tmp_path / "damaged", tree)
    said = {
        "more": "leaf decoder/layers/self_attention/sinks is not known",
        "less": "no leaf decoder/layers/mlp/wo/kernel",
        "shape": r"leaf decoder/decoder_norm/scale is \[17\], by the config \[16\]",
    }[damage]
    with pytest.raises(JaxmergeError, match=said) as caught:
        find([str(tmp_path / "damaged")], base=str(base))
    assert 'formats = ("orbax",)' in caught.value.expected
    (source,) = find([str(tmp_path / "damaged")], base=str(base), as_stored=True)
    assert source.format == "orbax"


def _stored(path: Path) -> Any:
    source = orbax.describe("m", orbax.absolute(path))
    return source, source.abstract


def test_what_no_trainer_wrote_stays_as_it_is(tmp_path):
    base = directory(tmp_path / "base", "qwen3")
    orbax.save(tmp_path / "mine", {"my": {"w": jnp.ones((2, 3))}})
    orbax.save(tmp_path / "decoder", params(base))
    found = find([str(tmp_path / "mine"), str(tmp_path / "decoder")], base=str(base))
    assert [source.format for source in found] == ["orbax", "orbax"]


@pytest.mark.parametrize("layout", trainers.FORMS)
def test_merged_by_name_it_is_the_trainers(tmp_path, layout):
    """One-hot, the bytes and metadata of a member, in the item that it was in."""
    base = directory(tmp_path / "base", "gemma3" if layout == "gemma" else "qwen3")
    members = [written(tmp_path / f"m{i}", layout, base, i) for i in (0, 1)]
    storage = trainers.FORMS[layout].storage
    path = merged(tmp_path / "out", *members, weights=(0.0, 1.0), storage=storage)
    reader = trainers.STORED[storage]
    one, other = (reader.describe("m", orbax.absolute(each)) for each in (path, members[1]))
    assert (one.item, one.subtree) == (other.item, other.subtree)
    if storage == "orbax":
        assert one.custom == other.custom == trainers.FORMS[layout].custom
    else:
        said = [(each / "metadata.json").read_text() for each in (path, members[1])]
        assert json.loads(said[0]) == json.loads(said[1])
    assert_same(*(reader.restore(each, each.abstract) for each in (one, other)))


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
@pytest.mark.parametrize("transposed", ["_plain", "_transposed"])
@pytest.mark.parametrize("form", ["gemma", "gemma_flat", "gemma_stacked"])
def test_the_forms_that_gemma_reads(tmp_path, form, transposed, family):
    """Nested, flat as it is published, and stacked: as the decoder's; by name, the member's."""
    base = directory(tmp_path / "base", family)  # 8 layers, of which Gemma 3 stacks 6
    known = trainers.known(str(base))
    assert known
    table = gemma.tables()[form + transposed](known)
    assert table
    members = []
    for seed in (0, 1):
        leaves, tree = named_leaves(params(base, seed)), {}
        for name, leaf in table.items():
            value = from_decoder(leaves, leaf, known.config)
            *above, last = f"transformer/{name}".split("/")
            if form == "gemma":
                _put(tree, [*above, last], value)
            else:  # whose keys have slashes in them
                tree.setdefault("/".join(above), {})[last] = value
        members.append(save_flat(tmp_path / f"m{seed}", tree))
    source, found = restored(members[1], base)
    assert source.format == "gemma"
    assert_same(dict(named_leaves(found)), dict(named_leaves(params(base, 1))))
    path = merged(tmp_path / "out", *members, weights=(0.0, 1.0))
    with v0.StandardCheckpointer() as checkpointer:
        assert_same(checkpointer.restore(path), checkpointer.restore(members[1]))


def _put(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def test_padded_rows_of_an_embedding_are_left_out(tmp_path):
    base = directory(tmp_path / "base", "qwen2")
    path = written(tmp_path / "m", "maxtext", base)
    tree = orbax.restore(*_stored(path))
    embedding = tree["token_embedder"]["embedding"]
    tree["token_embedder"]["embedding"] = jnp.pad(embedding, ((0, 8), (0, 0)), constant_values=9)
    orbax.save(tmp_path / "padded", tree)
    found = named_leaves(restored(tmp_path / "padded", base)[1])["embedding"]
    np.testing.assert_array_equal(found, embedding)


def test_to_huggingface_and_back_again(tmp_path):
    """MaxText members to a Hugging Face directory; that and another member to Tunix."""
    base = directory(tmp_path / "base", "qwen3")
    members = [written(tmp_path / f"m{i}", "maxtext", base, i) for i in (0, 1)]
    config = configs.default()
    config.pool.checkpoints = tuple(map(str, members))
    config.pool.base = str(base)
    config.merge.weights, config.export.formats = (0.0, 1.0), ("orbax", "huggingface")
    by_name, hf = merge(config, str(tmp_path / "out"))
    assert_same(orbax.restore(*_stored(by_name)), orbax.restore(*_stored(members[1])))
    source = huggingface.describe("hf", orbax.absolute(hf))
    assert_same(huggingface.restore(source, source.abstract), params(base, 1))
    config.pool.checkpoints = (str(hf), str(members[0]))
    config.merge.weights, config.export.formats = (1.0, 0.0), ("tunix",)
    (path,) = merge(config, str(tmp_path / "mixed"))
    assert_same(restored(path, base)[1], params(base, 1))
    shutil.rmtree(hf)
