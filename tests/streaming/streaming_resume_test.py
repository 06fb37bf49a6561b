"""Merges that were stopped go on; what is finished is checked; memory does not grow."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxmerge.checkpoints import safetensors
from jaxmerge.errors import JaxmergeError
from jaxmerge.experiment import merge as merging
from jaxmerge.experiment.merge import merge
from jaxmerge.streaming import pipeline
from jaxmerge.streaming.finished import Finished
from tests.streaming.streaming_test import WEIGHTS, config_of, make, save, tensors_of

ROWS = (WEIGHTS, (0.0, 1.0, 0.0))
ROOT = Path(__file__).parents[2]

# Merges, and says when it begins: then nothing is left but the merge itself.
CHILD = """
    import sys
    from jaxmerge.experiment import merge as merging
    from jaxmerge.streaming import merge as streaming
    from tests.streaming.streaming_test import config_of
    from tests.streaming.streaming_resume_test import ROWS

    begin = streaming.merge

    def told(*args, **options):
        print("begins", flush=True)
        found = begin(*args, **options)
        print("ends", flush=True)
        return found

    streaming.merge = told
    config = config_of(sys.argv[1], ROWS, shard_bytes=20_000)
    merging.merge(config, sys.argv[2])
"""


def child(models: Path, run: Path) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", textwrap.dedent(CHILD), str(models), str(run)]
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def files_of(run: Path) -> dict[str, bytes]:
    """All that a run has merged, partial merges included."""
    merged = run / "merged"
    return {
        str(path.relative_to(merged)): path.read_bytes()
        for path in sorted(merged.rglob("*"))
        if path.is_file()
    }


@pytest.mark.slow
def test_killed_at_any_instant_it_ends_with_the_same_bytes(tmp_path):
    models = make(tmp_path / "models")
    with child(models, tmp_path / "whole") as whole:
        assert whole.stdout
        assert whole.stdout.readline() == "begins\n"
        began = time.perf_counter()
        assert whole.stdout.readline() == "ends\n"
        seconds = time.perf_counter() - began
    rng, partial = random.Random(0), 0
    for number in range(4):
        with child(models, tmp_path / "run") as killed:
            assert killed.stdout
            assert killed.stdout.readline() == "begins\n"
            time.sleep(seconds * (0.1 + rng.random() * number / 4))
            killed.send_signal(signal.SIGKILL)
        partial += (tmp_path / "run" / "merged" / "0" / ".huggingface.partial").exists()
    assert partial  # or the kills came too early or too late to test anything
    with child(models, tmp_path / "run") as last:
        assert last.communicate()[0] == "begins\nends\n"
    assert files_of(tmp_path / "run") == files_of(tmp_path / "whole")


def stopped(models: Path, run: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """A merge that fails, as with a full disk, when it has finished some of its files."""
    writing, count = pipeline.Pipeline.merge, 0

    def fail(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count > after:
            raise OSError(28, "No space left on device")
        return writing(*args)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.Pipeline, "merge", fail)
        with pytest.raises(JaxmergeError, match="can't be written") as caught:
            merge(config_of(models, ROWS, shard_bytes=20_000), str(run))
        assert "No space left" in caught.value.found


def merged_files(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The names of the tensors of each file that is merged from now on."""
    merged, begin = [], pipeline.Pipeline.merge

    def note(each: Any, parts: Any, *args: Any) -> Any:
        merged.append([part.name for part in parts])
        return begin(each, parts, *args)

    monkeypatch.setattr(pipeline.Pipeline, "merge", note)
    return merged


def test_what_is_finished_is_not_done_again(tmp_path, monkeypatch):
    models = make(tmp_path / "models")
    merge(config_of(models, ROWS, shard_bytes=20_000), str(tmp_path / "whole"))
    files = sorted((tmp_path / "whole" / "merged" / "0" / "huggingface").glob("*.safetensors"))
    assert len(files) == 2
    stopped(models, tmp_path / "run", monkeypatch, after=1)
    assert not (tmp_path / "run" / "merged" / "0" / "huggingface").exists()
    merged = merged_files(monkeypatch)
    merge(config_of(models, ROWS, shard_bytes=20_000), str(tmp_path / "run"))
    assert len(merged) == 1
    assert files_of(tmp_path / "run") == files_of(tmp_path / "whole")
    records = [(tmp_path / name / "pool.json").read_text() for name in ("run", "whole")]
    assert records[0] == records[1]


