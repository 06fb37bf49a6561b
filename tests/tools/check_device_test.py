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


@pytest.mark.parametrize("part", ["_merged", "_logits_and_derivatives"])
def test_what_differs_is_wrong(monkeypatch, part):
    right, calls = getattr(check_device, part), []

    def once_wrong(dtype):
        """The device is asked first."""
        found = right(dtype)
        calls.append(dtype)
        wrong = len(calls) == 1
        return (
            [each * (1 + wrong * 1e-3) for each in found]
            if isinstance(found, list)
            else (found + np.asarray(wrong, found.dtype))
        )

    monkeypatch.setattr(check_device, part, once_wrong)
    rows = [*check_device.agreements(jax.devices()[0])]
    first = {"_merged": ["merge of float32"]}.get(
        part, ["logits in float32, highest precision", "derivatives in float32, highest precision"]
    )
    assert [row.what for row in rows if row.right is False] == first
