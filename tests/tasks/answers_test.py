"""Answers for judges that run them: data and small formulas get through, nothing is ever run."""

import time

import pytest

from jaxmerge.tasks.answers import is_formula, literal
from jaxmerge.tasks.reasoning_gym import FORMULAS, LITERALS, reasoning_gym


@pytest.mark.parametrize(
    "text", ["1 + 2*(3 - 4)/5", "94*4 - 61 - 6", "-896*x**5 + 2.5*y", "((7))", "-x"]
)
def test_formulas(text):
    assert is_formula(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "print(1)",
        "exit()",
        "x(1)",
        "x.y",
        "1 .real",
        "[1]",
        "lambda: 1",
        "x if y else z",
        "1 < 2",
        "1; 2",
        "1 # 2",
        "'a'",
        "f'{x}'",
        "9**9**9",
        "x**100",
        "x**y",
        "x**2**3",
        "2**9",
        "1e9999999",
        "0x10",
        "1j",
        "5!",
        "1\n2",
        "(" * 500 + ")" * 500,
        "1+" * 600 + "1",
        "é",
    ],
)
def test_what_is_no_formula(text):
    assert not is_formula(text)


def test_literals_are_read():
    assert literal("[[1, 2], ['a', -3.5]]") == [[1, 2], ["a", -3.5]]


@pytest.mark.parametrize(
    "text", ["", "print(1)", "[1] * 10**9", "[x for x in y]", "[" * 900, "-" * 900 + "1", "{[]}"]
)
def test_what_is_no_literal(text):
    with pytest.raises(ValueError, match="no literal"):
        literal(text)


@pytest.mark.parametrize("dataset", sorted(LITERALS | FORMULAS))
def test_a_judge_knows_right_from_wrong_and_runs_nothing(dataset, tmp_path):
    task = reasoning_gym(dataset=dataset, train=0, search=5, test=0)
    touch = f"__import__('pathlib').Path({str(tmp_path / 'ran')!r}).touch()"
    started = time.monotonic()
    for example in task.splits["search"]:
        assert task.judge(example, [example.target]) == 1.0
        for hostile in (touch, f"[{touch}]", f"({touch}) or 24", "9**9**9**9", "1e999999999", "["):
            assert task.judge(example, [hostile]) <= 0.05
    assert not list(tmp_path.iterdir())
    assert time.monotonic() - started < 20  # "9**9**9**9" takes for ever where it is computed


@pytest.mark.parametrize(
    ("dataset", "write", "score"),
    [
        ("binary_matrix", lambda text: str([row.split() for row in text.splitlines()]), 0.1),
        ("n_queens", lambda text: str([row.split() for row in text.splitlines()]), 0.5),
        ("spiral_matrix", lambda text: str(text.split()), 0.1),
        ("string_insertion", lambda text: str(list(text)), 0.1),
        ("countdown", lambda text: f"0 + ({text})", 0.05),
        ("polynomial_multiplication", lambda text: f"0 + ({text})", 1.0),
    ],
)
def test_other_forms_of_an_answer_get_what_the_data_set_gives_for_them(dataset, write, score):
    task = reasoning_gym(dataset=dataset, train=0, search=5, test=0)
    for example in task.splits["search"]:
        assert task.judge(example, [write(example.target)]) == score
