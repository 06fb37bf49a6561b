"""What a run asks of its models, as shapes: the programs, and how often each is called."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmerge.evaluation.minibatches import asked
from jaxmerge.evaluation.respond import Group, Responder
from jaxmerge.evaluation.rows import Limits
from jaxmerge.evaluation.soft import FORMS, program
from jaxmerge.evaluation.tokenizer import Tokenizer
from jaxmerge.merge.groups import Groups
from jaxmerge.merge.rematerialised import deferred, without
from jaxmerge.merge.searched import Searched
from jaxmerge.models.model import Model
from jaxmerge.planning.counting import Product, products
from jaxmerge.sharding import Rules, shardings
from jaxmerge.tasks.common import Task
from jaxmerge.trees import PyTree, named_leaves


class Call(NamedTuple):
    """Microbatches of one shape.

    Attributes:
        program: `(merged, *arrays) -> outputs`.
        arrays: `ShapeDtypeStruct` with shardings; the first is `[B, T]` tokens.
        new_tokens: that are written; 0: log-likelihoods.
        times: how often a step calls it, by split.
        climbs: whether it differentiates; then its arrays are `[pop, B, T]`.
    """

    program: Callable[..., Any]
    arrays: tuple[jax.ShapeDtypeStruct, ...]
    new_tokens: int
    times: Mapping[str, int]
    climbs: bool = False

    @property
    def name(self) -> str:
        """For the reader."""
        B, T = self.arrays[0].shape[-2:]
        if self.climbs:
            return f"gradient of {B} x {T} tokens"
        what = f"generate {self.new_tokens} after" if self.new_tokens else "log-likelihood of"
        return f"{what} {B} x {T} tokens"

    @property
    def slots(self) -> int:
        """Tokens that a row has in the end."""
        return self.arrays[0].shape[-1] + self.new_tokens

    @property
    def tokens(self) -> int:
        """Tokens of all rows in the end."""
        return self.arrays[0].shape[-2] * self.slots


def calls(responder: Responder, splits: Mapping[str, Sequence[Task]], mesh: Mesh) -> list[Call]:
    """All calls of a step.

    Args:
        responder: of the run.
        splits: the tasks of `search`, `test` and `heldout`; held-out tasks are asked their test
            examples.
        mesh: of the responder.

    Raises:
        JaxmergeError: a prompt is empty, or too long for the model.
    """
    found: dict[Any, Call] = {}
    for split, tasks in splits.items():
        for task in tasks:
            examples = task.splits.get("search" if split == "search" else "test", ())
            requests = [request for example in examples for request in task.requests(example)]
            for group in responder.encode(requests, f"task {task.name}").groups:
                for microbatch in group.microbatches:
                    call = _call(group, microbatch.arrays, mesh)
                    key = (group.program, tuple(array.shape for array in call.arrays))
                    times = dict(found.get(key, call).times)
                    times[split] = times.get(split, 0) + 1
                    found[key] = call._replace(times=times)
    return list(found.values())


def climbing(
    model: Model,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    limits: Limits,
    minibatch: int,
    mesh: Mesh,
) -> list[Call]:
    """The calls of a step of a search by gradients: of each task its largest minibatch.

    Args:
        model: of all candidates.
        tokenizer: text to ids.
        tasks: of the search.
        limits: of which the context is heeded.
        minibatch: examples of a task in a step.
        mesh: of the run.
    """
    found: list[Call] = []
    over_pop = NamedSharding(mesh, PartitionSpec("pop"))
    for task in tasks:
        of = asked(
            *(task, tokenizer, limits, minibatch),
            places=mesh.shape["pop"],
            branching=model.branches is not None,
        )
        if not of.minibatches:  # texts will stand for it, which are not known yet
            continue
        largest = max(of.minibatches, key=lambda each: each.arrays[0].size)
        arrays = tuple(
            jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=over_pop)
            for each in largest.arrays
        )
        climb = program(model, mesh, of.kind, FORMS[0])
        found.append(Call(climb, arrays, 0, {"step": 1}, climbs=True))
    return found


def _call(group: Group, arrays: Sequence[Any], mesh: Mesh) -> Call:
    def abstract(array: Any, *spec: str) -> jax.ShapeDtypeStruct:
        where = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=where)

    return Call(
        group.program,
        (
            *(abstract(array, "data") for array in arrays),
            *(abstract(array) for array in group.shared),
        ),
        group.writing.max_new_tokens if group.writing else 0,
        {},
    )


def counted(call: Call, merged: PyTree) -> list[Product]:
    """The matrix products of one call, for the candidates of one place of the `pop` axis."""
    closed = jax.make_jaxpr(call.program)(merged, *call.arrays)
    return list(products(closed.jaxpr, max(call.new_tokens - 1, 0)))


def placed(abstract: PyTree, rules: Rules, mesh: Mesh) -> PyTree:
    """Leaves with the shardings that the pool has."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        abstract,
        shardings(abstract, rules, mesh),
    )


