"""What tools/bench_search.py measures of jaxmerge, each in a process of its own.

python tools/bench_search_jaxmerge.py JOB.json
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.checkpoints import pool as pools
from jaxmerge.checkpoints.survey import survey
from jaxmerge.evaluation.batches import Limits
from jaxmerge.evaluation.evaluator import Evaluator
from jaxmerge.evaluation.respond import Responder
from jaxmerge.evaluation.tokenizer import Pretrained
from jaxmerge.experiment.search import search
from jaxmerge.models.decoder import described
from jaxmerge.planning.counting import products
from jaxmerge.sharding import make_mesh
from jaxmerge.tasks.common import Example, Task
from jaxmerge.tasks.kinds import generation, multiple_choice

_SIDE = 2048  # of the large matrix product
_LIMITS = Limits()


@dataclasses.dataclass(frozen=True)
class Job:
    """One measurement.

    Attributes:
        what: `candidates`, `prefill` or `overhead`.
        out: where the result is written.
        rounds: that are measured.
        dtype: that is merged and evaluated in.
        pool: directories of checkpoints.
        weights: of the candidates of each round, one after the other.
        questions: what `bench_search_workload.make_questions` has written.
        new_tokens: of each text.
        devices: that the cores are cut into, each with a candidate of its own.
        prefill: rows and tokens of each.
        config: file of the run whose overhead is measured.
        changes: fields of that config, by their dotted names.
    """

    what: str
    out: str
    rounds: int = 5
    dtype: str = ""
    pool: Sequence[str] = ()
    weights: Sequence[Sequence[float]] = ()
    questions: str = ""
    new_tokens: int = 32
    devices: int = 1
    prefill: tuple[int, int] = (16, 128)
    config: str = ""
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)


def candidates(job: Job) -> dict[str, Any]:
    """Seconds of one candidate in steady state, by part; what compiling took; the answers."""
    pool, model, mesh = _loaded(job)
    tokenizer = Pretrained(job.pool[0])
    tasks = _tasks(job)
    weights = np.array(job.weights, np.float32).reshape(-1, job.devices, len(job.pool))
    started = time.perf_counter()
    evaluators = {
        task.name: Evaluator(
            *(pool.merge, model, tokenizer, [task], "search", mesh),
            candidates_per_step=job.devices,
            limits=_LIMITS,
        )
        for task in tasks
    }
    encoding = time.perf_counter() - started
    first = {name: seconds(each, weights[0]) for name, each in evaluators.items()}
    rounds = []
    for row in weights[: job.rounds]:
        taken = {"merge": seconds(pool.merge, row)}
        for name, evaluator in evaluators.items():  # each merges too
            taken[name] = seconds(evaluator, row) - taken["merge"]
        rounds.append({name: took / job.devices for name, took in taken.items()})
    steady = {name: statistics.median(each[name] for each in rounds) for name in first}
    compiling = sum(first[name] - steady[name] * job.devices for name in first)
    responder = Responder(model, tokenizer, mesh, _LIMITS)
    return {
        "rounds": rounds,
        "encoding": encoding,
        "compiling": compiling,
        "answers": _answers(responder, pool.merge(weights[0]), tasks),
    }


def _loaded(job: Job) -> Any:
    mesh = make_mesh(pop=job.devices)
    sources = survey(job.pool, dtype=job.dtype)
    model = described(sources[0].architecture)
    return pools.load(sources, mesh, model.sharding_rules, dtype=job.dtype), model, mesh


def _tasks(job: Job) -> list[Task]:
    """The questions as lm-eval asks them: a space before each option."""
    asked = {}
    for name in ("choice", "writing"):
        lines = (Path(job.questions) / f"{name}.jsonl").read_text().splitlines()
        asked[name] = [json.loads(line) for line in lines]
    choices = [
        Example(
            each["question"],
            f" {each['options'][each['answer']]}",
            tuple(f" {option}" for option in each["options"]),
        )
        for each in asked["choice"]
    ]
    texts = [Example(each["question"], each["answer"]) for each in asked["writing"]]
    return [
        multiple_choice("choice", {"search": choices}, form="text"),
        generation("writing", {"search": texts}, max_new_tokens=job.new_tokens, form="text"),
    ]


def _answers(responder: Responder, merged: Any, tasks: Sequence[Task]) -> dict[str, list]:
    """Which option the first model rates highest, and what it writes."""
    found: dict[str, list] = {}
    for task in tasks:
        examples = task.splits["search"]
        asked = [task.requests(example) for example in examples]
        left = iter(responder(merged, [request for each in asked for request in each])[0])
        answered: list[Any] = [[next(left) for _ in each] for each in asked]
        if task.name == "writing":
            found[task.name] = [text for (text,) in answered]
        else:
            rated = [[likely.nats for likely in each] for each in answered]
            found[task.name] = [nats.index(max(nats)) for nats in rated]
    return found


def prefill(job: Job) -> dict[str, Any]:
    """FLOP/s of a prefill, all its matrix products counted, and of one large matrix product."""
    pool, model, _ = _loaded(job)
    params, (B, T) = pool.trees[0], job.prefill
    tokens_BxT = jnp.asarray(np.random.default_rng(0).integers(0, model.vocabulary, (B, T)))
    padding_B = jnp.zeros(B, jnp.int32)

    def read(params, tokens_BxT, padding_B):
        return model.prefill(params, tokens_BxT, padding_B, T)

    def summed(one, other):
        """In float32, as the model's products are: for bfloat16 on CPUs the faster way."""
        return jnp.matmul(one, other, preferred_element_type=jnp.float32)

    counted = products(jax.make_jaxpr(read)(params, tokens_BxT, padding_B).jaxpr, 1)
    flops = sum(each.times * each.flops for each in counted)
    dtype = jax.tree.leaves(params)[0].dtype
    square = jax.random.normal(jax.random.key(0), (_SIDE, _SIDE), dtype)
    programs = {
        "prefill": (flops, jax.jit(read), (params, tokens_BxT, padding_B)),
        "product": (2 * _SIDE**3, jax.jit(summed), (square, square)),
    }
    for _, program, arguments in programs.values():
        jax.block_until_ready(program(*arguments))
    rounds = []
    for _ in range(job.rounds):
        taken = {}
        for name, (work, program, arguments) in programs.items():
            taken[name] = work / seconds(program, *arguments)
        rounds.append(taken)
    return {"rounds": rounds, "dtype": str(dtype), "flops": flops}


