"""Own questions and texts from files: read, divided, judged, and refused with the line."""

import json
import math

import pytest

from jaxmerge.errors import JaxmergeError
from jaxmerge.tasks.common import Example
from jaxmerge.tasks.jsonl import _filled, jsonl
from jaxmerge.tasks.judges import JUDGES
from jaxmerge.tasks.requests import Generate, Likelihood, Likely, Prompt, Rolling
from jaxmerge.tasks.text import text

SUMS = [{"prompt": f"{n}+1=", "target": str(n + 1)} for n in range(40)]


def written(tmp_path, lines, name="task.jsonl") -> str:
    path = tmp_path / name
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return str(path)


def all_of(task) -> list[Example]:
    return [example for examples in task.splits.values() for example in examples]


def test_questions_are_read_and_judged(tmp_path):
    task = jsonl(path=written(tmp_path, ["", *SUMS, "  "]), max_new_tokens=4, until=["\n"])
    assert sorted(example.prompt for example in all_of(task)) == sorted(s["prompt"] for s in SUMS)
    for example in all_of(task):
        assert task.requests(example) == [Generate(Prompt(example.prompt), 4, ("\n",))]
        assert task.judge(example, [f" {example.target}\n"]) == 1
        assert task.judge(example, [f"{example.target}1"]) == 0


def test_splits_are_disjoint_and_stay_when_lines_are_added(tmp_path):
    few = jsonl(path=written(tmp_path, SUMS[:25])).splits
    many = jsonl(path=written(tmp_path, SUMS[::-1])).splits
    assert few["search"]
    assert few["test"]
    for split in ("search", "test"):
        assert set(map(prompt_of, few[split])) <= set(map(prompt_of, many[split]))
    assert not set(map(prompt_of, many["search"])) & set(map(prompt_of, many["test"]))
    small = jsonl(path=written(tmp_path, SUMS), search=3, test=4).splits
    assert small["search"] == many["search"][:3]
    assert small["test"] == many["test"][:4]


def prompt_of(example: Example) -> str:
    return example.prompt


def test_templates_name_the_fields(tmp_path):
    lines = [
        {"q": f"{n} or {n}?", "hint": n, "answers": [str(n), f"number {n}"]} for n in range(20)
    ]
    task = jsonl(path=written(tmp_path, lines), prompt="Q: {q} ({hint})\nA:", target="{answers}")
    for example in all_of(task):
        n = example.data["hint"]
        assert example.prompt == f"Q: {n} or {n}? ({n})\nA:"
        assert task.judge(example, [f"number {n}"]) == task.judge(example, [str(n)]) == 1
        assert task.judge(example, ["number"]) == 0


def test_multiple_choice_by_text_or_by_place(tmp_path):
    lines = [{"prompt": f"{n}?", "target": "b", "options": ["a", "b", "c"]} for n in range(20)]
    placed = [{**line, "target": 1} for line in lines]
    for content in (lines, placed):
        task = jsonl(path=written(tmp_path, content), choices="options", normalize="bytes")
        for example in all_of(task):
            assert example.target == "b"
            prompt = Prompt(example.prompt)
            assert task.requests(example) == [Likelihood(prompt, choice) for choice in "abc"]
            assert task.judge(example, [Likely(n, False, 1) for n in (-2, -1, -3)]) == 1
            assert task.judge(example, [Likely(n, False, 1) for n in (-2, -9, -3)]) == 0


def test_shots_come_from_the_train_file(tmp_path):
    train = written(
        tmp_path, [{"prompt": "a=", "target": "b"}, {"prompt": "c=", "target": "d"}], "t"
    )
    task = jsonl(path=written(tmp_path, SUMS), train_path=train, shots=2)
    (request,) = task.requests(task.splits["test"][0])
    assert isinstance(request, Generate)
    assert request.prompt.shots == (("a=", "b"), ("c=", "d"))
    with pytest.raises(JaxmergeError, match="too few"):
        jsonl(path=written(tmp_path, SUMS), shots=1)