def cast(abstract: PyTree, dtype: str) -> PyTree:
    """Leaves as they are once a pool is loaded with this `dtype`; "": as they are."""

    def one(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        floating = dtype and jnp.issubdtype(leaf.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype) if floating else leaf.dtype)

    return jax.tree.map(one, abstract)


def share(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes of a leaf on one device."""
    assert leaf.sharding is not None
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def shares(tree: PyTree) -> dict[str, int]:
    """Bytes of each leaf on one device, by name."""
    return {name: share(leaf) for name, leaf in named_leaves(tree).items()}


class Step(NamedTuple):
    """What is merged in a step.

    Attributes:
        tree: one checkpoint, as `placed` gives it.
        checkpoints: K, and the base where a method takes one.
        candidates: on all devices.
        mesh: of the run.
        layers: `Model.layers` where they are rematerialised; "": whole models are merged.
        storage: how a pool on the devices is held; see `pool.load`.
        groups: of leaves that share their weights; None: all do.
        method: that candidates are merged by; None: they are weighted sums.
        stacked: `Model.layers`, of which each is merged by itself by a method; "": there are none.
    """

    tree: PyTree
    checkpoints: int
    candidates: int
    mesh: Mesh
    layers: str = ""
    storage: str = "exact"
    groups: Groups | None = None
    method: Searched | None = None
    stacked: str = ""

    @property
    def by_leaf(self) -> Searched | None:
        """The method, if each candidate reads every checkpoint anew, leaf by leaf."""
        return self.method if self.method and not self.method.summed else None

    @property
    def here(self) -> int:
        """Candidates of a place of the `pop` axis."""
        return -(-self.candidates // self.mesh.shape["pop"])

    @property
    def once(self) -> PyTree:
        """The leaves that are merged before the models run."""
        return without(self.tree, self.layers) if self.layers else self.tree

    @property
    def layer(self) -> int:
        """Bytes on a device of a layer that is merged late; 0 where none is."""
        if not self.layers:
            return 0
        return sum(shares(self.tree[self.layers]).values()) // self.depth

    @property
    def depth(self) -> int:
        """Layers that are merged late, L."""
        return jax.tree.leaves(self.tree[self.layers])[0].shape[0] if self.layers else 0

    def merged(self) -> PyTree:
        """The merged models: `[C, ...]`, C over `pop`; layers may be `Deferred`."""

        def one(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            assert isinstance(leaf.sharding, NamedSharding)
            where = NamedSharding(self.mesh, PartitionSpec("pop", *leaf.sharding.spec))
            return jax.ShapeDtypeStruct((self.candidates, *leaf.shape), leaf.dtype, sharding=where)

        models = jax.tree.map(one, self.once)
        if not self.layers:
            return models
        layers = self.tree[self.layers]
        shape = (self.candidates, self.depth, self.checkpoints)
        over_pop = NamedSharding(self.mesh, PartitionSpec("pop"))
        weights = jax.ShapeDtypeStruct(shape, np.float32, sharding=over_pop)
        each = jax.tree.map(lambda _: weights, layers)
        return {**models, self.layers: deferred([layers] * self.checkpoints, each)}


def state_bytes(model: Model, tree: PyTree, call: Call) -> int:
    """Bytes of what one model keeps between tokens (its cache), for all rows of a call."""
    B, T = call.arrays[0].shape
    tokens = jax.ShapeDtypeStruct((B, T), np.int32)
    padding = jax.ShapeDtypeStruct((B,), np.int32)
    slots = call.slots - 1
    _, state = jax.eval_shape(lambda *a: model.prefill(*a, slots), tree, tokens, padding)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
