"""Several processes: along the same gradients as one."""

import pytest

from tests import tiny
from tests.command import Command
from tests.processes import Processes, mesh

GRADIENT = """; config.search.strategy, config.space.granularity = "gradient", "leaf"
; config.baselines = ()
; config.search.steps, config.search.score_every, config.search.minibatch = 4, 2, 4
; config.objective.tasks, config.heldout = ("choice",), ()
; config.analyses.leave_one_out = config.analyses.transfer = False
""".replace("\n", "")


# The weighted sum, and one whose coefficients a method makes.
CLIMBED = {"linear": "", "multislerp": '; config.merge.method = "multislerp"'}


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return tiny.pool(tmp_path_factory.mktemp("pool"))


@pytest.mark.slow
@pytest.mark.parametrize("method", CLIMBED.values(), ids=CLIMBED)
def test_two_processes_climb_as_one_does(pool, tmp_path, method):
    """With models that are spread over both."""
    shape = {"pop": 1, "data": 1, "fsdp": 2, "tensor": 2}
    one = Command(tmp_path, pool, mesh(4, **shape) + GRADIENT + method)
    code, _, err = one.run()
    assert code == 0, err
    two = Processes(tmp_path / "two", pool, mesh(2, **shape) + GRADIENT + method)
    for code, _, err in two.run():
        assert code == 0, err
    assert tiny.log(two.command.workdir) == tiny.log(one.workdir)
