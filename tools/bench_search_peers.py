"""What tools/bench_search.py compares with; runs in the peers' own environment, without jaxmerge.

    python bench_search_peers.py JOB.json

JOB.json is a `Job`; what was measured is written to its `out`, as of `bench_search_jaxmerge.py`.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

Answers = tuple[list[int], list[str]]  # the option of each multiple choice; each text


@dataclasses.dataclass(frozen=True)
class Job:
    """One measurement.

    Attributes:
        peer: `lm_eval`, merged by mergekit, or `transformers`, merged by a sum of tensors.
        pool: directories of checkpoints.
        weights: of one candidate a round; the first is the one whose answers are compared.
        questions: what `bench_search_workload.make_questions` has written.
        new_tokens: of each text.
        batch: rows that go through the model together.
        dtype: that is merged and evaluated in.
        rounds: that are measured, after one that is not.
        warm: whether there is one that is not measured.
        out: where the result is written.
    """

    peer: str
    pool: list[str]
    weights: list[list[float]]
    questions: str
    new_tokens: int
    batch: int
    dtype: str
    rounds: int
    warm: bool
    out: str


def merge_with_mergekit(job: Job, model: Any) -> Callable[[Sequence[float]], None]:
    """mergekit's linear merge in memory, into the model: as mergekit-evolve does without a disk.

    Its own plan for merges in memory can't be made by 0.1.5 as pip installs it: pydantic refuses a
    field. So what its plan for the disk would write is computed, and not written.
    """
    config_of, options_of, plan, graph, merging = (
        importlib.import_module(f"mergekit.{name}")
        for name in ("config", "options", "plan", "graph", "merge")
    )

    def merge(weights: Sequence[float]) -> None:
        models = [
            {"model": path, "parameters": {"weight": weight}}
            for path, weight in zip(job.pool, weights)
        ]
        recipe = {"merge_method": "linear", "dtype": job.dtype, "models": models}
        config = config_of.MergeConfiguration.model_validate(recipe)
        options = options_of.MergeOptions(quiet=True)
        architecture = merging.get_architecture_info(config, options)
        planner = plan.MergePlanner(config, architecture, options, model.config)
        found = model.state_dict()
        saved = [task for task in planner.plan_to_disk(job.out) if hasattr(task, "tensor_task")]
        names = {task.tensor_task: task.tensor_name for task in saved}
        for task, tensor in graph.Executor(list(names)).run(quiet=True):
            found[names[task]].copy_(tensor)

    return merge


def merge_by_hand(job: Job, model: Any) -> Callable[[Sequence[float]], None]:
    """A sum of tensors that stay in memory, into the model."""
    dtype = getattr(torch, job.dtype)
    pool = [
        AutoModelForCausalLM.from_pretrained(path, dtype=dtype).state_dict() for path in job.pool
    ]

    def merge(weights: Sequence[float]) -> None:
        for name, target in model.state_dict().items():
            total = torch.zeros(target.shape)
            for tensors, weight in zip(pool, weights):
                total.add_(tensors[name].float(), alpha=weight)
            target.copy_(total)

    return merge


def ask_lm_eval(job: Job, model: Any, tokenizer: Any) -> Callable[[str], list]:
    """lm-eval's Hugging Face model on one of the tasks; they are loaded here, untimed."""
    lm_eval, models, tasks = (
        importlib.import_module(f"lm_eval.{name}")
        for name in ("evaluator", "models.huggingface", "tasks")
    )
    manager = tasks.TaskManager(include_defaults=False)
    loaded = {
        kind: manager.load([str(Path(job.questions) / f"{kind}.yaml")])["tasks"]
        for kind in ("choice", "writing")
    }
    asked = models.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=job.batch, device="cpu")

    def answer(kind: str) -> list:
        found = lm_eval.evaluate(asked, loaded[kind], bootstrap_iters=0)
        (samples,) = found["samples"].values()
        samples = sorted(samples, key=lambda sample: sample["doc_id"])
        if kind == "writing":
            return [sample["filtered_resps"][0] for sample in samples]
        rated = [[nats for nats, _ in sample["filtered_resps"]] for sample in samples]
        return [each.index(max(each)) for each in rated]

    return answer


