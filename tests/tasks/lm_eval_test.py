"""Tasks of lm_eval: their scores, document by document, are those of lm_eval itself."""

import hashlib
import importlib
import inspect
import math
import re
import sys
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from jaxmerge.errors import JaxmergeError
from jaxmerge.tasks.common import Soft
from jaxmerge.tasks.lm_eval import REFUSED
from jaxmerge.tasks.lm_eval import lm_eval as build
from jaxmerge.tasks.lm_eval_instances import generate
from jaxmerge.tasks.requests import Generate, Likelihood, Likely, Prompt, Rolling, Sampling
from jaxmerge.tasks.splits import owner
from tests.tasks.lm_eval_tasks import WORDS, write


def luck(*of: str) -> float:
    """A number from 0 to 1 that any change of its arguments changes."""
    digest = hashlib.sha256("\0".join(of).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def likely(context: str, continuation: str) -> Likely:
    chance = luck(context, continuation)
    return Likely(-10 * chance, chance < 0.3, 1)


def text(context: str) -> str:
    return f" {WORDS[int(luck(context) * len(WORDS))]}, 7"


class Oracle(LM):
    """A model that answers by luck alone, but the same question always the same."""

    def loglikelihood(self, requests):
        return [likely(*request.args)[:2] for request in requests]

    def loglikelihood_rolling(self, requests):
        return [likely("", request.args[0]).nats for request in requests]

    def generate_until(self, requests):
        return [text(request.args[0]) for request in requests]


def respond(request):
    """What the oracle says to one of our requests."""
    if isinstance(request, Rolling):
        return likely("", request.text)
    assert request.prompt.form == "text"
    assert not request.prompt.shots
    if isinstance(request, Likelihood):
        return likely(request.prompt.text, request.continuation)
    return text(request.prompt.text)


def generation(request) -> Generate:
    assert isinstance(request, Generate)
    return request


def examples(task):
    return [example for split in task.splits.values() for example in split]


def scored(task, answer=respond):
    """Scores by question."""
    return {
        example.data.document["question"]: task.judge(
            example, [answer(request) for request in task.requests(example)]
        )
        for example in examples(task)
    }


def theirs(path, metric, filter, shots=None):
    simple_evaluate: Any = lm_eval.simple_evaluate
    found = simple_evaluate(
        Oracle(),
        tasks=[path],
        task_manager=TaskManager(include_defaults=False),
        num_fewshot=shots,
        bootstrap_iters=0,
    )
    (samples,) = found["samples"].values()
    (values,) = found["results"].values()
    by_document = {
        sample["doc"]["question"]: sample[metric]
        for sample in samples
        if sample["filter"] == filter
    }
    return by_document, values[f"{metric},{filter}"]


@pytest.mark.parametrize("shots", [None, 3])
@pytest.mark.parametrize(
    ("kind", "metric", "filter"),
    [
        ("choice", "acc", "none"),
        ("choice", "acc_norm", "none"),
        ("last_word", "acc", "none"),
        ("text", "loss", "none"),
        ("writing", "exact_match", "whole"),
        ("writing", "exact_match", "word"),
    ],
)
def test_scores_are_those_of_lm_eval_document_by_document(tmp_path, kind, metric, filter, shots):
    path = write(tmp_path, kind, scored=60)
    task = build(task=path, metric=metric, filter=filter, num_fewshot=shots)
    by_document, mean = theirs(path, metric, filter, shots)
    sign = -1 if metric == "loss" else 1
    found = scored(task)
    assert found == {question: sign * value for question, value in by_document.items()}
    assert len(found) == 60
    assert sum(found.values()) / 60 == pytest.approx(sign * mean, abs=1e-12)
    if (kind, filter) != ("writing", "whole"):
        assert len(set(found.values())) > 1


@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_the_right_choice_is_found_by_the_judge(tmp_path, metric):
    task = build(task=write(tmp_path, "choice"), metric=metric)
    for example in examples(task):
        soft, document = task.soft(example), example.data.document
        assert soft is not None
        assert soft.right == (document["answer"],)
        lengths = [len(option) if metric == "acc_norm" else 1 for option in document["options"]]
        assert soft.lengths == tuple(lengths)
        assert [*soft.requests] == [*task.requests(example)]


def test_what_stands_for_the_scores_of_other_kinds(tmp_path):
    """A continuation, a text; a target that the judge takes, and none that a stop cuts short."""
    task = build(task=write(tmp_path, "last_word"))
    example = examples(task)[0]
    (request,) = task.requests(example)
    assert isinstance(request, Likelihood)
    assert task.soft(example) == Soft("answer", (request,))
    task = build(task=write(tmp_path, "text"))
    found = [task.soft(example) for example in examples(task)]
    assert all(soft is not None and soft.kind == "text" for soft in found)
    task = build(task=write(tmp_path, "writing"), filter="word")
    for example in examples(task):
        target = example.data.document["options"][example.data.document["answer"]]
        found = task.soft(example)
        assert (found is None) == ("e" in target)
        if found:
            (request,) = found.requests
            assert isinstance(request, Likelihood)
            assert request.continuation == f" {target}"


def test_lower_is_better_is_negated_and_its_bounds_too(tmp_path):
    path = write(tmp_path, "text")
    task = build(task=path, bounds=(0.5, 4.0))
    assert task.bounds == (-4.0, -0.5)
    assert build(task=path).bounds == (-math.inf, math.inf)
    assert all(score < 0 for score in scored(task).values())
    assert build(task=write(tmp_path, "choice")).bounds == (0.0, 1.0)


def test_splits_are_disjoint_stable_and_bounded(tmp_path):
    few = build(task=write(tmp_path, "choice", scored=30), num_fewshot=2).splits
    (tmp_path / "more").mkdir()
    path = write(tmp_path / "more", "choice", scored=80)
    more = build(task=path, num_fewshot=2).splits
    for split in ("search", "test"):
        prompts = {example.prompt for example in more[split]}
        assert {example.prompt for example in few[split]} < prompts
    whole = {name: {example.prompt for example in more[name]} for name in more}
    assert not whole["search"] & whole["test"]
    assert len(whole["search"] | whole["test"]) == 80
    part = build(task=path, num_fewshot=2, search=5, test=7).splits
    assert (part["search"], part["test"]) == (more["search"][:5], more["test"][:7])


def test_a_document_is_owned_by_the_hash_of_its_json(tmp_path):
    task = build(task=write(tmp_path, "choice"))
    for split, found in task.splits.items():
        for example in found:
            document = example.data.document
            text = (
                f'{{"answer": {document["answer"]}, "options": '
                f"{list(document['options'])}, ".replace("'", '"')
                + f'"question": "{document["question"]}"}}'
            )
            assert owner(text) in (split, "train")


def test_a_validation_split_is_scored_where_there_is_no_test_split(tmp_path):
    tested = build(task=write(tmp_path, "choice"))
    changes = {"validation_split": "test", "test_split": None}
    assert examples(build(task=write(tmp_path, "choice", **changes))) == examples(tested)


def test_a_chat_has_the_few_shot_examples_as_turns(tmp_path):
    task = build(task=write(tmp_path, "choice"), num_fewshot=2, form="chat")
    example = task.splits["search"][0]
    document = example.data.document
    asked: Any = task.requests(example)
    assert [request.continuation for request in asked] == document["options"]  # no space before
    (prompt,) = {request.prompt for request in asked}
    assert prompt.form == "chat"
    assert prompt.text == document["question"] + ":"
    assert len(prompt.shots) == 2
    assert prompt.shots[0][0].startswith("Which word comes next?\n\n")
    assert all(answer in WORDS for _, answer in prompt.shots)
    with_text = build(task=write(tmp_path, "choice"), num_fewshot=2)
    asked_plain: Any = with_text.requests(example_of(with_text, document))
    (text,) = {request.prompt.text for request in asked_plain}
    assert all(question in text for question, _ in prompt.shots[1:])


def example_of(task, document) -> Any:
    return next(each for each in examples(task) if each.data.document == document)


def test_repeats_are_as_many_requests_with_seeds_of_their_own(tmp_path):
    settings = {"until": ["\n"], "do_sample": True, "temperature": 0.5, "top_p": 0.9}
    path = write(tmp_path, "writing", repeats=3, generation_kwargs=settings)
    task = build(task=path)
    asked = [task.requests(example) for example in examples(task)]
    assert {len(each) for each in asked} == {3}
    drawn = [generation(request).sampling or Sampling() for each in asked for request in each]
    assert len({sampling.seed for sampling in drawn}) == len(drawn)
    assert {sampling[:2] for sampling in drawn} == {(0.5, 0.9)}
    assert [task.requests(example) for example in examples(task)] == asked
    example = examples(task)[0]
    target = example.data.document["options"][example.data.document["answer"]]
    assert task.judge(example, [target, "no", "no"]) == 1.0  # the filter takes the first
    assert task.judge(example, ["no", target, target]) == 0.0


PROMPT = Prompt("a", form="text")


@pytest.mark.parametrize(
    ("arguments", "request_"),
    [
        ({}, Generate(PROMPT, 256)),
        ({"until": "x", "max_gen_toks": 3}, Generate(PROMPT, 3, ("x",))),
        ({"until": ["x", "", "yz"], "max_new_tokens": 3}, Generate(PROMPT, 3, ("x", "yz"))),
        ({"until": None, "temperature": 0.0, "top_k": 5}, Generate(PROMPT, 256)),
        ({"do_sample": False, "temperature": 0.7}, Generate(PROMPT, 256)),
        ({"temperature": 0.7}, Generate(PROMPT, 256, (), Sampling(0.7, 1.0, 5))),
        ({"do_sample": True, "top_p": 0.5}, Generate(PROMPT, 256, (), Sampling(1.0, 0.5, 5))),
    ],
)
def test_generation_arguments_mean_what_they_mean_to_lm_eval(arguments, request_):
    assert generate(PROMPT, arguments, seed=5) == request_


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"num_beams": 4}, "num_beams=4"),
        ({"do_sample": True, "temperature": 0.5, "top_k": 5}, "top_k=5"),
        ({"do_sample": True, "temperature": 0.0}, "temperature=0"),
    ],
)
def test_generation_arguments_that_there_are_not_here_are_named(arguments, named):
    with pytest.raises(JaxmergeError, match=f"found: .*{named}"):
        generate(PROMPT, arguments, where="task x")


