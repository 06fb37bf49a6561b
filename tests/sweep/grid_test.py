"""The grid of a sweep: values, names, shards, and what is refused."""

import pytest

from jaxmerge import config as configs
from jaxmerge.errors import JaxmergeError
from jaxmerge.sweep import grid


def _names(*axes: str) -> list[str]:
    return [cell.name for cell in grid.cells(configs.default(), axes)]


def test_all_combinations_the_last_axis_fastest():
    cells = grid.cells(configs.default(), ["search.strategy=CMA_ES,SNES", "seed=0,1,2"])
    assert [cell.name for cell in cells] == [
        f"search.strategy={strategy},seed={seed}"
        for strategy in ("CMA_ES", "SNES")
        for seed in (0, 1, 2)
    ]
    assert [(cell.config.search.strategy, cell.config.seed) for cell in cells[2:4]] == [
        ("CMA_ES", 2),
        ("SNES", 0),
    ]


@pytest.mark.parametrize(
    ("axis", "values"),
    [
        ("search.sigma=1,.5", [1.0, 0.5]),
        ("pool.chat=true,False", [True, False]),
        ("pool.dtype=,bfloat16", ["", "bfloat16"]),
        ("objective.tasks=('a','b'),('c',)", [("a", "b"), ("c",)]),
        ("search.init=(),(1.0,2.0)", [(), (1.0, 2.0)]),
    ],
)
def test_values_have_the_type_of_the_field(axis, values):
    section, _, field = axis.partition("=")[0].partition(".")
    found = [cell.config[section][field] for cell in grid.cells(configs.default(), [axis])]
    assert found == values
    assert [type(value) for value in found] == [type(value) for value in values]


def test_the_cells_leave_the_config_as_it_was_and_stay_locked():
    config = configs.default()
    first, _ = grid.cells(config, ["seed=1,2"])
    assert config == configs.default()
    with pytest.raises(AttributeError):
        first.config.search.bugdet = 3


def test_names_are_file_names_and_differ():
    """Also where the values differ only in what a file name can't have, or at their ends."""
    long = "x" * 300
    names = _names(f"pool.base=a/b,a b,../a,{long}1,{long}2")
    assert len(set(names)) == 5
    for name in names:
        assert "/" not in name
        assert len(name) < 200
        assert name.startswith("pool.base=")


def test_a_name_does_not_depend_on_how_a_value_is_written():
    assert _names("search.sigma=.5,1") == _names("search.sigma=0.50,1.0")


@pytest.mark.parametrize(
    ("axes", "named"),
    [
        ([], "nothing to sweep"),
        (["seed"], "--sweep=seed: has no values"),
        (["sead=0,1"], 'Did you mean "seed"'),
        (["search.sigmo=0.1"], "search.sigmo"),
        (["keys=1"], "--sweep=keys"),
        (["seed=0,two"], "seed=two"),
        (["seed=0,1.5"], "seed=1.5"),
        (["pool.chat=perhaps"], "pool.chat=perhaps"),
        (["seed=1,2,1"], "a value is there twice"),
        (["search.sigma=1,1.0"], "a value is there twice"),
        (["seed=1", "seed=2"], "the field is swept twice"),
        (["objective.tasks=('a',"], "objective.tasks"),
        (["mesh.cpu_devices=1,2"], "mesh.cpu_devices"),
        (["compilation_cache=a,b"], "compilation_cache"),
    ],
)
def test_what_is_no_grid_is_refused_by_name(axes, named):
    with pytest.raises(JaxmergeError, match=r".") as caught:
        grid.cells(configs.default(), axes)
    assert named in str(caught.value)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
def test_shards_are_the_whole_and_of_nearly_one_size(n):
    cells = grid.cells(configs.default(), ["seed=0,1,2,3,4,5,6"])
    parts = [grid.shard(cells, f"{i}/{n}") for i in range(1, n + 1)]
    assert [cell.name for part in parts for cell in part] == [cell.name for cell in cells]
    assert {len(part) for part in parts} <= {7 // n, -(-7 // n)}


@pytest.mark.parametrize("which", ["0/2", "3/2", "1/8", "1", "a/b", "-1/2", "1/0"])
def test_what_is_no_shard_is_refused(which):
    cells = grid.cells(configs.default(), ["seed=0,1,2,3,4,5,6"])
    with pytest.raises(JaxmergeError, match="no such shard"):
        grid.shard(cells, which)
