"""Scores the exported winner of a run with transformers, and compares with results.json.

    python tools/verify_export.py --config=configs/smollm2.py --workdir=runs/smollm2

Nothing of jaxmerge's decoder, generation or batching has a part in it: transformers loads
WORKDIR/merged/huggingface in float32 and writes greedily, one task after the other. Needs torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from absl import app, flags
from ml_collections import config_flags
from tqdm import tqdm

from jaxmerge.errors import JaxmergeError
from jaxmerge.evaluation.tokenizer import Pretrained
from jaxmerge.experiment.build import build_task
from jaxmerge.tasks.common import Example, Task
from jaxmerge.tasks.requests import Generate

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", lock_config=True)
flags.DEFINE_string("workdir", None, "the finished run", required=True)
flags.DEFINE_integer("batch", 50, "prompts at a time", lower_bound=1)


def continuations(
    model: Any, prompts: Sequence[Sequence[int]], stops: Sequence[int], count: int
) -> list[list[int]]:
    """What the model writes after each prompt, at most `count` tokens."""
    T = max(map(len, prompts))
    tokens = torch.full((len(prompts), T), stops[0])
    for row, prompt in zip(tokens, prompts):
        row[T - len(prompt) :] = torch.tensor(prompt)
    padding = torch.tensor([T - len(prompt) for prompt in prompts])
    with torch.no_grad():
        out = model.generate(
            tokens,
            attention_mask=(torch.arange(T)[None] >= padding[:, None]).long(),
            do_sample=False,
            max_new_tokens=count,
            eos_token_id=list(stops),
            pad_token_id=stops[0],
        )
    return out[:, T:].tolist()


def greedy(task: Task, example: Example) -> list[Generate]:
    """The one text that is asked for, without drawing.

    Raises:
        JaxmergeError: the task asks for anything else.
    """
    match task.requests(example):
        case [Generate(sampling=None) as request]:
            return [request]
    raise JaxmergeError(
        "only tasks that ask for one greedy text can be compared", where=f"task {task.name}"
    )


def score(model: Any, tokenizer: Pretrained, task: Task, batch: int) -> float:
    """The mean score on the test split."""
    examples, scores = task.splits["test"], []
    for first in tqdm(range(0, len(examples), batch), desc=task.name, disable=None):
        some = examples[first : first + batch]
        asked = [request for example in some for request in greedy(task, example)]
        prompts = [tokenizer.prompt(request.prompt) for request in asked]
        written = continuations(model, prompts, tokenizer.stops, asked[0].max_new_tokens)
        for example, request, tokens in zip(some, asked, written):
            ends = [i for i, token in enumerate(tokens) if token in tokenizer.stops]
            text = tokenizer.decode(tokens[: ends[0]] if ends else tokens)
            for stop in filter(None, request.until):
                text = text.split(stop)[0]
            scores.append(task.judge(example, [text]))
    return float(np.mean(np.asarray(scores, np.float32)))


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    config: Any = FLAGS.config
    workdir = Path(FLAGS.workdir)
    exported = str(workdir / "merged" / "huggingface")
    try:
        found = json.loads((workdir / "results.json").read_text())["best"]["test"]
        tasks = [build_task(config, name) for name in config.objective.tasks]
        tokenizer = Pretrained(exported, chat=config.pool.chat, system=config.pool.system)
        model = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
        differing = 0
        for task in tasks:
            theirs, ours = score(model.eval(), tokenizer, task, FLAGS.batch), found[task.name]
            differing += abs(theirs - ours) > 1e-6
            print(f"{task.name:<16} transformers {theirs:.6f}  jaxmerge {ours:.6f}", flush=True)
    except (JaxmergeError, OSError) as error:
        print(f"verify_export: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    app.run(main)