def test_a_train_prompt_must_not_be_searched_or_tested(tmp_path):
    train = written(tmp_path, SUMS[:1], "train")
    with pytest.raises(JaxmergeError, match="there twice") as caught:
        jsonl(path=written(tmp_path, SUMS), train_path=train, search=1, test=1)
    assert caught.value.where == f"{train}, line 1"


def test_a_question_is_its_prompt_and_choices(tmp_path):
    """So one prompt may stand before many lists of choices; the same question again is refused."""
    lines = [{"prompt": "Right?", "target": 0, "choices": [str(n), "x"]} for n in range(20)]
    assert len(all_of(jsonl(path=written(tmp_path, lines), choices="choices"))) == 20
    with pytest.raises(JaxmergeError, match="there twice"):
        jsonl(path=written(tmp_path, [*lines, lines[3]]), choices="choices")


def test_a_number_is_a_place_and_a_text_is_a_choice(tmp_path):
    numbers = {"choices": ["1", "2", "3", "0"]}
    for target, right in ((1, "2"), ("1", "1"), (0, "1"), ("0", "0")):
        lines = [{"prompt": f"{n}", "target": target, **numbers} for n in range(10)]
        task = jsonl(path=written(tmp_path, lines), choices="choices")
        assert {example.target for example in all_of(task)} == {right}


def test_values_that_are_no_texts_are_json(tmp_path):
    """Objects and truth values as targets of the judge `json`; separators that only look like
    ends of lines."""
    targets = [{"a": 9, "é": None}, True, 1.5]
    lines = [
        json.dumps({"prompt": f"{k}.{n}\u2028", "target": target}, ensure_ascii=False)
        for k, target in enumerate(targets)
        for n in range(10)
    ]
    task = jsonl(path=written(tmp_path, lines), judge="json")
    assert len(all_of(task)) == 30
    for example in all_of(task):
        target = targets[int(example.prompt[0])]
        assert task.judge(example, [json.dumps(target)]) == 1
        assert task.judge(example, [json.dumps([target])]) == 0


@pytest.mark.parametrize(
    ("judge", "target"), [("regex", "("), ("json", "{"), ("numeric", "none")], ids=str
)
def test_a_target_that_its_judge_cannot_read_is_named(tmp_path, judge, target):
    path = written(tmp_path, [{"prompt": "a", "target": "1"}, {"prompt": "b", "target": target}])
    with pytest.raises(JaxmergeError, match=f"the judge {judge} can't read the target") as caught:
        jsonl(path=path, judge=judge)
    assert caught.value.where == f"{path}, line 2"


@pytest.mark.parametrize(
    ("name", "target", "right", "wrong"),
    [
        ("exact", "a b", ["a b", " a b\n"], ["a  b", "A b", "", "a b c"]),
        ("regex", r"\b4[0-9]\b", ["42", "It is 47."], ["420", "4", ""]),
        ("contains", "Paris", ["It is Paris.", "Paris"], ["paris", "Par is"]),
        ("numeric", "1,234.5", ["1234.5", "so 7*2 = 1,234.50", "1.2345e3"], ["1234", "-1234.5"]),
        ("numeric", "-3", ["-3", "x is -3.0."], ["3", "-3 or 4"]),
        (
            "json",
            '{"a": [1, true, null], "b": "x"}',
            ['{"b":"x","a":[1.0,true,null]}', 'Here:\n```json\n{"a":[1,true,null],"b":"x"}\n```\n'],
            ['{"a":[1,1,null],"b":"x"}', '{"a":[1,true],"b":"x"}', "{", "", "[" * 100_000, "null"],
        ),
    ],
)  # fmt: skip
def test_judges(name, target, right, wrong):
    compare, check = JUDGES[name]
    check(target)
    assert all(compare(output, target) for output in right)
    assert not any(compare(output, target) for output in wrong)