def overhead(job: Job) -> dict[str, Any]:
    """Where the seconds of a whole run go.

    `evaluating` is inside `Evaluator.steps`: merging, asking, judging, and what compiles there; and
    outside of it as long as the devices are at work on the next step, as far as that is certain.
    `compiling` is what tracing and XLA take elsewhere. The rest is the overhead: `search` from the
    beginning of the first evaluation to the end of the last, `around` before and after that.
    `recording` is what is outside of `Evaluator.steps` between two steps, whatever devices do.
    """
    sys.path.insert(0, str(Path(job.config).parent))
    config = importlib.import_module(Path(job.config).stem).get_config()
    config.update_from_flattened_dict(job.changes)
    clock, rounds = _Clock(), []
    for _ in range(job.rounds):
        clock.evaluated, clock.compiled, clock.recording = [], [], 0.0
        with tempfile.TemporaryDirectory() as directory:
            started = time.perf_counter()
            phases = search(config, directory)["seconds"]
            whole = time.perf_counter() - started
        between = (clock.evaluated[0][0], clock.evaluated[-1][1])
        evaluating, compiling = clock.evaluating(), clock.compiling((started, started + whole))
        searching = between[1] - between[0] - evaluating
        rounds.append(
            {
                "run": whole,
                "evaluating": evaluating,
                "compiling": compiling,
                "search": searching - clock.compiling(between),
                "recording": clock.recording,
                "around": whole - searching - evaluating - compiling + clock.compiling(between),
                **{f"phase {name}": took for name, took in phases.items()},
            }
        )
    return {"rounds": rounds}


class _Clock:
    """When evaluators or their devices were at work, and when something was compiled."""

    def __init__(self) -> None:
        self.evaluated: list[tuple[float, float]] = []
        self.compiled: list[tuple[float, float]] = []
        self.recording = 0.0  # seconds between two steps
        self._launched: Any = ()
        originals, clock = (Evaluator._launch, Evaluator.steps), self

        def launch(self: Evaluator, weights_CxK: np.ndarray) -> Any:
            clock._launched = originals[0](self, weights_CxK)
            return clock._launched

        def steps(self: Evaluator, weights_PxK: np.ndarray) -> Iterator[Any]:
            left, yielded = originals[1](self, weights_PxK), 0.0
            while True:
                started = time.perf_counter()
                if yielded:
                    clock.recording += started - yielded
                if yielded and clock._at_work():
                    started = yielded
                step = next(left, None)
                yielded = time.perf_counter()
                clock.evaluated.append((started, yielded))
                if step is None:
                    return
                yield step

        Evaluator._launch, Evaluator.steps = launch, steps
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _at_work(self) -> bool:
        """Whether devices have not ended what was launched last."""
        of_arrays = [each for each in jax.tree.leaves(self._launched) if hasattr(each, "is_ready")]
        return not all(each.is_ready() for each in of_arrays)

    def evaluating(self) -> float:
        """Seconds inside evaluators."""
        return sum(stop - start for start, stop in self.evaluated)

    def compiling(self, within: tuple[float, float]) -> float:
        """Seconds of compilation in a span of time, outside evaluators; nested ones count once."""
        total, until = 0.0, within[0]
        # What evaluators took comes first where both begin together, and counts for nothing.
        spans = [(*span, 0) for span in self.evaluated] + [(*span, 1) for span in self.compiled]
        for start, stop, counts in sorted(spans):
            begin, end = max(start, until), min(stop, within[1])
            total += counts * max(0.0, end - begin)
            until = max(until, end)
        return total

    def _heard(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            now = time.perf_counter()
            self.compiled.append((now - duration_secs, now))


def seconds(run: Callable[..., Any], *arguments: Any) -> float:
    """How long a call takes until its arrays are there."""
    started = time.perf_counter()
    jax.block_until_ready(run(*arguments))
    return time.perf_counter() - started


MEASUREMENTS = {"candidates": candidates, "prefill": prefill, "overhead": overhead}

if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    the_job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    if the_job.what != "overhead":  # there the config says it
        jax.config.update("jax_num_cpu_devices", the_job.devices)
    found = MEASUREMENTS[the_job.what](the_job)
    packages = ("jaxmerge", "jax", "jaxlib")
    found["versions"] = {name: importlib.metadata.version(name) for name in packages}
    Path(the_job.out).write_text(json.dumps(found))
