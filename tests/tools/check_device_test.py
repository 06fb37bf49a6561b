"""The table of a device: here the CPU beside itself, and one that computes something else."""

import json

import jax
import numpy as np
import pytest

from tools import check_device


@pytest.mark.slow
def test_a_table_with_the_best_settings(tmp_path, capsys):
    written = tmp_path / "rows.json"
    assert check_device.main(["--size=tiny", f"--json={written}"]) == 0
    shown = capsys.readouterr().out
    told = json.loads(written.read_text())
    assert (told["platform"], told["jax"]) == ("cpu", jax.__version__)
    assert all(row["what"] in shown and row["said"] in shown for row in told["rows"])
    judged = [row["right"] for row in told["rows"] if row["right"] is not None]
    assert judged == [True] * 5  # merges in three types, logits and derivatives in full precision
    tried = [row["what"] for row in told["rows"] if "candidates" in row["what"]]
    assert tried == ["2 candidates, one at a time, 8 rows", "2 candidates, side by side, 8 rows"]
    assert "times a merge and a pass forward" in told["rows"][-1]["said"]
    assert told["best"].keys() == {
        "evaluate.candidates_per_step",
        "evaluate.batch_size",
        "evaluate.vmap_candidates",
    }


def test_what_differs_is_wrong(monkeypatch):
    def spoil(part, spoiled):
        right, calls = getattr(check_device, part), []

        def first_spoiled(dtype):
            """The device is asked before the CPU."""
            calls.append(dtype)
            return spoiled(right(dtype)) if len(calls) == 1 else right(dtype)

        monkeypatch.setattr(check_device, part, first_spoiled)

    spoil("_merged", lambda bits: bits + np.ones_like(bits))
    spoil("_logits_and_derivatives", lambda found: [1.001 * each for each in found])
    rows = check_device.agreements(jax.devices()[0])
    assert [row.what for row in rows if row.right is False] == [
        "merge of float32",
        "logits in float32, highest precision",
        "derivatives in float32, highest precision",
    ]