def shout(example: Example, output: str) -> float:
    """A user's judge."""
    return 0.5 if output == example.data["target"].upper() else 0.0


def test_a_judge_of_ones_own(tmp_path):
    path = written(tmp_path, [{"prompt": f"p{n}", "target": "abc"} for n in range(20)])
    task = jsonl(path=path, judge="tests.tasks.jsonl_test:shout")
    assert task.judge(all_of(task)[0], ["ABC"]) == 0.5
    assert task.judge(all_of(task)[0], ["abc"]) == 0.0
    for unknown in ("fuzzy", "tests.tasks.jsonl_test:whisper", "nowhere:at_all"):
        with pytest.raises(JaxmergeError, match="unknown judge") as caught:
            jsonl(path=path, judge=unknown)
        assert "exact, regex, contains, numeric, json" in caught.value.expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "this is no JSON"),
        ("[1]", "no JSON object"),
        ({"target": "a"}, "has no prompt"),
        ({"prompt": "a"}, "has no target"),
        ({"prompt": "a", "target": None}, "has no target"),
        ({"prompt": "a", "target": []}, "list of answers is empty"),
    ],
    ids=str,
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = written(tmp_path, [*SUMS, line])
    with pytest.raises(JaxmergeError, match=message) as caught:
        jsonl(path=path)
    assert caught.value.where.startswith(f"{path}, line 41")


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": "a", "target": "d", "choices": ["a", "b"]},
        {"prompt": "a", "target": 2, "choices": ["a", "b"]},
        {"prompt": "a", "target": "a", "choices": ["a", "a"]},
        {"prompt": "a", "target": "a", "choices": "ab"},
        {"prompt": "a", "target": "a"},
    ],
    ids=str,
)
def test_choices_that_are_none(tmp_path, line):
    with pytest.raises(JaxmergeError, match="choices") as caught:
        jsonl(path=written(tmp_path, [line]), choices="choices")
    assert caught.value.where.endswith("line 1")


def test_a_file_that_is_not_there(tmp_path):
    for build in (jsonl, text):
        with pytest.raises(JaxmergeError, match="can't be read") as caught:
            build(path=str(tmp_path / "none"))
        assert caught.value.where == str(tmp_path / "none")


def test_a_text_is_cut_into_chunks(tmp_path):
    """All of it but the last few bytes, each chunk once, characters whole."""
    content = "".join(f"{n:x}" + "é€😀"[n % 3] * (n % 5 == 0) for n in range(500, 1500))
    (tmp_path / "text").write_text(content)
    task = text(path=str(tmp_path / "text"), chunk_bytes=50)
    chunks = [example.prompt for example in all_of(task)]
    assert len(set(chunks)) == len(chunks)
    for chunk in chunks:
        assert chunk in content
        assert 50 - 3 <= len(chunk.encode()) <= 50
    missing = len(content.encode()) - sum(len(chunk.encode()) for chunk in chunks)
    assert 0 <= missing < 50
    (tmp_path / "text").write_text(content + content[::-1])
    longer = text(path=str(tmp_path / "text"), chunk_bytes=50).splits
    for split, examples in task.splits.items():
        assert set(map(prompt_of, examples)) <= set(map(prompt_of, longer[split]))


def test_chunks_hold_a_character_at_least(tmp_path):
    with pytest.raises(JaxmergeError, match="at least 4"):
        text(path=str(tmp_path / "text"), chunk_bytes=3)


def test_a_text_is_scored_in_bits_per_byte(tmp_path):
    (tmp_path / "text").write_text("".join(f"{n:05}" for n in range(1000)))
    task = text(path=str(tmp_path / "text"), chunk_bytes=100)
    example = task.splits["test"][0]
    assert task.requests(example) == [Rolling(example.prompt)]
    assert task.judge(example, [Likely(-100 * math.log(2), False, 30)]) == pytest.approx(-1)
    assert task.bounds == (-math.inf, 0)