@pytest.mark.parametrize(
    ("kind", "changes", "arguments", "message"),
    [
        ("last_word", {}, {"metric": "perplexity"}, r"no mean over documents\n.*one of acc"),
        ("choice", {}, {"metric": "acc_nrm"}, r"there is none\n.*one of acc, acc_norm"),
        ("writing", {}, {"filter": "words"}, "one of whole, word"),
        ("choice", {"training_split": None}, {"num_fewshot": 1}, "would come from the documents"),
        ("choice", {"fewshot_split": "test"}, {"num_fewshot": 1}, "would come from the documents"),
        ("choice", {"unsafe_code": True}, {}, "would run what the model writes"),
        ("choice", {"doc_to_text": "{{question"}, {}, "can't make this task\n.*\n.*Template"),
        ("choice", {"test_split": "tset"}, {}, "can't make this task\n.*\n.*tset"),
        ("choice", {"output_type": "choice"}, {}, "can't make this task\n.*\n.*output_type"),
        ("writing", {"gen_prefix": "So"}, {"form": "chat"}, "begins the answer itself"),
        (
            "choice",
            {},
            {"search": 5, "test": 5, "num_fewshot": 99},
            "can't make the task's prompts",
        ),
    ],
)
def test_what_is_wrong_with_a_task_is_said(tmp_path, kind, changes, arguments, message):
    with pytest.raises(JaxmergeError, match=message):
        build(task=write(tmp_path, kind, **changes), **arguments)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(JaxmergeError, match="there is no such file"):
        build(task=str(tmp_path / "mine.yaml"))
    path = write(tmp_path, "choice")
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(JaxmergeError, match=r"can't make this task\n.*\n.*test\.jsonl"):
        build(task=path)


