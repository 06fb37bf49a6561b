"""Whole runs on a tiny pool: results, resume, export, meshes, errors."""

import importlib.util
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from jaxmerge import config as configs
from jaxmerge.checkpoints import orbax
from jaxmerge.checkpoints.survey import survey
from jaxmerge.errors import JaxmergeError
from jaxmerge.experiment.prepare import prepare
from jaxmerge.experiment.search import search as run
from jaxmerge.merge.linear import linear
from tests import tiny
from tests.command import ROOT, Command


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return tiny.pool(tmp_path_factory.mktemp("pool"))


@pytest.fixture(scope="module")
def finished(pool, tmp_path_factory):
    """A finished run: its directory and what it found."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, run(tiny.run_config(configs.default(), pool), str(workdir), "the command")


def test_results_follow_the_schema(finished):
    workdir, found = finished
    schema = json.loads((ROOT / "jaxmerge/report/results.schema.json").read_text())
    written = json.loads((workdir / "results.json").read_text())
    jsonschema.validate(written, schema)
    assert written == json.loads(json.dumps(found))


def test_the_log_has_every_evaluation(finished):
    workdir, found = finished
    log = tiny.log(workdir)
    # 3 individuals; uniform, best per task, 2 greedy, 12 random; 12 searched (3 generations of 4);
    # on test 3 + 4 + 1, held out 3.
    origins = [line["origin"] for line in log]
    analysed = [origin for origin in origins if origin.startswith("analysis:")]
    of_run = origins[: len(origins) - len(analysed)]
    assert {origin: of_run.count(origin) for origin in of_run} == {
        "individual": 3,
        "baseline:uniform": 1,
        "baseline:best-per-task": 1,
        "baseline:greedy": 2,
        "baseline:random": 12,
        "search": 12,
        "final": 11,
    }
    assert found["evaluations"] == 31
    # Without each of 3, and for the one pair of tasks a merge that may be the winner.
    assert analysed[:3] == ["analysis:leave-one-out"] * 3
    assert sum(found["analyses"]["evaluations"].values()) == len(analysed)
    assert {origin: found["evaluations_by_origin"].get(origin) for origin in analysed} == (
        dict.fromkeys(analysed)
    )


def test_tokens_are_counted(finished):
    """Each question once and all its choices after it; written: 6 for each text at most."""
    workdir, found = finished
    log = tiny.log(workdir)
    written = tiny.generation(search=10, test=20).splits["search"]
    asked = tiny.choice(search=10, test=20).splits["search"]
    read = sum(len(example.prompt) for example in [*written, *asked])
    read += sum(len(option) - 1 for example in asked for option in example.choices)
    searched = {}
    for line in log:
        if line["split"] == "search":
            searched.setdefault(tuple(line["weights"]), []).append(line["tokens"])
    for first, *copies in searched.values():  # the same weights are scored once
        assert first["read"] == read
        assert 0 < first["written"] <= 60
        assert all(tokens == {"read": 0, "written": 0} for tokens in copies)
    for kind in ("read", "written"):
        assert found["tokens"][kind] == sum(line["tokens"][kind] for line in log)


def test_every_analysis_of_a_run(finished, pool, tmp_path):
    """With a search over the best 2 of 3: the run itself is as without."""
    config = tiny.run_config(configs.default(), pool)
    config.analyses.pool_sizes, config.analyses.pool_size_budget = (2,), 9
    config.tensorboard = True
    found = run(config, str(tmp_path))
    schema = json.loads((ROOT / "jaxmerge/report/results.schema.json").read_text())
    jsonschema.validate(json.loads((tmp_path / "results.json").read_text()), schema)
    apart = ("analyses", "seconds", "tokens", "command")
    for field in set(found) - set(apart):
        assert found[field] == finished[1][field], field
    smaller, whole = found["analyses"]["pool_size"]
    assert (smaller["m"], smaller["evaluations"]) == (2, 8)  # 2 generations of 4
    assert (whole["id"], whole["test"]) == (found["best"]["id"], found["best"]["test"])
    (pair,) = found["analyses"]["transfer"]
    assert pair["test"].keys() == {"generation", "choice", "unseen"}
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


@pytest.mark.parametrize(
    ("sizes", "budget", "named"),
    [
        ((2, 3), 0, "analyses.pool_sizes"),
        ((2, 2), 0, "analyses.pool_sizes"),
        ((1,), 0, "analyses.pool_sizes"),
        ((2,), 3, "analyses.pool_size_budget"),
    ],
)
def test_pool_sizes_that_cannot_be_are_refused(pool, tmp_path, sizes, budget, named):
    config = tiny.run_config(configs.default(), pool)
    config.analyses.pool_sizes, config.analyses.pool_size_budget = sizes, budget
    with pytest.raises(JaxmergeError) as caught:
        prepare(config, str(tmp_path / "run"))
    assert caught.value.where == named
    assert not (tmp_path / "run").exists()


def test_search_and_test_never_share_an_example(finished):
    """The test scores are of other examples than the search scores, and of all of them."""
    log = tiny.log(finished[0])
    assert {line["n"]["generation"] for line in log if line["split"] == "search"} == {10}
    assert {line["n"]["generation"] for line in log if line["split"] == "test"} == {20}
    task = tiny.generation(search=10, test=20)
    prompts = {split: {example.prompt for example in task.splits[split]} for split in task.splits}
    assert not prompts["search"] & prompts["test"]


def test_scores_of_individuals_are_those_of_the_checkpoints(finished):
    """Choice by choice, against a plain forward pass."""
    workdir, _ = finished
    choice = tiny.choice(search=10, test=20)
    apply = jax.jit(tiny.model().apply)
    params = tiny.trees(3)[1]
    expected = []
    for example in choice.splits["search"]:
        rated = []
        for option in example.choices:
            text = (example.prompt + option).encode()
            tokens = jnp.array([list(text.ljust(30, b"?"))])  # causal: what follows does not count
            log_p = np.asarray(jax.nn.log_softmax(apply(params, tokens))[0])
            scored = range(len(example.prompt), len(text))
            rated.append(sum(log_p[t - 1, text[t]] for t in scored) / len(option))
        expected.append(float(example.choices[int(np.argmax(rated))] == example.target))
    scores = np.fromfile(workdir / "examples/search/choice.f32", "<f4").reshape(-1, 10)
    np.testing.assert_array_equal(scores[1], expected)


def test_report_and_table(finished):
    workdir, _ = finished
    html = (workdir / "report.html").read_text()
    assert "model1" in html
    assert "http://" not in html.split("<script")[0]


def test_the_export_is_the_merge_and_a_pool_member(finished, pool, tmp_path):
    workdir, found = finished
    merged = workdir / "merged" / "orbax"
    source = orbax.describe("merged", orbax.absolute(merged))
    restored = orbax.restore(source, jax.tree.map(_on_first_device, source.abstract))
    weights = np.array(list(found["best"]["weights"].values()), np.float32)
    expected = linear(tiny.trees(3), weights)
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
    sources = survey([f"{pool}/*", str(merged)])
    assert [source.name for source in sources] == ["model0", "model1", "model2", "orbax"]
    config = tiny.run_config(configs.default(), pool)
    config.pool.checkpoints = (f"{pool}/*", str(merged))
    config.search.budget, config.baselines, config.heldout = 4, (), ()
    again = run(config, str(tmp_path / "again"))
    individual = next(entry for entry in again["individuals"] if entry["name"] == "orbax")
    assert individual["search"] == found["best"]["search"]


def _on_first_device(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)


def test_a_model_that_is_only_an_apply(finished, tmp_path):
    """Plain Orbax checkpoints and an import path give the scores that our own format gives."""
    for k, tree in enumerate(tiny.trees(3)):
        ocp.save(tmp_path / f"pool/model{k}", {"params": tree, "step": k})
    config = tiny.run_config(configs.default(), tmp_path / "pool")
    config.pool.subtree, config.pool.model = "params", "tests.tiny:plain_apply"
    config.search.budget, config.baselines, config.heldout = 4, (), ()
    found = run(config, str(tmp_path / "run"))
    own = finished[1]["individuals"]
    assert [one["search"] for one in found["individuals"]] == [one["search"] for one in own]


def test_a_finished_run_is_not_run_again(finished, pool, compilations):
    workdir, found = finished
    log = (workdir / "candidates.jsonl").read_bytes()
    again = run(tiny.run_config(configs.default(), pool), str(workdir), "the command")
    assert (workdir / "candidates.jsonl").read_bytes() == log
    assert {**again, "seconds": 0} == {**found, "seconds": 0}


def test_another_pool_is_refused(finished, tmp_path):
    """The same paths with other contents are not the same run."""
    workdir, _ = finished
    config = json.loads((workdir / "config.json").read_text())
    (pattern,) = config["pool"]["checkpoints"]
    original = Path(pattern).parent
    moved = original.rename(tmp_path / "moved")
    try:
        for k, tree in enumerate(tiny.trees(3, scale=2.0)):
            orbax.save(original / f"model{k}", tree, architecture=tiny.model().architecture)
        with pytest.raises(JaxmergeError, match="fingerprint"):
            run(tiny.run_config(configs.default(), original), str(workdir))
    finally:
        original.rename(tmp_path / "other")
        moved.rename(original)


def test_other_examples_are_refused(pool, tmp_path):
    """The same file with other questions is not the same run, whichever of its scores are there."""
    path, lines = tmp_path / "task.jsonl", [{"prompt": f"p{n}", "target": "a"} for n in range(12)]
    path.write_text("\n".join(map(json.dumps, lines)))
    config = tiny.run_config(configs.default(), pool)
    config.tasks.own = {"builder": "jsonl", "path": str(path), "max_new_tokens": 2}
    config.objective.tasks = ("own",)
    prepare(config, str(tmp_path / "run")).directory.close()
    prepare(config, str(tmp_path / "run")).directory.close()
    path.write_text("\n".join(map(json.dumps, [*lines[:-1], {"prompt": "q", "target": "a"}])))
    with pytest.raises(JaxmergeError, match="the examples are not those") as caught:
        prepare(config, str(tmp_path / "run"))
    assert caught.value.where == "task own"


@pytest.mark.parametrize("axes", [(2, 1, 2, 2), (2, 2, 2, 1), (4, 1, 1, 1)])
def test_every_mesh_gives_the_same_candidates(finished, pool, tmp_path, axes):
    """The log is that of one device, scores included.

    Splitting a matrix product over `fsdp` or `tensor` changes the order of its sums, so logits
    move by about 1e-6 of their size; a score moves only where two tokens or two choices are nearer
    to each other than that, which no example of these tasks is.
    """
    config = tiny.run_config(configs.default(), pool)
    config.mesh = dict(zip(("pop", "data", "fsdp", "tensor", "cpu_devices"), (*axes, 0)))
    run(config, str(tmp_path))
    assert tiny.log(tmp_path) == tiny.log(finished[0])


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem
)
def test_every_config_runs_in_its_tiny_form(path, pool, tmp_path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = run(tiny.run_config(module.get_config(), pool), str(tmp_path))
    assert found["best"]["test_objective"] > 0


@pytest.mark.slow
def test_killed_at_random_instants_it_ends_the_same(pool, tmp_path):
    """SIGKILL, then the same command, until it ends; as one run that was never stopped."""
    (tmp_path / "whole").mkdir()
    whole = Command(tmp_path / "whole", pool)
    code, out, err = whole.run()
    assert code == 0, err
    assert "test scores" in out
    (tmp_path / "killed").mkdir()
    killed = Command(tmp_path / "killed", pool)
    instants = random.Random(0)
    kills = 0
    for _ in range(3):
        process = killed.start()
        log = killed.workdir / "candidates.jsonl"
        lines_before = len(log.read_text().splitlines()) if log.exists() else 0
        # Wait for the first new candidate, so that each try gets somewhere; then any moment.
        while process.poll() is None:
            if log.exists() and len(log.read_text().splitlines()) > lines_before:
                break
            time.sleep(0.01)
        time.sleep(instants.uniform(0, 0.5))
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert kills >= 2
    code, _, err = killed.run()
    assert code == 0, err
    assert tiny.log(killed.workdir) == tiny.log(whole.workdir)
    results = [json.loads((c.workdir / "results.json").read_text()) for c in (whole, killed)]
    assert results[0]["best"] == results[1]["best"]


@pytest.mark.parametrize(
    ("change", "flags", "named"),
    [
        ("", ["--config.serach.budget=3"], "search"),
        ("config.search.bugdet = 3", [], "budget"),
        ("", ["--config.search.budget=many"], "budget"),
        ("config.pool.checkpoints = ('/nowhere/at/all',)", [], "/nowhere/at/all"),
        ("config.objective.search_examples = 0", [], "objective.search_examples"),
        ("config.evaluate.batch_size = -1", [], "evaluate.batch_size"),
        ("config.tasks.choice.builder = 'tests.tiny:chioce'", [], "tests.tiny:chioce"),
        ("config.objective.tasks = ('generatoin',)", [], "generatoin"),
        ("config.search.strategy = 'CMAES'", [], "CMA_ES"),
    ],
)
def test_mistakes_end_in_one_message(pool, tmp_path, change, flags, named):
    command = Command(tmp_path, pool, change)
    code, out, err = command.run(*flags)
    assert code == 2, err
    assert named in err
    assert "Traceback" not in err
    assert out == ""
    assert not command.workdir.exists()


@pytest.mark.parametrize("mode", ["search", "evaluate", "merge"])
def test_a_platform_that_is_not_there(pool, tmp_path, monkeypatch, mode):
    """One message, whatever the mode, and nothing is written."""
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    change = "config.mesh.cpu_devices, config.merge.weights = 0, (0.5, 0.25, 0.25)"
    command = Command(tmp_path, pool, change)
    code, out, err = command.run(f"--mode={mode}")
    assert code == 2, err
    assert "jaxmerge: JAX_PLATFORMS=tpu: JAX finds no device to run on" in err
    assert "mesh.cpu_devices = 1" in err
    assert "Traceback" not in err
    assert out == ""
    assert not command.workdir.exists()


def test_a_truncated_checkpoint_ends_in_one_message(tmp_path):
    """Orbax's other reads of that checkpoint end after the error; nothing of them is shown."""
    broken = tiny.pool(tmp_path / "pool")
    data = max((broken / "model1").rglob("d/*"), key=lambda file: file.stat().st_size)
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    command = Command(tmp_path, broken)
    code, out, err = command.run()
    assert code == 2
    assert out == ""
    sizes, what, expected, found = err.splitlines()  # sizes are said before anything is loaded
    assert sizes.startswith("jaxmerge: evaluate.")
    heads = [line.split(":")[0].strip() for line in (what, expected, found)]
    assert heads == ["jaxmerge", "expected", "found"]
    assert str(broken / "model1") in err
    assert not command.workdir.exists()


def test_help_explains_itself():
    shown = subprocess.run(
        [sys.executable, "-m", "jaxmerge.run", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "--workdir" in shown
    assert "config.search.budget_tokens = 0" in shown


def test_a_broken_pool_writes_nothing(pool, tmp_path):
    """NaN in one checkpoint is found on load, before the run directory is made."""
    broken = tmp_path / "pool"
    tiny.pool(broken, 2)
    bad = tiny.trees(1)[0]
    bad["layers"]["up"] = bad["layers"]["up"].at[1, 2, 3].set(np.nan)
    orbax.save(broken / "sick", bad, architecture=tiny.model().architecture)
    with pytest.raises(JaxmergeError, match=r"sick.*NaN.*layers/up"):
        run(tiny.run_config(configs.default(), broken), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_an_empty_split_writes_nothing(pool, tmp_path):
    config = tiny.run_config(configs.default(), pool)
    config.tasks.choice.search = 0
    with pytest.raises(JaxmergeError, match=r"task choice.*no examples"):
        run(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
