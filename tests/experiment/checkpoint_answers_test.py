"""What checkpoints answered: kept, shown, and looked at before a search begins."""

import json

import numpy as np
import pytest

from jaxmerge import config as configs
from jaxmerge import report
from jaxmerge.experiment.answers import equal_scores
from jaxmerge.experiment.search import search
from tests import tiny


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


@pytest.mark.slow
def test_a_task_that_nobody_can_do(tmp_path, capsys):
    """It is pointed out before the search; the answers stand in the report, markup and all."""
    lines = [{"prompt": f"<b>{i}</b>", "target": f"never {i}"} for i in range(60)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = tiny.run_config(configs.default(), tiny.pool(tmp_path / "pool", 2))
    config.tasks.hard = {"builder": "jsonl", "path": str(tmp_path / "q.jsonl")}
    config.objective.tasks, config.heldout = ("hard", "generation"), ()
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
    (tmp_path / "run" / "results.json").unlink()
    assert "all 2 checkpoints score 0" in report.write(tmp_path / "run").read_text()
