"""What reads files that others wrote, each with a sound input and a way to spoil it.

Any input gives a right result or one message, a `JaxmergeError`: no other exception, no hang, no
memory beyond a bound. `tests/tools/fuzz_test.py` tries a few inputs, `tools/fuzz.py` as many as
there is time for.
"""

from __future__ import annotations

import contextlib
import functools
import json
import resource
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

SECONDS = 20  # that an input may take; sound ones take a tenth of a second
BYTES = 2**28  # that it may add to the memory of the process
MESSAGE = 20_000  # characters

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0}
    | {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": [1, 2],
}
ADAPTER = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj"],
    "rank_pattern": {"layers.0.self_attn.q_proj": 2},
    "alpha_pattern": {},
    "init_lora_weights": "pissa",
    "use_dora": False,
}
MERGE = """
merge_method: ties
base_model: ./base
models:
  - model: ./a+./adapter
    parameters: {density: [0.2, 0.5], weight: [{filter: mlp, value: 0.5}, {value: 1e-1}]}
  - model: ./b@main
parameters: &rest
  normalize: true
  <<: {lambda: 1.0}
dtype: bfloat16
tokenizer: {source: union, tokens: {<|x|>: {source: ./a, force: true}}, pad_to_multiple_of: 8}
---
name: second
merge_method: slerp
slices:
  - sources: [{model: ./a, layer_range: [0, 1]}, {model: ./b, layer_range: [0, 1]}]
parameters: {t: 0.5}
"""
EVOLVE = """
genome:
  models: [./a, ./a]
  merge_method: linear
  layer_granularity: 1
tasks:
  - {name: arc_easy, weight: 2.0, metric: acc}
limit: 10
"""


class Reader(NamedTuple):
    """A sound input, or several, and what reads one."""

    seeds: tuple[bytes, ...]
    read: Callable[[bytes], object]


def safetensors(directory: Path) -> Reader:
    from etils import epath

    from jaxmerge.checkpoints.safetensors import read_header

    file = directory / "model.safetensors"
    weights(file, {"a": (2, 3), "b": (), "c": (0, 4)})
    return Reader((file.read_bytes(),), into(file, lambda: read_header(epath.Path(file))))


def npz(directory: Path) -> Reader:
    import numpy as np
    from etils import epath

    from jaxmerge.checkpoints import npz as arrays

    file, values = directory / "m.npz", {"params/a": np.ones((2, 3), "f4"), "opt/b": np.ones(2)}
    seeds = []
    for write in (np.savez, np.savez_compressed):
        write(file, allow_pickle=False, **values)
        seeds.append(file.read_bytes())

    def read() -> object:
        source = arrays.describe("m", epath.Path(file))
        return arrays.restore(source, source.abstract)

    return Reader(tuple(seeds), into(file, read))


def index(directory: Path) -> Reader:
    from etils import epath

    from jaxmerge.checkpoints import directory as checkpoint

    parts = {"model-1.safetensors": {"a": (2, 3)}, "model-2.safetensors": {"b": (4,)}}
    for name, tensors in parts.items():
        weights(directory / name, tensors)
    names = {tensor: file for file, tensors in parts.items() for tensor in tensors}
    seed = as_bytes({"metadata": {"total_size": 40}, "weight_map": names})
    file = directory / "model.safetensors.index.json"
    return Reader((seed,), into(file, lambda: checkpoint.read(epath.Path(directory))))


def config(directory: Path) -> Reader:
    from etils import epath

    from jaxmerge.checkpoints import directory as checkpoint

    llama(directory)
    families = ("qwen2", "gemma2", "mixtral", "gpt_neox", "unknown")
    seeds = [LLAMA, *({**LLAMA, "model_type": each} for each in families)]
    read = into(directory / "config.json", lambda: checkpoint.read(epath.Path(directory)))
    return Reader(tuple(map(as_bytes, seeds)), read)


def adapter_config(directory: Path) -> Reader:
    from etils import epath

    from jaxmerge.checkpoints import lora

    llama(directory / "base")
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    adapter = directory / "adapter"
    adapter.mkdir()
    factors = {f"{prefix}A.weight": (2, 8), f"{prefix}B.weight": (8, 2)}
    weights(adapter / "adapter_model.safetensors", factors)
    base, file = str(directory / "base"), adapter / "adapter_config.json"
    read = into(file, lambda: lora.describe("x", epath.Path(adapter), "", base))
    return Reader((as_bytes(ADAPTER),), read)


def mergekit(directory: Path) -> Reader:
    from jaxmerge.mergekit import document

    file = directory / "merge.yml"
    return Reader((MERGE.encode(),), into(file, lambda: document.read(str(file))))


def mergekit_evolve(directory: Path) -> Reader:
    from jaxmerge.mergekit import evolve

    file = directory / "evolve.yml"
    llama(directory / "a")
    seed = EVOLVE.replace("./", f"{directory}/").encode()
    return Reader((seed,), into(file, lambda: evolve.read(str(file))))


def jsonl(directory: Path) -> Reader:
    from jaxmerge.tasks.jsonl import jsonl as task

    file = directory / "task.jsonl"
    lines = [
        {"prompt": f"{i}+{i}=", "target": [str(i)], "a": {"text": ["x", f"y{i}"]}, "c": ["u", "v"]}
        for i in range(12)
    ]
    several = b"".join(as_bytes(line) + b"\n" for line in lines)

    def read() -> None:
        task(path=str(file), search=2, test=2, prompt="{prompt}{{{a.text.1}", judge="numeric")
        task(path=str(file), search=2, test=2, target="{a.text.0}", judge="regex")
        task(path=str(file), search=2, test=2, target="u", choices="c")

    return Reader((several, b"\xef\xbb\xbf" + several), into(file, read))


