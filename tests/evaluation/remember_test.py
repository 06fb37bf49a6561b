"""Evaluation from memory: the same scores, only for the same steps, in a bounded memory."""

import numpy as np
import pytest

from jaxmerge.evaluation.evaluator import Evaluator
from jaxmerge.evaluation.remember import Remembering
from jaxmerge.evaluation.tokenizer import Bytes
from jaxmerge.merge.linear import merger
from jaxmerge.sharding import make_mesh
from tests import tiny


class Watched(Evaluator):
    """Keeps account of the rows it was asked for."""

    asked: list[float]

    def steps(self, weights_PxK):
        self.asked += weights_PxK[:, 0].tolist()
        return super().steps(weights_PxK)


@pytest.fixture(scope="module")
def made():
    mesh = make_mesh(pop=1, data=1, fsdp=1, tensor=1)
    tasks = [tiny.generation(), tiny.choice()]
    return Watched(
        merger(tiny.trees(2)), tiny.model(), Bytes(), tasks, "search", mesh, candidates_per_step=2
    )


@pytest.fixture
def watched(made):
    made.asked = []
    return made


def _weights(*first: float) -> np.ndarray:
    return np.array([[w, 1 - w] for w in first], np.float32)


def _same(found, expected) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected):
        assert ours.scores.keys() == theirs.scores.keys()
        for task in ours.scores:
            np.testing.assert_array_equal(ours.scores[task], theirs.scores[task])
        np.testing.assert_array_equal(ours.written_C, theirs.written_C)


def test_scores_are_those_of_the_evaluator_in_order(watched):
    """Steps that are known, between steps that are not, and a last step that is not full."""
    remembering = Remembering(watched)
    list(remembering.steps(_weights(0, 0.25, 0.5, 0.75)))
    asked = _weights(1, 0.125, 0.5, 0.75, 0.625, 0.375, 0, 0.25, 1)
    found = list(remembering.steps(asked))
    assert watched.asked == [0, 0.25, 0.5, 0.75, 1, 0.125, 0.625, 0.375, 1]
    _same(found, list(watched.steps(asked)))


def test_only_a_whole_step_is_known_again(watched):
    """A candidate's last bits may depend on its place and its neighbours."""
    remembering = Remembering(watched)
    list(remembering.steps(_weights(0, 0.25)))
    list(remembering.steps(_weights(0.25, 0)))
    list(remembering.steps(_weights(0)))
    list(remembering.steps(np.nextafter(_weights(0, 0.25), np.float32(2))))
    assert len(watched.asked) == 7
    list(remembering.steps(_weights(0, 0.25)))
    assert len(watched.asked) == 7


def test_what_was_not_asked_for_the_longest_is_forgotten(watched):
    (step,) = watched.steps(_weights(0, 1))
    watched.asked = []
    of_a_step = step.written_C.nbytes + sum(array.nbytes for array in step.scores.values())
    remembering = Remembering(watched, most_bytes=2 * of_a_step)
    for first in (0, 0.25, 0, 0.5):  # 0.25 has to go
        list(remembering.steps(_weights(first, 1)))
    assert watched.asked[::2] == [0, 0.25, 0.5]
    list(remembering.steps(_weights(0, 1)))
    assert watched.asked[::2] == [0, 0.25, 0.5]
    list(remembering.steps(_weights(0.25, 1)))
    assert watched.asked[::2] == [0, 0.25, 0.5, 0.25]
