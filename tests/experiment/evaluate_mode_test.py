"""Checkpoints scored by themselves: one, many, unlike ones, with resume and mistakes."""

import dataclasses
import json
import signal
import time
from pathlib import Path

import jax
import jsonschema
import numpy as np
import pytest

from jaxmerge import config as configs
from jaxmerge.checkpoints import orbax
from jaxmerge.checkpoints.pool import load
from jaxmerge.errors import JaxmergeError
from jaxmerge.experiment import evaluate as scoring
from jaxmerge.experiment.evaluate import evaluate
from jaxmerge.experiment.search import search as run
from jaxmerge.models.decoder import decoder
from tests import tiny
from tests.command import ROOT, Command

WIDER = dataclasses.replace(tiny.DECODER, width=24, layers=1)


class Killed(BaseException):
    """What a SIGKILL is in these tests."""


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Three checkpoints of one architecture and one of another."""
    directory = tiny.pool(tmp_path_factory.mktemp("pool"))
    (tree,) = tiny.trees(1, WIDER)
    orbax.save(directory / "wider", tree, architecture=decoder(WIDER).architecture)
    return directory


def _config(pool: Path, *names: str):
    config = tiny.run_config(configs.default(), pool)
    config.pool.checkpoints = tuple(str(pool / name) for name in names)
    return config


@pytest.fixture(scope="module")
def finished(pool, tmp_path_factory):
    """All four, scored."""
    workdir = tmp_path_factory.mktemp("scores") / "run"
    return workdir, evaluate(_config(pool, "model*", "wider"), str(workdir), "the command")


def test_the_scores_are_those_of_a_search(finished, pool, tmp_path):
    """Of its individuals on test, and of its best individual on the held-out task."""
    workdir, found = finished
    config = _config(pool, "model*")
    config.search.budget, config.baselines = 4, ()
    searched = run(config, str(tmp_path))
    for own, individual in zip(found["checkpoints"], searched["individuals"]):
        assert own["name"] == individual["name"]
        assert {task: own["test"][task] for task in searched["tasks"]} == individual["test"]
        assert own["test"]["objective"] == individual["test_objective"]
        assert {task: own["ci95"][task] for task in individual["ci95"]} == individual["ci95"]
        for task, score in individual["heldout"].items():
            assert own["test"][task] == score
    assert any(individual["heldout"] for individual in searched["individuals"])
    for task in searched["tasks"]:
        own, other = (
            np.fromfile(path / f"examples/test/{task}.f32", "<f4").reshape(-1, 20)
            for path in (workdir, tmp_path)
        )
        np.testing.assert_array_equal(own[:3], other[:3])


def test_what_is_written_follows_the_schema(finished):
    workdir, found = finished
    schema = json.loads((ROOT / "jaxmerge/report/evaluation.schema.json").read_text())
    written = json.loads((workdir / "evaluation.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(written, schema)
    assert written == json.loads(json.dumps(found))
    assert [entry["name"] for entry in written["checkpoints"]] == [
        *("model0", "model1", "model2", "wider")
    ]
    pooled = json.loads((workdir / "pool.json").read_text())["checkpoints"]
    assert [entry["fingerprint"] for entry in pooled] == [
        entry["fingerprint"] for entry in written["checkpoints"]
    ]


def test_the_first_answers_are_kept(finished):
    """Of each checkpoint and task; of a choice, the likelihoods that the verdict comes of."""
    workdir, found = finished
    kept = json.loads((workdir / "outputs.json").read_text())
    assert kept["split"] == "test"
    assert [*kept["checkpoints"]] == [one["name"] for one in found["checkpoints"]]
    made = {task.name: task.splits for task in (tiny.generation(), tiny.choice())}
    verdicts = set()
    for k, tasks in enumerate(kept["checkpoints"].values()):
        assert [*tasks] == ["generation", "choice", "unseen"]
        for task, splits in made.items():
            targets = {one.prompt: one.target for split in splits.values() for one in split}
            first = tasks[task]["first"]
            assert len(first) == 3
            assert all(targets[shown["prompt"]] == shown["target"] for shown in first)
            scores_KxN = np.fromfile(workdir / f"examples/test/{task}.f32", "<f4").reshape(4, 20)
            assert [shown["score"] for shown in first] == scores_KxN[k, :3].tolist()
        choices = {one.prompt: one.choices for split in made["choice"].values() for one in split}
        for shown in tasks["choice"]["first"]:
            lines = [line.split(" nats ") for line in shown["output"].split("\n")]
            assert sorted(text for _, text in lines) == sorted(choices[shown["prompt"]])
            nats = [float(number) for number, _ in lines]
            assert nats == sorted(nats, reverse=True)
            _, best = max((float(number) / len(text), text) for number, text in lines)
            assert shown["score"] == (best == shown["target"])
            verdicts.add(shown["score"])
    assert verdicts == {0, 1}


def test_a_checkpoint_that_always_writes_the_same_is_pointed_out(tmp_path, capsys):
    """Its logits are all 0; it scores 1, which no score would tell."""
    (tree,) = tiny.trees(1)
    tree["final_norm"] = jax.tree.map(lambda leaf: leaf * 0, tree["final_norm"])
    orbax.save(tmp_path / "mute", tree, architecture=tiny.model().architecture)
    config = _config(tmp_path, "mute")
    config.heldout = ()
    found = evaluate(config, str(tmp_path / "run"))
    (warning,) = [each for each in found["warnings"] if each.startswith("generation: ")]
    assert "1 of 1 checkpoints write the same for nearly every example, mute" in warning
    assert found["checkpoints"][0]["test"]["generation"] > 0
    assert f"jaxmerge: {warning}" in capsys.readouterr().err


def test_one_checkpoint_is_scored_as_among_others(finished, pool, tmp_path):
    """It has the architecture that the others have not."""
    found = evaluate(_config(pool, "wider"), str(tmp_path / "run"))
    (alone,) = found["checkpoints"]
    among = finished[1]["checkpoints"][3]
    assert {**alone, "seconds": 0} == {**among, "seconds": 0}


def test_the_table(finished):
    lines = scoring.table(finished[1]).split("\n")
    assert lines[0].split() == ["test", "scores,", "%", "generation", "choice", "unseen", "mean"]
    last = finished[1]["checkpoints"][3]
    low, high = last["ci95"]["objective"]
    expected = f"{100 * last['test']['objective']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    assert lines[-1].startswith("wider ")
    assert lines[-1].endswith(expected)
    assert len(lines) == 6


def test_an_aggregate_is_shown_where_it_says_something(finished, pool, tmp_path):
    """Not of one task, and not one that is measured by a pool."""
    for name, fields in (
        ("one", {"tasks": ("choice",)}),
        ("relative", {"aggregate": "chebyshev"}),
    ):
        config = _config(pool, "model0")
        config.objective.update(fields)
        found = evaluate(config, str(tmp_path / name))
        assert found["objective"] is None
        assert "objective" not in found["checkpoints"][0]["test"]
        assert scoring.table(found).split("\n")[0].split()[-1] == "unseen"
    config = _config(pool, "model0")
    config.objective.aggregate = "worst"
    found = evaluate(config, str(tmp_path / "worst"))
    scores = finished[1]["checkpoints"][0]["test"]
    worst = min(scores["generation"], scores["choice"])
    assert found["checkpoints"][0]["test"]["objective"] == worst


def test_killed_it_goes_on_and_one_model_is_in_memory(finished, pool, tmp_path, monkeypatch):
    """What was scored is not loaded again; before each is loaded the last has been let go."""
    loaded, alive = [], []

    def watched(sources, *arguments, **named):
        if len(loaded) == 2:
            loaded.append("")
            raise Killed
        loaded.append(sources[0].name)
        alive.append(sum(array.nbytes for array in jax.live_arrays()))
        return load(sources, *arguments, **named)

    monkeypatch.setattr(scoring, "load", watched)
    config = _config(pool, "model*", "wider")
    with pytest.raises(Killed):
        evaluate(config, str(tmp_path / "run"))
    partial = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert len(partial["checkpoints"]) == 2
    again = evaluate(config, str(tmp_path / "run"))
    assert loaded == ["model0", "model1", "", "model2", "wider"]
    assert max(alive) == min(alive)
    for one, other in zip(again["checkpoints"], finished[1]["checkpoints"]):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    monkeypatch.setattr(scoring, "load", None)  # a finished one is only read
    assert evaluate(config, str(tmp_path / "run")) == again


def test_a_checkpoint_that_changed_under_a_kill_is_refused(pool, tmp_path, monkeypatch):
    """Killed between pool.json and the log: the checkpoint is scored again, if it is the same."""
    config = _config(pool, "model0")
    scoring_append = scoring.RunDirectory.append

    def killed(*_):
        raise Killed

    monkeypatch.setattr(scoring.RunDirectory, "append", killed)
    with pytest.raises(Killed):
        evaluate(config, str(tmp_path / "run"))
    monkeypatch.setattr(scoring.RunDirectory, "append", scoring_append)
    record = tmp_path / "run/pool.json"
    text = record.read_text()
    fingerprint = json.loads(text)["checkpoints"][0]["fingerprint"]
    record.write_text(text.replace(fingerprint, "0" * len(fingerprint)))
    with pytest.raises(JaxmergeError, match="fingerprint 0000"):
        evaluate(config, str(tmp_path / "run"))
    record.write_text(text)
    assert len(evaluate(config, str(tmp_path / "run"))["checkpoints"]) == 1


def test_another_run_is_refused(finished, pool, tmp_path):
    workdir, _ = finished
    config = _config(pool, "model*", "wider")
    config.evaluate.batch_size = 4
    with pytest.raises(JaxmergeError, match=r"evaluate\.batch_size: 8 there, 4 now"):
        evaluate(config, str(workdir))
    config = _config(pool, "model*")
    config.search.budget, config.baselines, config.heldout = 4, (), ()
    config.evaluate.candidates_per_step = 1  # what 0 stands for would differ first
    run(config, str(tmp_path / "search"))
    with pytest.raises(JaxmergeError, match="individual of model0"):
        evaluate(config, str(tmp_path / "search"))
    evaluate(config, str(tmp_path / "scores"))
    with pytest.raises(JaxmergeError, match="evaluation"):
        run(config, str(tmp_path / "scores"))


def test_mistakes_write_nothing(pool, tmp_path):
    missing = _config(pool, "model0", "nowhere")
    no_examples = _config(pool, "model0")
    no_examples.tasks.choice.test = 0
    for config, named in ((missing, "nowhere"), (no_examples, r"task choice.*no examples")):
        with pytest.raises(JaxmergeError, match=named):
            evaluate(config, str(tmp_path / "run"))
        assert not (tmp_path / "run").exists()


LIST = "config.pool.checkpoints = tuple(config.pool.checkpoints[0][:-1] + name for name in {names})"


def test_a_checkpoint_that_does_not_load_ends_the_command(pool, tmp_path):
    """One message, exit code 2, and the scores of those before it."""
    broken = tiny.pool(tmp_path / "pool")
    data = max((broken / "model1").rglob("d/*"), key=lambda file: file.stat().st_size)
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    command = Command(tmp_path, broken)
    code, out, err = command.run("--mode=evaluate")
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    assert str(broken / "model1") in err
    written = json.loads((command.workdir / "evaluation.json").read_text())
    assert [entry["name"] for entry in written["checkpoints"]] == ["model0"]
    (broken / "model1").rename(tmp_path / "gone")
    code, out, err = Command(tmp_path, broken, LIST.format(names=("model0", "model1"))).run(
        "--mode=evaluate"
    )
    assert code == 2
    assert str(broken / "model1") in err


@pytest.mark.slow
def test_killed_at_an_instant_it_ends_the_same(finished, pool, tmp_path):
    command = Command(tmp_path, pool, LIST.format(names=("model*", "wider")))
    process = command.start("--mode=evaluate")
    log = command.workdir / "candidates.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    lines = log.read_text().splitlines()
    assert 0 < len(lines) < 4
    code, out, err = command.run("--mode=evaluate")
    assert code == 0, err
    assert "wider" in out
    assert log.read_text().splitlines()[: len(lines)] == lines
    written = json.loads((command.workdir / "evaluation.json").read_text())
    for one, other in zip(written["checkpoints"], finished[1]["checkpoints"]):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