@pytest.mark.parametrize("damage", ["value", "header", "length", "missing"])
def test_a_finished_file_that_is_damaged_is_made_again(tmp_path, monkeypatch, damage):
    models = make(tmp_path / "models")
    merge(config_of(models, ROWS, shard_bytes=20_000), str(tmp_path / "whole"))
    stopped(models, tmp_path / "run", monkeypatch, after=1)
    (file,) = (
        path
        for path in (tmp_path / "run" / "merged" / "1" / ".huggingface.partial").iterdir()
        if path.name.startswith("model-00001")
    )
    data = bytearray(file.read_bytes())
    if damage == "value":
        data[-1] ^= 1
    if damage == "header":
        data[20] ^= 1
    file.write_bytes(data[:-2] if damage == "length" else data)
    if damage == "missing":
        file.unlink()
    merged = merged_files(monkeypatch)
    merge(config_of(models, ROWS, shard_bytes=20_000), str(tmp_path / "run"))
    assert len(merged) == 2
    assert files_of(tmp_path / "run") == files_of(tmp_path / "whole")


def test_other_checkpoints_are_merged_from_the_start(tmp_path, monkeypatch):
    models = make(tmp_path / "models")
    stopped(models, tmp_path / "run", monkeypatch, after=1)
    tensors = tensors_of(models / "m0")
    save(models / "m0", {**tensors, "wide": -tensors["wide"]})
    later = os.stat(models / "m0" / "model.safetensors").st_mtime + 5
    os.utime(models / "m0" / "model.safetensors", (later, later))
    merge(config_of(models, ROWS, shard_bytes=20_000), str(tmp_path / "run"))
    merge(config_of(models, ROWS, shard_bytes=20_000), str(tmp_path / "whole"))
    assert files_of(tmp_path / "run") == files_of(tmp_path / "whole")


def test_again_when_all_is_done(tmp_path, monkeypatch):
    models = make(tmp_path / "models")
    paths = merge(config_of(models, ROWS), str(tmp_path / "run"))
    before, merged = files_of(tmp_path / "run"), merged_files(monkeypatch)
    assert merge(config_of(models, ROWS), str(tmp_path / "run")) == paths
    assert files_of(tmp_path / "run") == before
    assert not merged


def test_a_merge_that_is_damaged_after_it_was_done(tmp_path):
    models = make(tmp_path / "models")
    paths = merge(config_of(models, ROWS), str(tmp_path / "run"))
    file = paths[1] / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(JaxmergeError, match="not the one that was written") as caught:
        merge(config_of(models, ROWS), str(tmp_path / "run"))
    assert caught.value.where == str(file)


def test_a_run_directory_that_was_moved(tmp_path, monkeypatch):
    models = make(tmp_path / "models")
    merge(config_of(models, ROWS), str(tmp_path / "run"))
    before, merged = files_of(tmp_path / "run"), merged_files(monkeypatch)
    (tmp_path / "run").rename(tmp_path / "moved")
    merge(config_of(models, ROWS), str(tmp_path / "moved"))
    assert files_of(tmp_path / "moved") == before
    assert not merged


def test_a_checkpoint_that_changed_after_the_merge_was_done(tmp_path):
    """It is named, again and again, with what it was; and the merge is made anew without it."""
    models = make(tmp_path / "models")
    paths = merge(config_of(models, ROWS), str(tmp_path / "run"))
    file = models / "m1" / "model.safetensors"
    size = file.stat().st_size
    os.utime(file, (1_000_000_000, 1_000_000_000))
    for _ in range(2):
        with pytest.raises(JaxmergeError, match="not those that the merge here was made of") as it:
            merge(config_of(models, ROWS), str(tmp_path / "run"))
        assert it.value.where == str(paths[0])
        assert it.value.found == f"{file} of {size} bytes and 2001-09-09 01:46:40 UTC"
        assert it.value.expected.startswith(f"{file} of {size} bytes and 2")
        assert it.value.expected != it.value.found
    for path in paths:
        path.rename(tmp_path / path.parent.name)
    assert merge(config_of(models, ROWS), str(tmp_path / "run")) == paths


