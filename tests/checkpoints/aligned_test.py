"""Pools whose members have different vocabularies: rows are matched by their tokens."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from jaxmerge import config as configs
from jaxmerge.checkpoints import pool
from jaxmerge.checkpoints.survey import survey
from jaxmerge.errors import JaxmergeError
from jaxmerge.experiment.evaluate import evaluate
from jaxmerge.experiment.merge import merge
from jaxmerge.experiment.search import search as run
from jaxmerge.sharding import make_mesh
from tests import mergekit_models, tiny

MEMBERS = ("base", "b", "c")  # of llama: b and c have other tokens besides
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WEIGHTS = (0.5, 0.25, 0.25)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    mergekit_models.make(directory)
    return directory


def tokens(directory: Path) -> list[str]:
    content = json.loads((directory / "tokenizer.json").read_text())
    ids = content["model"]["vocab"] | {
        each["content"]: each["id"] for each in content["added_tokens"]
    }
    return sorted(ids, key=ids.__getitem__)


def expected(models: Path, names: tuple[str, ...], base: str, choice: str, tensor: str):
    """Each member's rows by token: its own; else of the only one, of the base, or their mean."""
    rows = {
        name: dict(zip(tokens(models / name), mergekit_models.load(models / name)[tensor]))
        for name in {*names, base}
    }
    order = tokens(models / base)
    others = [token for name in names for token in tokens(models / name) if token not in order]
    added = {"<|im_start|>", "<|im_end|>", "<tool>"}  # they come last
    others.sort(key=added.__contains__)
    order += dict.fromkeys(others) if choice == "union" else ()
    aligned = {}
    for name in names:
        aligned[name] = []
        for token in order:
            having = [each for each in rows.values() if token in each]
            if token in rows[name]:
                row = rows[name][token]
            elif token in rows[base] and len(having) > 1:
                row = rows[base][token]
            else:
                row = np.mean([each[token] for each in having], axis=0, dtype=np.float32)
            aligned[name].append(row)
    return {name: np.stack(found) for name, found in aligned.items()}, order


def config_of(models: Path, *names: str, choice: str = "union", base: str = ""):
    config = configs.default()
    config.pool.checkpoints = tuple(str(models / "llama" / name) for name in names)
    config.pool.base = str(models / "llama" / base) if base else ""
    config.pool.vocabulary = choice
    config.compilation_cache = ""
    config.export.formats = ("huggingface",)
    return config


@pytest.mark.parametrize("residency", ["device", "disk"])
@pytest.mark.parametrize(("choice", "base"), [("base", "base"), ("union", "base"), ("base", "c")])
def test_rows_are_matched_by_token(models, choice, base, residency):
    names = MEMBERS[:2]  # c is a base that is no member
    sources = survey(
        [str(models / "llama" / name) for name in names],
        vocabulary=choice,
        base=str(models / "llama" / base),
    )
    aligned, order = expected(models / "llama", names, base, choice, EMBEDDING)
    loaded = pool.load(sources, make_mesh(), (), residency=residency)
    for one_hot, name in zip(np.eye(2, dtype=np.float32), names):
        found = np.asarray(loaded.merged(one_hot)("embedding"))
        np.testing.assert_array_equal(found, aligned[name])
    assert tokens(Path(sources[0].directory)) == order
    assert sources[0].architecture["vocab"] == len(order)


@pytest.mark.parametrize("choice", ["base", "union"])
@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_merges_have_the_vocabulary(models, tmp_path, choice, method):
    """From file to file, in blocks and by tensor; and transformers reads them."""
    names = ("base", "b", "c") if method == "linear" else ("b", "c")
    config = config_of(models, *names, choice=choice)
    config.merge.method = method
    config.merge.weights = WEIGHTS if method == "linear" else ()
    config.merge.genes = {} if method == "linear" else {"t": 0.25}
    (path,) = merge(config, str(tmp_path / "run"))
    for tensor in (EMBEDDING, HEAD):
        aligned, order = expected(models / "llama", names, names[0], choice, tensor)
        found = mergekit_models.load(path)[tensor]
        if method == "linear":
            summed = sum(w * aligned[name] for w, name in zip(WEIGHTS, names))
            np.testing.assert_allclose(found, summed, rtol=1e-6, atol=1e-7)
        assert found.shape[0] == len(order)
    assert json.loads((path / "config.json").read_text())["vocab_size"] == len(order)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    ids = tokenizer("<|im_start|> a", add_special_tokens=False).input_ids
    assert (order[ids[0]] == "<|im_start|>") == (choice == "union" or names[0] == "b")
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    model, report = loaded
    assert not any(report.values())
    assert model.get_input_embeddings().weight.shape[0] == len(order)


def test_padded_rows_do_not_block(models, tmp_path):
    """Of two that have the same tokens, and rows beyond them as they please."""
    shutil.copytree(models / "qwen" / "a", tmp_path / "a")
    short = shutil.copytree(models / "qwen" / "b", tmp_path / "b")
    said = json.loads((short / "config.json").read_text())
    rows = len(tokens(short))
    assert rows < said["vocab_size"]
    (short / "config.json").write_text(json.dumps(said | {"vocab_size": rows}))
    tensors = mergekit_models.load(short)
    mergekit_models._save(
        short / "model.safetensors", tensors | {EMBEDDING: tensors[EMBEDDING][:rows]}
    )
    both = [str(tmp_path / "a"), str(tmp_path / "b")]
    with pytest.raises(JaxmergeError, match="can't be merged") as caught:
        survey(both)
    assert "pool.vocabulary" in caught.value.expected
    for order in (both, both[::-1]):
        a, b = survey(order, vocabulary="base", by_tensor=True)
        assert a.abstract == b.abstract
        assert a.abstract[EMBEDDING].shape[0] == (32 if order == both else rows)
        assert (a.directory, b.directory) == (order[0], order[0])


def test_a_search_over_a_union(models, tmp_path):
    config = config_of(models, "base", "b", "c")
    config = tiny.run_config(config, models / "llama")
    config.pool.checkpoints = tuple(str(models / "llama" / name) for name in MEMBERS)
    config.export.formats = ("huggingface",)
    config.analyses.leave_one_out = config.analyses.transfer = False
    config.pool.residency = "host"
    run(config, str(tmp_path / "run"))
    winner = tmp_path / "run" / "merged" / "huggingface"
    _, order = expected(models / "llama", MEMBERS, "base", "union", EMBEDDING)
    assert tokens(winner) == order
    assert mergekit_models.load(winner)[HEAD].shape[0] == len(order)
    # A member by itself, in the pool's vocabulary, has the scores that it had in the search.
    found = evaluate(config, str(tmp_path / "scores"))
    said = json.loads((tmp_path / "run" / "results.json").read_text())
    singles = {each["name"]: each["test"] for each in said["individuals"]}
    for entry in found["checkpoints"]:
        assert entry["test"]["generation"] == pytest.approx(singles[entry["name"]]["generation"])


def test_what_has_no_tokenizer_is_refused(models, tmp_path):
    tiny.pool(tmp_path / "orbax", 2)
    with pytest.raises(JaxmergeError, match="has no tokenizer"):
        survey([f"{tmp_path}/orbax/*"], vocabulary="base")
    with pytest.raises(JaxmergeError, match="can't be merged") as caught:
        merge(config_of(models, "base", "b", choice=""), str(tmp_path / "run"))
    assert "pool.vocabulary" in caught.value.expected