def test_a_metric_that_is_no_number_is_named(tmp_path):
    task = build(task=write(tmp_path, "text", process_results="!function scores.pair"))
    with pytest.raises(JaxmergeError, match="metric loss is no number for one document"):
        scored(task)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(JaxmergeError, match=r"pip install 'jaxmerge\[lm-eval\]'"):
        build(task="hellaswag")


@pytest.mark.slow  # lm_eval reads its ten thousand YAML files
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hellaswagg", "no such task\n.*hellaswag,"),
        ("mmlu", "a group.*\n.*4 members: .*mmlu_stem"),
        ("ai2_arc", "a group.*\n.*2 members: arc_challenge, arc_easy"),
        ("humaneval", "would run what the model writes"),
        ("realtoxicityprompts", "or send it elsewhere"),
    ],
)
def test_names_that_are_no_task_to_be_had_are_refused(name, message):
    with pytest.raises(JaxmergeError, match=message):
        build(task=name)


@pytest.mark.slow
def test_a_task_by_name_has_a_warning(monkeypatch):
    """GSM8K as lm_eval defines it, with questions of ours in place of those of the hub."""
    import datasets

    def local(path, name=None, **arguments):
        assert (path, name) == ("openai/gsm8k", "main")
        rows = [{"question": f"{i} + 1?", "answer": f"So #### {i + 1}"} for i in range(40)]
        made = {"train": rows[:20], "test": rows[20:]}
        return datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in made.items()})

    monkeypatch.setattr(datasets, "load_dataset", local)
    task = build(task="gsm8k", num_fewshot=2, filter="flexible-extract")
    assert "gsm8k is a public test set" in task.warning
    for example in examples(task):
        request = generation(*task.requests(example))
        assert "Question:" in request.until
        assert request.prompt.text.count("Question: ") == 3
        right = int(re.findall(r"Question: (\d+)", request.prompt.text)[-1]) + 1
        assert task.judge(example, [f"it is {right}"]) == 1.0
        assert task.judge(example, [f"it is {right + 1}"]) == 0.0


def test_local_data_have_no_warning(tmp_path):
    assert build(task=write(tmp_path, "choice")).warning == ""


def test_a_file_of_a_refused_folder_is_refused_too(tmp_path):
    folder = tmp_path / "lm_eval" / "tasks" / REFUSED[0]
    folder.mkdir(parents=True)
    with pytest.raises(JaxmergeError, match="run"):
        build(task=write(folder, "choice"))


def test_judges_that_run_or_send_what_models_write_are_refused():
    """A version of lm_eval with new ones has to be looked at before it is used."""
    folder = Path(inspect.getfile(importlib.import_module("lm_eval.tasks"))).parent
    running = r"(?<![\w.])(eval|exec|parse_expr|sympify)\(|import parse_expr|subprocess\.[a-zP]"
    sending = r'|requests\.(Session|post)|import OpenAI|"code_eval"'
    found = {
        file.relative_to(folder).parent.as_posix()
        for file in folder.rglob("*.py")
        if re.search(running + sending, file.read_text())
    }
    assert found == set(REFUSED)
