"""IFBench: the scores of its own evaluation, without its downloads, and checkers that end."""

import copy
import importlib
import inspect
import json
import re
import socket
import sys
import time
from importlib import resources

import pytest

from jaxmerge.errors import JaxmergeError
from jaxmerge.tasks.ifbench import NEEDS, checkers, ifbench, registry, variants

EVERYTHING = {"search": 1000, "test": 1000, "leave_out": True}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def no_nltk_data(monkeypatch):
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])


@pytest.fixture(scope="module")
def published():
    """Texts that some model wrote, by prompt; they come with the package."""
    file = resources.files("ifbench").joinpath("data", "sample_output.jsonl")
    with file.open(encoding="utf-8") as lines:
        return {row["prompt"]: row["response"] for row in map(json.loads, lines)}


def examples(task):
    return [example for split in task.splits.values() for example in split]


@pytest.mark.parametrize("mode", ["strict", "loose"])
def test_scores_are_those_of_the_packages_own_evaluation(mode, published):
    by_prompt = ifbench(mode=mode, **EVERYTHING)
    by_instruction = ifbench(mode=mode, level="instruction", **EVERYTHING)
    library = importlib.import_module("ifbench.evaluation_lib")
    evaluate = getattr(library, f"test_instruction_following_{mode}")
    compared = 0
    for example in examples(by_prompt):
        row = copy.deepcopy(example.data)
        row["kwargs"] = [{k: v for k, v in each.items() if v is not None} for each in row["kwargs"]]
        if any(each.get("n_start") == 0 for each in row["kwargs"]):
            continue  # its own evaluation draws another start at random
        text = published[example.prompt]
        theirs = evaluate(library.InputExample(**row), {example.prompt: text})
        followed = theirs.follow_instruction_list
        assert by_prompt.judge(example, [text]) == theirs.follow_all_instructions
        assert by_instruction.judge(example, [text]) == sum(followed) / len(followed)
        compared += 1
    assert compared > 260
    mean = sum(by_prompt.judge(e, [published[e.prompt]]) for e in examples(by_prompt)) / compared
    assert 0.1 < mean < 0.9  # the texts are neither all right nor all wrong


def test_a_judge_takes_nothing_at_random():
    """What a checker looks for is what the prompt's data say, every argument."""
    for example in examples(ifbench(**EVERYTHING)):
        made = checkers(registry(), example.data)
        for checker, arguments in zip(made, example.data["kwargs"], strict=True):
            given = {key: value for key, value in arguments.items() if value is not None}
            assert (checker.get_instruction_args() or {}) == given


def test_loose_is_with_or_without_first_line_last_line_and_asterisks():
    assert set(variants("Sure!\n*yes*\nBye.")) == {
        "Sure!\n*yes*\nBye.",
        "*yes*\nBye.",
        "Sure!\n*yes*",
        "*yes*",
        "Sure!\nyes\nBye.",
        "yes\nBye.",
        "Sure!\nyes",
        "yes",
    }


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n ",
        "\n" * 20_000,
        "Question 1" + "\n" * 20_000,
        'ProductID,Category,Brand,Price,Stock\n"' + "!" * 20_000,
        "A.B. " * 4_000,
        "(" * 20_000,
        "*" * 20_000,
        "7" * 20_000,
        "\0 \r \ud800",
        '"' * 20_000,
    ],
    ids=lambda text: repr(text[:12]),
)
def test_every_checker_ends_and_scores_any_text(text):
    task = ifbench(mode="strict", **EVERYTHING)
    for example in examples(task):
        start = time.monotonic()
        assert task.judge(example, [text]) in (0.0, 1.0)
        # The slowest takes half a second; it grows with the square of the length.
        assert time.monotonic() - start < 20, example.data


def test_the_checkers_were_looked_at():
    """A version of the package with new ones has to be looked at before it is used."""
    known = registry()
    assert len(known) == 58
    text = inspect.getsource(sys.modules["ifbench.instructions"])
    text += inspect.getsource(sys.modules["ifbench.instructions_util"])
    assert not re.search(r"\b(eval|exec|open|__import__|parse_expr|urlopen)\(|subprocess", text)
    reading = {
        name
        for name, kind in known.items()
        if re.search(r"word_tokenize|pos_tag|stopwords", inspect.getsource(kind))
    }
    assert reading == set(NEEDS)


def test_instructions_whose_data_are_missing_are_named(no_nltk_data):
    with pytest.raises(JaxmergeError, match=r"nltk.downloader averaged_.*\n.*words:start_verb"):
        ifbench()
    task = ifbench(leave_out=True)
    asked = {name for each in examples(task) for name in each.data["instruction_id_list"]}
    assert not asked & set(NEEDS)
    assert all(name in task.warning for name in NEEDS)
    assert "public test set" in task.warning


def test_data_that_are_there_are_used(tmp_path, no_nltk_data, monkeypatch):
    import nltk

    words = tmp_path / "corpora" / "stopwords"
    words.mkdir(parents=True)
    (words / "english").write_text("the\na\n")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    task = ifbench(leave_out=True)
    asking = [e for e in examples(task) if e.data["instruction_id_list"] == ["ratio:stop_words"]]
    assert len(asking) > 5
    for example in asking:
        assert task.judge(example, ["sun moon sea"]) == 1.0
        assert task.judge(example, ["the a the a the"]) == 0.0


def test_splits_are_disjoint_and_sizes_are_bounds():
    whole = ifbench(**EVERYTHING).splits
    assert len(whole["search"]) > 100 < len(whole["test"])
    assert not {e.prompt for e in whole["search"]} & {e.prompt for e in whole["test"]}
    part = ifbench(search=10, test=20, leave_out=True).splits
    assert (part["search"], part["test"]) == (whole["search"][:10], whole["test"][:20])


@pytest.mark.parametrize("wrong", [{"mode": "medium"}, {"level": "word"}])
def test_an_accuracy_that_there_is_not_is_refused(wrong):
    with pytest.raises(JaxmergeError, match="no such accuracy"):
        ifbench(leave_out=True, **wrong)


def test_a_missing_package_is_named(monkeypatch):
    registry.cache_clear()
    for module in [name for name in sys.modules if name.split(".")[0] == "ifbench"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "ifbench", None)
    with pytest.raises(JaxmergeError, match=r"pip install 'jaxmerge\[ifbench\]'"):
        ifbench()
