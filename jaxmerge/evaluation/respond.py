"""Requests to responses: what merged models answer, many models and requests at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from jaxmerge.errors import JaxmergeError
from jaxmerge.evaluation import batches
from jaxmerge.evaluation.batches import Limits, Microbatch, Part, Writing
from jaxmerge.evaluation.generate import Draw, generate, log_likelihood, stop_states
from jaxmerge.evaluation.tokenizer import Tokenizer
from jaxmerge.hosts import processes
from jaxmerge.models.deferred import apart, joined
from jaxmerge.models.model import Model, Params
from jaxmerge.tasks.requests import Generate, Likely, Request, Response

_WITHIN_A_MODEL = ("data", "fsdp", "tensor")  # mesh axes that need collectives

_COMPACTED = 16  # rows; of fewer, those that are finished are not taken out: it would gain little

_CACHED = 1024  # tokens: `Limits.cached` of a CPU, for models of some 100 values a token and layer

_NOT_FINITE = -1e9  # nats that stand for a likelihood that is no number

Outputs = list[tuple[Any, ...]]  # of the microbatches of each group: arrays `[C, B, ...]`


class Placed(NamedTuple):
    """A microbatch on the devices; see `batches.Microbatch`."""

    requests: np.ndarray
    arrays: tuple[Array, ...]


class Group(NamedTuple):
    """Microbatches that share a program: `program(merged, *microbatch.arrays, *shared)`."""

    program: Callable[..., Any]
    microbatches: Sequence[Microbatch | Placed]
    shared: tuple[Any, ...]  # arrays that all of them take
    writing: Writing | None = None  # what is generated; None: likelihoods


class Prepared(NamedTuple):
    """Requests, encoded, and on the devices when they are to be launched."""

    requests: Sequence[Request]
    scored: np.ndarray  # tokens of each request whose likelihood is asked for
    groups: list[Group]
    read: int  # tokens that a model reads for them, without padding


class Answers(NamedTuple):
    """What C models answered.

    Attributes:
        responses: of each model, in the order of the requests.
        written_C: tokens that each model wrote, up to the one that ended each text.
    """

    responses: list[tuple[Response, ...]]
    written_C: Int[np.ndarray, " C"]


class Responder:
    """Answers requests with merged models, which are stacked `[C, ...]` over the `pop` axis.

    Args:
        model: their architecture.
        tokenizer: text to ids; its vocabulary must fit the model's.
        mesh: from `sharding.make_mesh`; models are spread over `pop`, requests over `data`.
        limits: what goes through a model at a time.
        vmap_candidates: of a device's models, how many run side by side in one program; 0: 1 on CPU
            (one after the other is 2 to 3 times faster there), else all.

    Raises:
        JaxmergeError: the vocabularies do not fit.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        mesh: Mesh,
        limits: Limits,
        *,
        vmap_candidates: int = 0,
    ):
        if model.vocabulary and tokenizer.vocabulary > model.vocabulary:
            raise JaxmergeError(
                "the tokenizer has tokens that the model does not know",
                where="pool.tokenizer",
                expected=f"at most {model.vocabulary} tokens",
                found=str(tokenizer.vocabulary),
            )
        data = mesh.shape["data"]
        self._model, self._tokenizer, self._mesh = model.at(mesh), tokenizer, mesh
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        self._limits = limits._replace(multiple=data, cached=_CACHED * data * on_cpu)
        self._stop = tokenizer.stops[0]
        # Between CPU devices, collectives of programs that queue up can wait for each other's
        # threads for ever (jaxlib 0.10.2): there, one program at a time.
        collectives = any(mesh.shape[axis] > 1 for axis in _WITHIN_A_MODEL) or processes.several()
        self._one_at_a_time = on_cpu and collectives
        self._side_by_side = vmap_candidates or (1 if on_cpu else 0)
        self._pieces: list[list[bytes]] = []  # of any token, and of the first

    def prepare(self, requests: Sequence[Request], where: str = "") -> Prepared:
        """Encodes requests and puts them on the devices.

        Args:
            requests: of any kind.
            where: whose they are, for error messages.

        Raises:
            JaxmergeError: a prompt is empty, or too long for the model.
        """
        encoded = self.encode(requests, where)
        return encoded._replace(groups=[self._placed(group) for group in encoded.groups])

    def encode(self, requests: Sequence[Request], where: str = "") -> Prepared:
        """What `prepare` puts on the devices, still on the host: they need not be there.

        Raises:
            JaxmergeError: as `prepare`.
        """
        # Rows that are left, or joined, of several devices would have to be spread anew.
        alone = self._mesh.shape["data"] == 1
        encoded = batches.encode(
            requests,
            self._tokenizer,
            self._limits,
            where,
            branching=self._model.branches is not None,
            joining=self._model.joined is not None and alone,
        )
        groups = []
        if encoded.scoring:
            program = self._program(_scoring(self._model))
            groups.append(Group(program, encoded.scoring, ()))
        for kind, microbatches in encoded.writing.items():
            shared = self._stop_states(kind.until)
            for parts, those in _by_parts(microbatches).items():
                run = _writing(self._model, kind, self._tokenizer.stops, alone, parts)
                groups.append(Group(self._program(run), those, shared, kind))
        return Prepared(requests, encoded.scored, groups, encoded.read)

    def launch(self, prepared: Prepared, merged: Params) -> Outputs:
        """Enqueues the programs; waits for the device only where they must not queue up.

        Args:
            prepared: from `prepare`.
            merged: parameters of C models, `[C, ...]`; C is a multiple of the `pop` axis.
        """
        return [
            tuple(
                self._started(group.program(merged, *microbatch.arrays, *group.shared))
                for microbatch in group.microbatches
            )
            for group in prepared.groups
        ]

    def answers(self, prepared: Prepared, outputs: Outputs, count: int) -> Answers:
        """What the first `count` models answered."""
        outputs = processes.fetch(outputs)
        answers: list[list[Response]] = [[""] * len(prepared.requests) for _ in range(count)]
        nats_RxC = np.zeros((len(prepared.requests), count))
        greedy_RxC = np.ones(nats_RxC.shape, bool)
        written_C = np.zeros(count, np.int64)
        for group, of_group in zip(prepared.groups, outputs):
            for microbatch, output in zip(group.microbatches, of_group):
                arrays = [array[:count] for array in output]
                asked = microbatch.requests >= 0  # the rest only fills up
                places = microbatch.requests[asked]
                if group.writing is None:
                    # In float64, and some texts have several rows.
                    np.add.at(nats_RxC, places, arrays[0][:, asked].T)
                    np.logical_and.at(greedy_RxC, places, arrays[1][:, asked].T)
                    continue
                written_C += np.count_nonzero(arrays[0] != self._stop, axis=(1, 2))
                for i, tokens_CxM in zip(places, np.moveaxis(arrays[0][:, asked], 1, 0)):
                    for answer, tokens_M in zip(answers, tokens_CxM):
                        answer[i] = self._text(prepared.requests[i], tokens_M)
        # Logits that overflow are those of a merge that is no model: it must lose, not end the run.
        nats_RxC = np.where(np.isfinite(nats_RxC), nats_RxC, _NOT_FINITE)
        for i in np.flatnonzero(prepared.scored):
            for answer, nats, greedy in zip(answers, nats_RxC[i], greedy_RxC[i]):
                answer[i] = Likely(float(nats), bool(greedy), int(prepared.scored[i]))
        return Answers([tuple(answer) for answer in answers], written_C)

    def __call__(self, merged: Params, requests: Sequence[Request]) -> list[tuple[Response, ...]]:
        """The responses of all models `[C, ...]` to all requests."""
        prepared = self.prepare(requests)
        count = jax.tree.leaves(merged)[0].shape[0]
        return self.answers(prepared, self.launch(prepared, merged), count).responses

    def _program(self, run: Callable[..., Any]) -> Callable[..., Any]:
        return population_program(run, self._mesh, self._side_by_side)

    def _placed(self, group: Group) -> Group:
        over_data = NamedSharding(self._mesh, PartitionSpec("data"))
        everywhere = NamedSharding(self._mesh, PartitionSpec())
        return group._replace(
            microbatches=[
                Placed(
                    each.requests,
                    tuple(processes.place(np.asarray(array), over_data) for array in each.arrays),
                )
                for each in group.microbatches
            ],
            shared=tuple(processes.place(array, everywhere) for array in group.shared),
        )

    def _stop_states(self, until: tuple[str, ...]) -> tuple[np.ndarray, ...]:
        if not until:
            return ()
        if not self._pieces:
            pieces = self._tokenizer.pieces(), self._tokenizer.pieces(first=True)
            # A model can write ids that its tokenizer does not know; they add nothing to the text.
            unknown = [b""] * (self._model.vocabulary - len(pieces[0]))
            self._pieces = [each + unknown for each in pieces]
        return (stop_states(until, *self._pieces),)

    def _started(self, output: Any) -> Any:
        return jax.block_until_ready(output) if self._one_at_a_time else output

    def _text(self, request: Request, tokens_M: np.ndarray) -> str:
        """What was written, without what ended it."""
        assert isinstance(request, Generate)
        ends = np.flatnonzero(tokens_M == self._stop)
        text = self._tokenizer.decode(tokens_M[: ends[0] if len(ends) else None].tolist())
        first = [text.find(stop) for stop in request.until if stop and stop in text]
        return text[: min(first)] if first else text


