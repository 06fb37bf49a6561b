"""Small tasks for lm_eval: YAML files with data beside them, one of each kind of output."""

import json
import random
from pathlib import Path
from typing import Any

import yaml

WORDS = "sun moon sea tree river stone bird fish cloud wind rain snow fire gold".split()


def _documents(seed: int, count: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        {
            "question": f"{' '.join(rng.sample(WORDS, rng.randint(2, 6)))} ({seed}.{i})",
            "options": rng.sample(WORDS, 3),
            "answer": rng.randrange(3),
        }
        for i in range(count)
    ]


MEAN = {"aggregation": "mean", "higher_is_better": True}
KINDS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "{{answer}}",
        "description": "Which word comes next?\n\n",
        "metric_list": [{"metric": "acc", **MEAN}, {"metric": "acc_norm", **MEAN}],
    },
    "last_word": {
        "output_type": "loglikelihood",
        "doc_to_target": " {{options[answer]}}",
        "metric_list": [
            {"metric": "acc", **MEAN},
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        ],
    },
    "text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}, {{question}}",
        "process_results": "!function scores.nats_per_byte",
        "metric_list": [{"metric": "loss", "aggregation": "mean", "higher_is_better": False}],
    },
    "writing": {
        "output_type": "generate_until",
        "doc_to_target": "{{options[answer]}}",
        "generation_kwargs": {"until": ["\n", "e"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "ignore_case": True, **MEAN}],
        "filter_list": [
            {"name": "whole", "filter": [{"function": "take_first"}]},
            {
                "name": "word",
                "filter": [
                    {"function": "regex", "regex_pattern": "([a-z]+)"},
                    {"function": "take_first"},
                ],
            },
        ],
    },
}
_SCORES = """
def nats_per_byte(document, results):
    text = document["question"]
    return {"loss": -results[0] / len(f"{text}, {text}")}


def pair(document, results):
    return {"loss": (results[0], 1)}
"""


def write(directory: Path, kind: str, scored: int = 30, **changes: Any) -> str:
    """The path of a task's YAML file, with 12 documents to train and some that are scored."""
    for seed, (split, count) in enumerate([("train", 12), ("test", scored)]):
        lines = [json.dumps(document) for document in _documents(seed, count)]
        (directory / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    (directory / "scores.py").write_text(_SCORES)
    config = {
        "task": kind,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {each: str(directory / f"{each}.jsonl") for each in ("train", "test")},
            "cache_dir": str(directory / "cache"),
        },
        "training_split": "train",
        "test_split": "test",
        "doc_to_text": "{{question}}:",
        **KINDS[kind],
        **changes,
    }
    path = directory / f"{kind}.yaml"
    # lm_eval's tag for a Python function is none that the writer knows.
    path.write_text(yaml.safe_dump(config).replace("'!function scores", "!function 'scores"))
    return str(path)
