"""Whether a merge still speaks: what is asked, and what is said of one that does not."""

import contextlib

import jax
import numpy as np
import pytest

from jaxmerge import config as configs
from jaxmerge.checkpoints import orbax
from jaxmerge.evaluation.speech import MARGIN, Verdict, listen
from jaxmerge.experiment import merge, speech
from jaxmerge.experiment.prepare import prepare
from jaxmerge.rundir import Candidate
from jaxmerge.tasks.requests import Generate, Likely, Prompt
from tests import tiny


def _asked(nats):
    """Models that write their number, and find each text as likely as `nats` has it."""

    def ask(requests):
        return [
            tuple(
                f"text {model}"
                if isinstance(request, Generate)
                else Likely(4 * row[int(request.continuation[-1])], False, 4)
                for request in requests
            )
            for model, row in enumerate(nats)
        ]

    return ask


def test_members_are_measured_by_each_other_and_the_merge_by_both():
    verdict = listen(_asked([[-0.1, -2.0], [-1.0, -0.1], [-1.0, -3.0]]), [Prompt("a"), Prompt("b")])
    assert verdict == Verdict(-2.0, (-2.0, -1.0), "text 2", "a")
    assert verdict is not None
    assert verdict.speaks


@pytest.mark.parametrize(("below", "speaks"), [(MARGIN - 0.01, True), (MARGIN + 0.01, False)])
def test_the_margin(below, speaks):
    verdict = Verdict(-1.5 - below, (-1.0, -1.5), "x", "The")
    assert verdict.speaks == speaks
    assert bool(verdict.warning) != speaks


def test_members_that_write_nothing():
    assert listen(lambda requests: [("",) * len(requests)] * 3, [Prompt("a")]) is None


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Two models that know one text: rows of the output matrix are sharp, and alike."""
    directory = tmp_path_factory.mktemp("pool")
    (tree,) = tiny.trees(1)
    for k in range(2):
        key = jax.random.key(k)
        near = jax.tree.map(lambda x, key=key: x + 1e-3 * jax.random.normal(key, x.shape), tree)
        orbax.save(directory / f"m{k}", near, architecture=tiny.model().architecture)
    return directory


@pytest.mark.parametrize(
    ("weights", "speaks"), [((0.5, 0.5), True), ((1.2, -0.2), True), ((-3.0, 1.0), False)]
)
def test_of_merges_with_given_weights(pool, tmp_path, capsys, weights, speaks):
    config = tiny.run_config(configs.default(), pool)
    config.merge.weights, config.export.formats = weights, ("orbax",)
    config.export.speech_bytes = 2**30
    written = merge.merge(config, str(tmp_path))
    speech.of_merge(config, tmp_path, written)
    found = np.array([each["speaks"] for each in _kept(tmp_path).values()])
    assert found.tolist() == [speaks]
    assert ("no language model any more" in capsys.readouterr().err) != speaks
    speech.of_merge(config, tmp_path, written)
    assert capsys.readouterr().err == ""  # once


def test_what_is_not_asked(pool, tmp_path, capsys):
    config = tiny.run_config(configs.default(), pool)
    config.merge.weights, config.export.formats = (0.5, 0.5), ("orbax",)
    config.export.speech_bytes = 1000
    written = merge.merge(config, str(tmp_path))
    speech.of_merge(config, tmp_path, written)
    assert "export.speech_bytes" in capsys.readouterr().err
    (tmp_path / "speech.json").unlink()
    config.export.speech_bytes, config.pool.model = 2**30, "no_such:model"
    speech.of_merge(config, tmp_path, written)
    assert "was not asked" in capsys.readouterr().err
    (tmp_path / "speech.json").unlink()
    config.export.speech_bytes = 0
    speech.of_merge(config, tmp_path, written)
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "speech.json").exists()


def test_of_a_search(pool, tmp_path):
    config = tiny.run_config(configs.default(), pool)
    config.objective.tasks, config.heldout, config.export.speech_bytes = ("generation",), (), 2**30
    prepared = prepare(config, str(tmp_path))
    with contextlib.closing(prepared.directory):
        for weights, warning in (((0.5, 0.5), ""), ((-3.0, 1.0), "no language model any more")):
            winner = Candidate(0, 0, "final", "search", "test", 0, weights, {}, {}, 0.0)
            said = speech.of_search(config, prepared, winner)
            assert warning in said
            assert bool(said) == bool(warning)


def test_a_finished_merge_is_done(pool, tmp_path):
    """The same again; not so when a checkpoint is another meanwhile."""
    config = tiny.run_config(configs.default(), pool)
    config.export.formats = ("orbax",)
    config.merge.weights, config.merge.names = ((0.5, 0.5), (1.0, 0.0)), ("a", "b")
    written = merge.merge(config, str(tmp_path))
    before = (tmp_path / "pool.json").read_bytes()
    assert merge.merge(config, str(tmp_path)) == written
    assert (tmp_path / "pool.json").read_bytes() == before


def _kept(workdir):
    return speech.read_json(workdir / speech.FILE)
