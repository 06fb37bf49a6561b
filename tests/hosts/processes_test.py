"""Several processes: the same candidates as one; what does not go together is refused."""

import pytest

from jaxmerge.errors import JaxmergeError
from jaxmerge.hosts import processes
from tests import tiny
from tests.command import Command
from tests.processes import SMALL, Processes, ended, mesh, results


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return tiny.pool(tmp_path_factory.mktemp("pool"))


@pytest.mark.slow
def test_two_processes_find_what_one_finds(pool, tmp_path):
    shape = {"pop": 2, "data": 2, "fsdp": 2}
    one = Command(tmp_path, pool, mesh(8, **shape))
    code, out, err = one.run()
    assert code == 0, err
    two = Processes(tmp_path / "two", pool, mesh(4, **shape))
    (code, first, err), (other_code, other, other_err) = two.run()
    assert (code, other_code) == (0, 0), err + other_err
    # The same programs on the same devices: the same bits.
    assert tiny.log(two.command.workdir) == tiny.log(one.workdir)
    assert results(two.command)["best"] == results(one)["best"]
    assert _said(first, two.command) == _said(out, one)
    assert not _said(other, two.command)


def _said(out: str, command: Command) -> str:
    """The table and what follows, without paths; Gloo prints of its connections before."""
    start = out.find("test scores")
    return out[start:].replace(str(command.workdir), "") if start >= 0 else ""


@pytest.mark.slow
def test_processes_that_were_started_differently_are_refused(pool, tmp_path):
    two = Processes(tmp_path / "differ", pool, SMALL)
    first, second = (list(flags) for flags in two.flags())
    started = [
        two.command.start(*first),
        two.command.start(*second, "--config.search.budget=8"),
    ]
    for code, _, err in map(ended, started):
        assert code == 2
        assert "the config must be the same in all processes" in err


def test_numbers_that_make_no_sense_are_refused():
    with pytest.raises(JaxmergeError, match="--coordinator"):
        processes.connect("", 2, 0)
    for count, index in ((None, None), (2, None), (2, 2), (2, -1)):
        with pytest.raises(JaxmergeError, match="--processes=N"):
            processes.connect("localhost:1", count, index)


def test_alone_everything_is_the_identity():
    assert not processes.several()
    assert processes.first()
    assert processes.from_first(lambda: b"said") == b"said"
    processes.agree("nothing", b"")
    assert processes.spread(lambda items: [2.0 * item for item in items], [1, 2]).tolist() == [2, 4]
