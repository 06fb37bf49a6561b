"""Searches over other methods than the weighted sum, from config to export and back."""

import json
import subprocess
import sys

import jax
import jsonschema
import numpy as np
import pytest

from jaxmerge import config as configs
from jaxmerge.checkpoints import orbax
from jaxmerge.checkpoints.stream import LeafStream
from jaxmerge.checkpoints.survey import find
from jaxmerge.errors import JaxmergeError
from jaxmerge.experiment import merge as merging
from jaxmerge.experiment.search import search
from jaxmerge.trees import named_leaves
from tests import tiny
from tests.command import ROOT


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Two checkpoints and, beside them, their base."""
    directory = tmp_path_factory.mktemp("pool")
    trees = tiny.trees(3)
    for name, tree in zip(("members/a", "members/b", "base"), trees):
        orbax.save(directory / name, tree, architecture=tiny.model().architecture)
    return directory


def config_of(pool, method, **genes):
    config = tiny.run_config(configs.default(), pool / "members")
    config.pool.base = str(pool / "base")
    config.merge.method = method
    config.merge.genes.update(genes)
    config.objective.tasks, config.heldout = ("choice",), ()
    config.baselines = ("uniform",)
    config.search.strategy, config.search.population, config.search.budget = "SNES", 4, 8
    config.export.formats = ("orbax",)
    return config


def config_of_ties(pool):
    """By layer, with a density of each checkpoint, and a lambda that is given."""
    config = config_of(pool, "ties", **{"lambda": 0.8})
    config.space.granularity, config.space.per_checkpoint = "layer", ("density",)
    return config


@pytest.fixture(scope="module")
def finished(pool, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("ties")
    return workdir, search(config_of_ties(pool), str(workdir), "the command")


def leaves_of(path):
    stream = LeafStream(find([str(path)]), jax.devices()[0])
    return {name: np.asarray(stream(name)[0]) for name in named_leaves(stream.abstract)}


def test_what_is_searched_is_told(finished):
    workdir, found = finished
    schema = json.loads((ROOT / "jaxmerge/report/results.schema.json").read_text())
    jsonschema.validate(json.loads((workdir / "results.json").read_text()), schema)
    assert found["method"]["searched"] == ["density[0]", "density[1]"]
    assert found["method"]["fixed"]["lambda"] == pytest.approx(0.8)
    log = tiny.log(workdir)
    of_search = [line for line in log if line["origin"] == "search"]
    assert len(of_search) == 8
    drawn = np.array([[*line["genes"].values()] for line in of_search])
    assert drawn.shape == (8, 2, 3)  # groups: two layers, and the rest
    assert len(np.unique(drawn)) == drawn.size
    assert ((drawn >= 0.05) & (drawn <= 1)).all()
    assert {line["genes"] is None for line in log if line["origin"] != "search"} == {True, False}
    assert all(line["genes"] is None for line in log if line["origin"] == "individual")
    (best,) = [line for line in of_search if line["id"] == found["best"]["id"]]
    assert list(found["best"]["genes"]["density[1]"]) == best["genes"]["density[1]"]
    page = (workdir / "report.html").read_text()
    assert "ties" in page
    assert "density[1]" in page


def test_the_export_is_what_was_evaluated_and_what_a_merge_with_its_numbers_gives(
    finished, pool, tmp_path
):
    """Merged leaf by leaf with the numbers that the log has, to the same bits."""
    workdir, _ = finished
    exported = leaves_of(workdir / "merged" / "orbax")
    config = config_of(pool, "ties")
    config.merge.weights_file = str(workdir / "results.json")
    config.space.granularity = "layer"
    (again,) = merging.merge(config, str(tmp_path / "again"))
    for name, leaf in leaves_of(again).items():
        np.testing.assert_array_equal(leaf, exported[name])


@pytest.mark.slow
def test_jaxmerge_export_writes_it_again(finished, tmp_path):
    """The numbers that were searched and those that were fixed are both of the run."""
    workdir, _ = finished
    command = [
        sys.executable,
        "-m",
        "jaxmerge",
        "export",
        str(workdir),
        f"--out={tmp_path / 'out'}",
    ]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    exported = leaves_of(workdir / "merged" / "orbax")
    for name, leaf in leaves_of(tmp_path / "out").items():
        np.testing.assert_array_equal(leaf, exported[name])


def test_it_goes_on_to_the_same_end(finished, pool, tmp_path):
    """From any line of the log."""
    workdir, _ = finished
    config = config_of_ties(pool)
    lines = (workdir / "candidates.jsonl").read_text().splitlines(keepends=True)
    directory = tmp_path / "run"
    directory.mkdir()
    for name in ("config.json", "pool.json", "tasks.json"):
        (directory / name).write_bytes((workdir / name).read_bytes())
    (directory / "candidates.jsonl").write_text("".join(lines[:7]))
    for split in ("search",):
        (directory / "examples" / split).mkdir(parents=True)
        data = (workdir / "examples" / split / "choice.f32").read_bytes()
        (directory / "examples" / split / "choice.f32").write_bytes(data)
    search(config, str(directory), "the command")
    assert tiny.log(directory) == tiny.log(workdir)


@pytest.mark.parametrize(
    ("method", "axes"),
    [("slerp", {}), ("task_arithmetic", {"pop": 2, "fsdp": 2}), ("dare_ties", {"pop": 2})],
)
def test_every_kind_runs(pool, tmp_path, method, axes):
    """Combinations, from disk too; draws; what has no weights."""
    config = config_of(pool, method)
    config.mesh.update(axes)
    if method == "slerp":
        config.pool.base, config.pool.residency = "", "disk"
    found = search(config, str(tmp_path), "the command")
    best = found["best"]
    assert set(best["genes"]) == {"slerp": {"t"}, "task_arithmetic": {"lambda"}}.get(
        method, {"density", "lambda"}
    )
    assert found["method"]["weighted"] == (method != "slerp")
    assert len({*map(str, (line["genes"] for line in tiny.log(tmp_path)))}) > 8


def test_a_search_along_gradients(pool, tmp_path):
    """Over weights and a number of each group; it is stopped, and ends the same."""
    config = config_of(pool, "task_arithmetic")
    config.space.granularity, config.analyses.leave_one_out = "layer", False
    config.search.strategy, config.search.population = "gradient", 0
    config.search.steps, config.search.score_every, config.search.minibatch = 4, 2, 4
    found = search(config, str(tmp_path), "the command")
    log = tiny.log(tmp_path)
    of_search = [line for line in log if line["origin"] == "search"]
    assert len(of_search) == 4
    drawn = np.array([line["genes"]["lambda"] for line in of_search])
    assert drawn.shape == (4, 3)
    # Adam's first steps are about as long as the learning rate, whatever the slope.
    assert (np.abs(drawn[0] - 1) > 0.01).all()
    assert (np.abs(np.array(of_search[0]["weights"]) - 0.5) > 0.01).all()
    whole = (tmp_path / "candidates.jsonl").read_text().splitlines(keepends=True)
    cut = [line["origin"] for line in log].index("search") + 3
    (tmp_path / "candidates.jsonl").write_text("".join(whole[:cut]))
    again = search(config, str(tmp_path), "the command")
    assert tiny.log(tmp_path) == log
    assert again["best"] == found["best"]


def test_evolution_goes_on_where_gradients_ended(pool, tmp_path):
    """In the genotype of a number without weights; the winner may be a baseline."""
    config = config_of(pool, "slerp")
    config.pool.base, config.search.warm_start = "", "gradient"
    config.analyses.leave_one_out = False
    config.search.steps, config.search.score_every, config.search.minibatch = 4, 4, 4
    config.search.budget = 4
    found = search(config, str(tmp_path), "the command")
    lines = tiny.log(tmp_path)
    warm, after = (
        np.array([line["genes"]["t"] for line in lines if line["origin"] == origin])
        for origin in ("warm-start", "search")
    )
    assert abs(warm[0] - 0.5) > 0.05
    assert abs(after.mean() - warm[1]) < 0.2
    highest = max(
        np.mean([*line["scores"].values()]) for line in lines if line["split"] == "search"
    )
    assert found["best"]["search_objective"] == pytest.approx(highest)
    # Two checkpoints and the uniform merge are weighted sums, before what has a t.
    assert ("genes" in found["best"]) == (found["best"]["id"] >= 3)


@pytest.mark.parametrize(
    ("method", "change", "named"),
    [
        ("ties", {"search.strategy": "gradient"}, "no derivatives"),
        ("arcee_fusion", {}, "takes another number of checkpoints"),
        ("model_stock", {}, "--mode=merge"),
        ("ties", {"pool.residency": "disk"}, r"pool\.residency"),
        ("ties", {"space.per_checkpoint": ("lambda",)}, r"(?s)space\.per_checkpoint.*density"),
        ("linear", {"space.per_checkpoint": ("density",)}, r"space\.per_checkpoint"),
        ("ties", {"pool.base": ""}, r"pool\.base"),
    ],
)
def test_what_does_not_go_is_refused_first(pool, tmp_path, method, change, named):
    config = config_of(pool, method)
    config.update_from_flattened_dict(change)
    with pytest.raises(JaxmergeError, match=named):
        search(config, str(tmp_path / "run"), "the command")
    assert not (tmp_path / "run").exists()


def test_weights_are_not_given(pool, tmp_path):
    with pytest.raises(JaxmergeError, match=r"merge\.genes\.weight"):
        search(config_of(pool, "ties", weight=1.0), str(tmp_path / "run"), "the command")