def test_one_of_several_merges_is_taken_away(tmp_path):
    """It alone is made again, and what is known of the other stays known."""
    models = make(tmp_path / "models")
    config = config_of(models, ROWS)
    paths = merge(config, str(tmp_path / "run"))
    before = files_of(tmp_path / "run")
    paths[0].rename(tmp_path / "elsewhere")
    kept = (paths[1] / "model.safetensors").stat().st_ino
    for _ in range(2):
        merge(config, str(tmp_path / "run"))
        assert files_of(tmp_path / "run") == before
        assert (paths[1] / "model.safetensors").stat().st_ino == kept


# Prints the process's peak of resident memory, in bytes. Not getrusage's, which begins with that of
# the process that started it.
PEAK = """
    import sys
    from jaxmerge.experiment import merge as merging
    from tests.streaming.streaming_test import config_of

    count = int(sys.argv[3])
    config = config_of(sys.argv[1], (1 / count,) * count)
    config.pool.checkpoints = tuple(f"{sys.argv[1]}/m{k}" for k in range(count))
    merging.set_up_host(config)
    merging.merge(config, sys.argv[2])
    status = open("/proc/self/status").read()
    print(int(status.split("VmHWM:")[1].split()[0]) * 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_pool(tmp_path):
    """Twelve checkpoints of 64 MB more take less than two of them, and all less than 900 MB.

    537 MB were seen with four and 623 with sixteen: the blocks and the programs have more inputs.
    """
    values = np.random.default_rng(0).normal(size=(4096, 8192)).astype("bfloat16")
    for k in range(16):
        save(tmp_path / "models" / f"m{k}", {"x": values})
    peaks = []
    for count in (4, 16):
        script = [sys.executable, "-c", textwrap.dedent(PEAK), str(tmp_path / "models")]
        script += [str(tmp_path / f"run{count}"), str(count)]
        found = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=True)
        peaks.append(int(found.stdout))
    assert peaks[1] < peaks[0] + 2 * values.nbytes
    assert peaks[1] < 900e6


def test_the_record_is_json_that_names_the_inputs(tmp_path):
    models = make(tmp_path / "models")
    merging.merge(config_of(models), str(tmp_path / "run"))
    record = json.loads((tmp_path / "run" / "merge.json").read_text())
    assert [Path(each[0][0]).parent.name for each in record["inputs"]] == ["m0", "m1", "m2"]
    assert record["outputs"] == ["merged/huggingface"]


def test_a_checkpoint_that_changes_while_it_is_merged(tmp_path, monkeypatch):
    """Half of one and half of another is no merge; the next start merges what is there then."""
    models = make(tmp_path / "models")
    file = models / "m0" / "model.safetensors"
    tensors = tensors_of(models / "m0")
    add = Finished.add

    def written_meanwhile(self: Finished, *args: Any) -> None:
        add(self, *args)
        save(models / "m0", {**tensors, "wide": -tensors["wide"]})

    with monkeypatch.context() as patched:
        patched.setattr(Finished, "add", written_meanwhile)
        with pytest.raises(JaxmergeError, match="written to while they were read") as caught:
            merge(config_of(models, ROWS, shard_bytes=20_000), str(tmp_path / "run"))
    assert caught.value.found == str(file)
    merge(config_of(models, ROWS, shard_bytes=20_000), str(tmp_path / "run"))
    merge(config_of(models, ROWS, shard_bytes=20_000), str(tmp_path / "whole"))
    assert files_of(tmp_path / "run") == files_of(tmp_path / "whole")


def test_writes_that_do_less_than_they_were_asked_for(tmp_path, monkeypatch):
    """The file is the same; the system may write any part of what it is given."""
    values, whole = np.arange(1000, dtype=np.int32), os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, start: whole(fd, data[:7], start))
    with open(tmp_path / "file", "wb") as stream:
        safetensors.write_at(stream.fileno(), 5, values)
    assert (tmp_path / "file").read_bytes()[5:] == values.tobytes()