def candidates(directory: Path) -> Reader:
    """The log, for a run that goes on."""
    from jaxmerge.rundir import RunDirectory

    run = run_directory(directory / "run")
    file = run / "candidates.jsonl"
    said = json.loads((run / "config.json").read_text())
    seed = b"".join(file.read_bytes().splitlines(keepends=True)[:6])
    return Reader((seed,), into(file, lambda: RunDirectory(run, said).close()))


def verdict(read: Callable[[bytes], object], data: bytes) -> str:
    """How reading an input ends: `read`, `refused`, or else what is wrong, with its trace.

    The main thread must ask: a hang is ended by an alarm.
    """
    from jaxmerge.errors import JaxmergeError

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with _alarm():
            read(data)
        said = "read"
    except JaxmergeError as error:
        said = "refused" if 0 < len(str(error)) < MESSAGE else f"a message of {len(str(error))}"
    except Exception:  # whatever it is: an error that is not a message is what is looked for
        return traceback.format_exc()
    except _Hang:
        return f"more than {SECONDS} seconds\n{traceback.format_exc()}"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return f"{grown} bytes of memory" if grown > BYTES else said


def as_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


def into(file: Path, read: Callable[[], object]) -> Callable[[bytes], object]:
    """Writes an input into the file, and reads what it is a part of."""

    def write_and_read(data: bytes) -> object:
        file.write_bytes(data)
        return read()

    return write_and_read


def weights(file: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """A file of zeros."""
    import numpy as np

    from jaxmerge.checkpoints.safetensors import make_header

    dtype = np.dtype(np.float32)
    head = make_header((name, dtype, shape) for name, shape in tensors.items())
    count = sum(int(np.prod(shape)) for shape in tensors.values())
    file.write_bytes(head + bytes(4 * count))


def llama(directory: Path, **changes: Any) -> None:
    """A model of `LLAMA`, or of one that differs from it."""
    config = {**LLAMA, **changes}
    width, inner = config["hidden_size"], config["intermediate_size"]
    queries, keys = (
        config[heads] * config["head_dim"]
        for heads in ("num_attention_heads", "num_key_value_heads")
    )
    layer = "model.layers.0."
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], width),
        "model.norm.weight": (width,),
        f"{layer}self_attn.q_proj.weight": (queries, width),
        f"{layer}self_attn.k_proj.weight": (keys, width),
        f"{layer}self_attn.v_proj.weight": (keys, width),
        f"{layer}self_attn.o_proj.weight": (width, queries),
        f"{layer}mlp.gate_proj.weight": (inner, width),
        f"{layer}mlp.up_proj.weight": (inner, width),
        f"{layer}mlp.down_proj.weight": (width, inner),
        f"{layer}input_layernorm.weight": (width,),
        f"{layer}post_attention_layernorm.weight": (width,),
    }
    directory.mkdir(exist_ok=True)
    weights(directory / "model.safetensors", shapes)
    (directory / "config.json").write_bytes(as_bytes(config))


def run_directory(directory: Path) -> Path:
    """A finished run, fabricated."""
    from tests.report.fabricated import fabricate

    directory.mkdir()
    fabricate(directory, budget=4)
    return directory


def _of_run(directory: Path, name: str) -> Reader:
    from jaxmerge import report

    run = run_directory(directory / "run")
    seed = (run / name).read_bytes()
    return Reader((seed,), into(run / name, lambda: report.write(run)))


def _of_tokenizer(directory: Path, name: str) -> Reader:
    from jaxmerge.evaluation.tokenizer import Pretrained
    from jaxmerge.tasks.requests import Prompt

    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    words = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4, "u": 5, "s": 6, "e": 7, "r": 8}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added |= {"special": True}
    files = {
        "tokenizer.json": {
            "version": "1.0",
            "added_tokens": [{"id": i, "content": c, **added} for c, i in [*words.items()][:2]],
            "pre_tokenizer": {**level, "use_regex": True},
            "decoder": level,
            "model": {"type": "BPE", "vocab": words, "merges": [["a", "b"]]},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "chat_template": "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}",
        },
        "generation_config.json": {"eos_token_id": [1, 2], "max_length": 20},
        "config.json": LLAMA,
    }
    for file, content in files.items():
        (directory / file).write_bytes(as_bytes(content))

    def read() -> None:
        made = Pretrained(str(directory), chat=True)
        made.decode(made.prompt(Prompt("abuser")))
        made.pair(Prompt("ab", form="text"), " a")
        made.pieces(first=True)

    return Reader((as_bytes(files[name]),), into(directory / name, read))


class _Hang(BaseException):
    """It takes too long; no code of ours catches it."""


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise _Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


READERS: dict[str, Callable[[Path], Reader]] = {
    "safetensors": safetensors,
    "npz": npz,
    "index": index,
    "config": config,
    "adapter_config": adapter_config,
    "tokenizer": functools.partial(_of_tokenizer, name="tokenizer.json"),
    "tokenizer_config": functools.partial(_of_tokenizer, name="tokenizer_config.json"),
    "generation_config": functools.partial(_of_tokenizer, name="generation_config.json"),
    "mergekit": mergekit,
    "mergekit_evolve": mergekit_evolve,
    "jsonl": jsonl,
    "candidates": candidates,
    "candidates_page": functools.partial(_of_run, name="candidates.jsonl"),
    "results": functools.partial(_of_run, name="results.json"),
    "run_config": functools.partial(_of_run, name="config.json"),
    "run_pool": functools.partial(_of_run, name="pool.json"),
    "run_tasks": functools.partial(_of_run, name="tasks.json"),
}
# Those that parse bytes themselves, which is worth a look at what the bytes reach.
OF_BYTES = ("safetensors", "npz", "index", "adapter_config", "mergekit", "jsonl", "candidates")
