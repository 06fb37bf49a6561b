"""What tools/bench_search.py compares: that both sides are asked the same, and answer the same."""

import jax
import pytest

from tools import bench_search_jaxmerge, bench_search_peers
from tools import bench_search_workload as workload

NEW_TOKENS = 4


@pytest.mark.slow
def test_jaxmerge_and_transformers_by_hand_give_the_same_answers(tmp_path):
    size = workload.Size(layers=2, width=32, feed_forward=48, heads=4, vocabulary=512)
    pool = workload.make_pool(tmp_path / "pool", size, checkpoints=2)
    workload.make_questions(tmp_path / "questions", workload.Counts(3, 3, NEW_TOKENS))
    job = {
        "pool": pool,
        "weights": [[0.75, 0.25]] * jax.device_count(),  # a candidate on each
        "questions": str(tmp_path / "questions"),
        "new_tokens": NEW_TOKENS,
        "dtype": "float32",
        "rounds": 1,
        "out": "",
    }
    asked = bench_search_jaxmerge.Job(what="candidates", devices=jax.device_count(), **job)
    ours = bench_search_jaxmerge.candidates(asked)
    peer = bench_search_peers.Job(peer="transformers", batch=2, warm=False, **job)
    theirs = bench_search_peers.measure(peer)
    assert ours["answers"] == theirs["answers"]
    assert len({*ours["answers"]["writing"]}) == 3
    assert all(took > 0 for took in (*ours["rounds"][0].values(), *theirs["rounds"][0].values()))
