"""What checkpoints answered: kept, shown, and looked at before a search begins."""

import contextlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from jaxmerge import config as configs
from jaxmerge import report
from jaxmerge.errors import JaxmergeError
from jaxmerge.evaluation.evaluator import Sample, Shown
from jaxmerge.experiment.answers import Answers, equal_scores
from jaxmerge.experiment.search import search
from jaxmerge.rundir import Candidate, RunDirectory
from tests import tiny
from tests.report.fabricated import fabricate


@pytest.mark.parametrize(
    ("scores_KxN", "said"),
    [
        ([[0, 0], [0, 0]], "all 2 checkpoints score 0, the least there is"),
        ([[0, 0, 0]], "the checkpoint scores 0"),
        ([[1, 0], [1, 0]], "all 2 checkpoints have the same score"),
        ([[1, 0], [1, 0], [1, 0], [0, 0]], "3 of 4 checkpoints have the same score"),
        ([[1, 1], [1, 1], [1, 1]], "all 3 checkpoints have the same score"),
        ([[1, 0], [1, 0], [0, 1]], ""),  # two of three may be chance
        ([[1, 0], [0, 1]], ""),  # equal in the mean alone
        ([[0.5, 0.5]], ""),
    ],
)
def test_checkpoints_that_are_equal(scores_KxN, said):
    found = equal_scores(np.array(scores_KxN, np.float32), 0.0)
    assert found.startswith(said) if said else found == ""


def test_scores_without_a_least():
    assert equal_scores(np.zeros((2, 3), np.float32), None).startswith("all 2 checkpoints have")


def _warned(path: Path, shares: Sequence[float], examples: int = 8) -> list[str]:
    """What is said of checkpoints that write `No.` for these shares of the examples."""
    scores_KxN = np.random.default_rng(0).random((len(shares), examples), np.float32)
    directory = RunDirectory(path, {})
    answers, lines = Answers(directory, "search"), []
    for k, share in enumerate(shares):
        first = (Shown("2 + 2?", "4", "No.", 0.0),)
        answers.add(f"m{k}", {"sums": Sample(first, "No.", share)})
        line = (k, 0, "individual", f"m{k}", "search", k, (1.0,), {"sums": 0.5}, {"sums": examples})
        lines.append(Candidate(*line, seconds=0.1))
    directory.append(lines, {"sums": scores_KxN})
    found = answers.warn(directory.candidates, {"sums": (0.0, 1.0)})
    assert directory.read_json("outputs.json")["warnings"] == found
    directory.close()
    return found


@pytest.mark.parametrize(
    ("shares", "who"),
    [
        ((1.0, 0.1, 0.95), "2 of 3 checkpoints write the same for nearly every example, m0 'No.'"),
        ((0.2, 0.9, 1.0), "2 of 3 checkpoints write the same for nearly every example, m1 'No.'"),
        ((0.9,), "1 of 1 checkpoints write the same for nearly every example, m0 'No.'"),
    ],
)
def test_answers_that_are_always_the_same(tmp_path, shares, who):
    """Though the scores differ, it is the task or the prompt that is wrong, mostly."""
    (warning,) = _warned(tmp_path, shares)
    assert warning.startswith(f"sums: {who}. The usual causes: an answer that is always the same")
    assert "m0 was asked '2 + 2?' and answered 'No.'; the target is '4'." in warning


@pytest.mark.parametrize(
    ("shares", "examples"),
    [((1.0, 0.1, 0.1), 8), ((1.0, 0.89), 8), ((0.0, 0.0), 8), ((1.0, 1.0), 7)],
)
def test_answers_of_one_checkpoint_or_of_few_examples_say_nothing(tmp_path, shares, examples):
    assert _warned(tmp_path, shares, examples) == []


FIRST = {"prompt": "2 + 2?", "target": "4", "output": "No.", "score": 0.0}
SAMPLE = {"first": [FIRST], "constant": "No.", "share": 1.0}


@pytest.mark.parametrize(
    "spoiled",
    [
        {"checkpoints": []},
        {"checkpoints": {"m0": {"sums": {**SAMPLE, "share": "all"}}}},
        {"checkpoints": {"m0": {"sums": {**SAMPLE, "constant": None}}}},
        {"checkpoints": {"m0": {"sums": {**SAMPLE, "first": [{**FIRST, "output": 3}]}}}},
        {"checkpoints": {"m0": {"sums": {"first": []}}}},
        {"checkpoints": {"m0": [SAMPLE]}},
        [],
    ],
    ids=str,
)
def test_answers_that_the_run_did_not_write(tmp_path, spoiled):
    """One message, of a run that goes on and of its page."""
    fabricate(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    file = tmp_path / "outputs.json"
    file.write_text(json.dumps({"split": "search", "warnings": [], "checkpoints": {}}))
    with contextlib.closing(RunDirectory(tmp_path, config)) as directory:
        Answers(directory, "search")
        report.write(tmp_path)
        file.write_text(json.dumps({"warnings": [], **spoiled} if spoiled else spoiled))
        with pytest.raises(JaxmergeError) as raised:
            Answers(directory, "search")
        assert str(file) in raised.value.where
        assert "the file as the run wrote it" in raised.value.expected


@pytest.mark.slow
def test_a_task_that_nobody_can_do(tmp_path, capsys):
    """It is pointed out before the search; the answers stand in the report, markup and all.

    Of a choice, each that there was, and how likely it was found.
    """
    lines = [{"prompt": f"<b>{i}</b>", "target": f"never {i}"} for i in range(60)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = tiny.run_config(configs.default(), tiny.pool(tmp_path / "pool", 2))
    config.tasks.hard = {"builder": "jsonl", "path": str(tmp_path / "q.jsonl")}
    config.objective.tasks, config.heldout = ("hard", "choice"), ()
    config.search.budget, config.baselines = 4, ()
    config.analyses.leave_one_out = config.analyses.transfer = False
    config.export.formats = ("orbax",)
    findings = search(config, str(tmp_path / "run"))
    said = capsys.readouterr().err
    (warning,) = [each for each in findings["warnings"] if each.startswith("hard: ")]
    assert warning in said
    for part in ("all 2 checkpoints score 0", "pool.chat", "until", "the target is 'never"):
        assert part in warning
    kept = json.loads((tmp_path / "run" / "outputs.json").read_text())
    assert kept["warnings"] == [warning]
    assert {*kept["checkpoints"]} == {"model0", "model1"}
    first = kept["checkpoints"]["model0"]["hard"]["first"]
    assert len(first) == 3
    assert first[0]["target"].startswith("never")
    page = report.write(tmp_path / "run").read_text()
    assert "What the checkpoints answered" in page
    assert f"<code>{first[0]['prompt'].replace('<', '&lt;').replace('>', '&gt;')}</code>" in page
    for shown in kept["checkpoints"]["model1"]["choice"]["first"]:
        lines = shown["output"].split("\n")
        assert 2 <= len(lines) <= 4
        assert all(re.fullmatch(r"-[0-9.]+ nats [a-z]+", line) for line in lines)
        assert any(line.endswith(f" {shown['target']}") for line in lines)
        assert f"<code>{shown['output']}</code>" in page
    (tmp_path / "run" / "results.json").unlink()
    assert "all 2 checkpoints score 0" in report.write(tmp_path / "run").read_text()