class ByHand:
    """Transformers with sorted batches, padded on the left, and logits only where they are needed.

    Args:
        job: of a `transformers` peer.
        model: that answers.
        tokenizer: its own.
    """

    def __init__(self, job: Job, model: Any, tokenizer: Any):
        self._job, self._model, self._tokenizer = job, model, tokenizer

    def __call__(self, kind: str) -> list:
        """The answers to all questions of a kind."""
        lines = (Path(self._job.questions) / f"{kind}.jsonl").read_text().splitlines()
        documents = [json.loads(line) for line in lines]
        encode = self._tokenizer
        read = [encode(document["question"]).input_ids for document in documents]
        if kind == "writing":
            return self._written(read)
        pairs = [
            (tokens, encode(f"{document['question']} {option}").input_ids[len(tokens) :])
            for tokens, document in zip(read, documents)
            for option in document["options"]
        ]
        nats = self._likelihoods(pairs)
        ends = range(0, len(nats), len(documents[0]["options"]))
        rated = [nats[i : i + len(documents[0]["options"])] for i in ends]
        return [each.index(max(each)) for each in rated]

    def _batches(self, rows: Sequence[list[int]]) -> list[tuple[list[int], Any, Any]]:
        """Places of the rows of each batch, their tokens, and where there is no padding."""
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        found = []
        for start in range(0, len(order), self._job.batch):
            places = order[start : start + self._job.batch]
            width = len(rows[places[0]])
            tokens = torch.zeros(len(places), width, dtype=torch.long)
            mask = torch.zeros_like(tokens)
            for line, place in enumerate(places):
                tokens[line, width - len(rows[place]) :] = torch.tensor(rows[place])
                mask[line, width - len(rows[place]) :] = 1
            found.append((places, tokens, mask))
        return found

    def _likelihoods(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        nats = [0.0] * len(pairs)
        for places, tokens, mask in self._batches([[*read, *scored] for read, scored in pairs]):
            kept = 1 + max(len(pairs[place][1]) for place in places)
            logits = self._model(
                tokens,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                logits_to_keep=kept,
                use_cache=False,
            ).logits
            log_p = torch.log_softmax(logits[:, :-1].float(), -1)
            chosen = log_p.gather(-1, tokens[:, -kept + 1 :, None])[..., 0]
            for line, place in enumerate(places):
                nats[place] = float(chosen[line, -len(pairs[place][1]) :].sum())
        return nats

    def _written(self, read: Sequence[list[int]]) -> list[str]:
        texts = [""] * len(read)
        for places, tokens, mask in self._batches(read):
            out = self._model.generate(
                tokens,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=self._job.new_tokens,
                pad_token_id=self._tokenizer.eos_token_id,
            )
            decoded = self._tokenizer.batch_decode(
                out[:, tokens.shape[1] :], skip_special_tokens=True
            )
            for place, text in zip(places, decoded):
                texts[place] = text
        return texts


def measure(job: Job) -> dict[str, Any]:
    """Seconds of each round, and what the first candidate answered."""
    dtype = getattr(torch, job.dtype)
    model = AutoModelForCausalLM.from_pretrained(job.pool[0], dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(job.pool[0])
    ours = job.peer == "transformers"
    merge = (merge_by_hand if ours else merge_with_mergekit)(job, model)
    answer = (ByHand if ours else ask_lm_eval)(job, model, tokenizer)
    rounds, answers = [], {}
    with torch.no_grad():
        for number in range(-int(job.warm), job.rounds):
            taken = {"merge": time.perf_counter()}
            merge(job.weights[max(number, 0)])
            taken["merge"] = time.perf_counter() - taken["merge"]
            for kind in ("choice", "writing"):
                started = time.perf_counter()
                found = answer(kind)
                taken[kind] = time.perf_counter() - started
                if number <= 0:
                    answers[kind] = found
            if number >= 0:
                rounds.append(taken)
    return {"rounds": rounds, "answers": answers}


if __name__ == "__main__":
    the_job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    result = measure(the_job)
    packages = ("torch", "transformers", "lm_eval", "mergekit")
    result["versions"] = {name: importlib.metadata.version(name) for name in packages}
    Path(the_job.out).write_text(json.dumps(result))