NESTED = [
    {"q": {"text": f"{n}?", "é": n}, "my answer": [str(n), "x"], "a.b": "flat", "a": {"b": "deep"}}
    for n in range(20)
]


@pytest.mark.parametrize(
    ("template", "filled"),
    [
        ("{q.text}", "0?"),
        ("{q.é}:", "0:"),
        ("{my answer.1} {my answer.0}", "x 0"),
        ("{my answer} {q}", '["0", "x"] {"text": "0?", "é": 0}'),
        ("{a.b}", "flat"),
        ('{{"label": {q.é}}} }}{{', '{"label": 0} }{'),
        ("{{q.text}}", "{q.text}"),
    ],
)
def test_placeholders_are_paths_and_braces_are_doubled(template, filled):
    """A key that is the whole path goes first."""
    assert _filled(template, NESTED[0], "here") == [filled]


def test_a_nested_list_has_several_answers(tmp_path):
    path = written(tmp_path, NESTED)
    task = jsonl(path=path, prompt="{q.text}", target="{my answer}")
    assert {task.judge(example, ["x"]) for example in all_of(task)} == {1.0}
    lines = [{"in": {"q": str(n)}, "out": {"place": 1, "of": ["a", "b"]}} for n in range(20)]
    task = jsonl(
        path=written(tmp_path, lines, "choices"),
        prompt="{in.q}",
        target="{out.place}",
        choices="out.of",
    )
    assert {(example.target, example.choices) for example in all_of(task)} == {("b", ("a", "b"))}


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ('Answer {"label": 1}', 'no "label": 1'),
        ("{answer}", "no answer"),
        ("{q.missing}", "no q.missing"),
        ("{my answer.2}", "no my answer.2"),
        ("{q.text.inner}", "no q.text.inner"),
        ("{}", "the line has no "),
        ("{q.text} }", "belongs to no placeholder"),
        ("{ {q.text}", "belongs to no placeholder"),
    ],
)
def test_what_is_no_placeholder_is_said(tmp_path, template, said):
    """With the fields that there are, those in objects too, and how a brace is written."""
    with pytest.raises(JaxmergeError) as caught:
        jsonl(path=written(tmp_path, NESTED), prompt=template, target="{my answer}")
    assert said in caught.value.what
    assert "{{" in caught.value.expected
    assert "line 1" in caught.value.where
    if "no placeholder" not in said:
        assert caught.value.found == "q, my answer, a.b, a, q.text, q.é, a.b"


def test_a_byte_order_mark_is_no_text(tmp_path):
    """Windows' editors write one; it is no part of the first line, nor of a text."""
    path = tmp_path / "bom"
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(map(json.dumps, SUMS)).encode())
    assert len(all_of(jsonl(path=str(path)))) == len(SUMS)
    path.write_bytes(b"\xef\xbb\xbf" + " ".join(map(str, range(200))).encode())
    chunks = [example.prompt for example in all_of(text(path=str(path), chunk_bytes=8))]
    assert any(chunk.startswith("0 1 2") for chunk in chunks)


@pytest.mark.parametrize("field", ["prompt", "target"])
def test_half_of_a_surrogate_pair(tmp_path, field):
    lines = [{"prompt": f"q{i}", "target": "a"} for i in range(9)]
    lines[4][field] = "x\ud83d"
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(JaxmergeError, match="half of a surrogate pair") as raised:
        jsonl(path=str(path))
    assert raised.value.where.endswith("line 5")


def test_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    questions = [{"prompt": f"q{i}", "target": "a"} for i in range(30)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, questions)))
    assert jsonl(path="~/q.jsonl").splits["search"]
    assert text(path="~/q.jsonl", search=1, test=1, chunk_bytes=20).splits["test"]