def _by_parts(
    microbatches: Sequence[Microbatch],
) -> dict[tuple[Part, ...], list[Microbatch]]:
    found: dict[tuple[Part, ...], list[Microbatch]] = {}
    for each in microbatches:
        found.setdefault(each.parts, []).append(each)
    return found


# Cached, as is the program made of them: splits, tasks and runs share what is compiled.
@functools.cache
def _writing(
    model: Model,
    kind: Writing,
    stops: tuple[int, ...],
    compacted: bool,
    parts: tuple[Part, ...],
) -> Callable[..., Any]:
    draw = Draw(kind.temperature, kind.top_p) if kind.temperature else None

    def run(params: Params, *arrays_B: Array) -> tuple[Array]:
        B = len(arrays_B[0])
        made = generate(
            model,
            params,
            *arrays_B,
            max_new_tokens=kind.max_new_tokens,
            stops=stops,
            draw=draw,
            rows=[B // 2, B // 4] if compacted and B >= _COMPACTED else [],
            parts=parts,
        )
        return (made,)

    return run


@functools.cache
def _scoring(model: Model) -> Callable[..., Any]:
    return functools.partial(log_likelihood, model)


@functools.cache
def population_program(
    run: Callable[..., Any], mesh: Mesh, vmap_candidates: int
) -> Callable[..., Any]:
    """Lifts `run(params, *rows_B) -> [B, ...]` to `(merged_C, *rows_B) -> [C, B, ...]`.

    Each place of the `pop` axis works on its own candidates; inside, the compiler spreads one model
    over the other axes.

    Args:
        run: what is done with one model; gives a tuple of arrays.
        mesh: whose `pop` axis the models are spread over.
        vmap_candidates: models side by side; 0: all of a device's.
    """

    def local(own_C: Params, shared: Any, *arrays_B: Array) -> Any:
        def one(own: Params) -> Any:
            return run(joined(own, shared), *arrays_B)

        if vmap_candidates == 1:
            return jax.lax.map(one, own_C)
        if not vmap_candidates:
            return jax.vmap(one)(own_C)
        return jax.lax.map(one, own_C, batch_size=vmap_candidates)

    def lifted(merged: Params, *arrays_B: Array) -> Any:
        over_pop = PartitionSpec("pop")
        specs = (over_pop, PartitionSpec(), *(PartitionSpec() for _ in arrays_B))
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=specs,
            out_specs=over_pop,
            axis_names={"pop"},
            check_vma=False,
        )(*apart(merged), *arrays_B)

    return jax.jit(lifted)
