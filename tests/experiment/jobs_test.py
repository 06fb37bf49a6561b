"""The jobs without a config file, as they are typed."""

import os
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxmerge.checkpoints import orbax
from jaxmerge.errors import JaxmergeError
from jaxmerge.experiment import jobs
from tests import tiny
from tests.command import ROOT
from tests.streaming import streaming_test as streamed


def jaxmerge(*arguments, cwd=ROOT):
    """The command line; returns the exit code and what was printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "jaxmerge", *map(str, arguments)],
        **{"cwd": cwd, "env": environment, "capture_output": True, "text": True},
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return tiny.pool(tmp_path_factory.mktemp("pool"), 3)


@pytest.mark.parametrize(
    ("text", "name", "fields"),
    [
        ("arithmetic", "arithmetic", {"builder": "arithmetic"}),
        ("human_eval", "human_eval", {"builder": "human_eval"}),
        ("jsonl:a/my-own.jsonl", "my_own", {"builder": "jsonl", "path": "a/my-own.jsonl"}),
        ("lm_eval:arc_easy", "arc_easy", {"builder": "lm_eval", "task": "arc_easy"}),
        ("my.tasks:sums,digits=3", "sums", {"builder": "my.tasks:sums", "digits": 3}),
        (
            "jsonl:a,b.jsonl,judge=numeric,until=('x','y'),prompt={q}, please",
            "a_b",
            {
                **{"builder": "jsonl", "path": "a,b.jsonl", "judge": "numeric"},
                **{"until": ("x", "y"), "prompt": "{q}, please"},
            },
        ),
    ],
)
def test_a_task_in_one_word(text, name, fields):
    assert jobs.task(text) == (name, fields)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("jsnl", "reasoning_gym"),
        ("jsonl", "--task=jsonl:PATH"),
        ("human_eval:x", "--task=human_eval"),
    ],
)
def test_a_task_that_can_not_be(text, said):
    with pytest.raises(JaxmergeError, match=said):
        jobs.task(text)


@pytest.mark.parametrize("command", ["merge", "evaluate", "search", "plan", "sweep", "report"])
def test_each_help_fits_a_screen(command):
    code, shown, _ = jaxmerge(command, "--help")
    assert code == 0
    assert len(shown.splitlines()) <= 40
    assert max(map(len, shown.splitlines())) <= 100
    assert "config.search.sigma" not in shown


def test_help():
    """It lists the commands at once: neither JAX nor absl is imported for it."""
    started = time.perf_counter()
    code, shown, _ = jaxmerge("--help")
    assert code == 0
    assert all(f"jaxmerge {command} " in shown for command in ("merge", "evaluate", "search"))
    assert all(f"jaxmerge {command} " in shown for command in ("plan", "sweep", "report"))
    assert time.perf_counter() - started < 5  # half a second where nothing else runs
    loaded = "import sys, jaxmerge.__main__ as m; sys.argv = ['', '--help']; m.main(); "
    loaded += "assert not {'jax', 'numpy', 'absl', 'ml_collections'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", loaded], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    code, shown, _ = jaxmerge("merge", "--help=fields")
    assert "config.search.budget_tokens = 0" in shown


def test_a_command_that_is_none():
    code, _, said = jaxmerge("mrege", "a")
    assert (code, said) == (2, "jaxmerge: no such command: mrege; try jaxmerge merge\n")


@pytest.mark.slow
def test_merge_of_hugging_face_directories(tmp_path):
    """`out` is the checkpoint; the same command checks it, and goes on where it was removed."""
    models = streamed.make(tmp_path / "models", 2)
    weights = (0.25, 0.75)
    members = sorted(models.iterdir())
    typed = ("merge", *members, "--weights=0.25,0.75", f"--out={tmp_path}/merged")
    code, shown, said = jaxmerge(*typed)
    assert (code, shown) == (0, f"Merged: {tmp_path}/merged\n"), said
    expected = streamed.reference(models, weights)
    streamed.assert_bits(streamed.tensors_of(tmp_path / "merged"), expected)
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "jaxmerge merge" in card
    assert {path.name for path in tmp_path.iterdir()} == {"models", "merged", ".merged.jaxmerge"}
    before = (tmp_path / "merged" / "model.safetensors").stat().st_mtime_ns
    assert jaxmerge(*typed)[0] == 0
    assert (tmp_path / "merged" / "model.safetensors").stat().st_mtime_ns == before
    code, _, said = jaxmerge("merge", *members, "--weights=1,0", f"--out={tmp_path}/merged")
    assert code == 2
    assert "merge.weights" in said


@pytest.mark.slow
def test_merge_of_orbax_checkpoints_is_their_average(pool, tmp_path):
    out = tmp_path / "merged"
    out.mkdir()  # an empty directory is no obstacle
    code, shown, said = jaxmerge("merge", f"{pool}/*", f"--out={out}")
    assert (code, shown) == (0, f"Merged: {out}\n"), said
    described = orbax.describe("merged", orbax.absolute(out))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    merged = orbax.restore(
        described,
        jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
            described.abstract,
        ),
    )
    jax.tree.map(
        lambda leaf, *each: np.testing.assert_allclose(leaf, sum(each) / 3, rtol=1e-5, atol=1e-6),
        merged,
        *tiny.trees(3),
    )
    assert jaxmerge("merge", f"{pool}/*", f"--out={out}")[0] == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    code, _, said = jaxmerge("merge", f"{pool}/*", f"--out={tmp_path}/other")
    assert code == 2
    assert "there is something here already" in said
    assert "expected: a new directory" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("merge", "--out=x"), "no checkpoints are named"),
        (("merge", "nowhere", "--out=x"), "there is no checkpoint here"),
        (("merge", "a"), "--out is missing"),
        (("merge", "a", "b", "--weights=1,x", "--out=x"), "found:    1,x"),
        (("merge", "a", "--wieghts=1", "--out=x"), "weights"),
        (("evaluate", "a", "--out=x"), "--task is missing"),
        (("search", "a", "--task=sorting", "--task=sorting", "--out=x"), "same name"),
        (("search", "a", "--task=sorting", "--config.search.bugdet=4", "--out=x"), "budget"),
    ],
)
@pytest.mark.slow
def test_mistakes_are_told_in_one_message(arguments, said, pool, tmp_path):
    given = [str(next(pool.iterdir())) if each in ("a", "b") else each for each in arguments]
    code, shown, err = jaxmerge(*given, cwd=tmp_path)
    assert (code, shown) == (2, "")
    assert said in err
    assert "Traceback" not in err
    assert not [*tmp_path.iterdir()]
