"""What evaluation needs of a model: a few pure functions of a parameter tree."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

Params = Any  # a pytree of arrays; see also `Model.layers`
State = Any  # a pytree of arrays: what a model keeps between two tokens

# apply(params, tokens_BxT) -> logits_BxTxV, causal: logits[:, t] depend on tokens[:, :t + 1] alone
Apply = Callable[[Params, Int[Array, "B T"]], Float[Array, "B T V"]]


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A language model as pure functions. Two models are equal when they are the same object.

    Attributes:
        apply: `(params, tokens_BxT) -> logits_BxTxV`; causal.
        prefill: `(params, tokens_BxT, padding_B, slots) -> (logits_BxV, state)`. Rows are padded on
            the left by `padding_B` tokens; the state has room for `slots` tokens; the logits are
            those after the last token.
        decode: `(params, tokens_B, state) -> (logits_BxV, state)`; one token on.
        rows: `(state, rows_N) -> state`; the state of some of its rows, by number.
        joined: `(states, skipped) -> state`, or None where the model can't: the rows of several
            states as those of one, when as many slots more are left free before the tokens of each
            as `skipped` says, and all are then at the same slot.
        branches: `(params, tokens_BxT, branch_BxT, asked_BxQ) -> logits_BxQxV`, or None where the
            model can't. A row is a trunk (branch 0) and branches (1, 2, ...) that go on from it,
            side by side: each token reads the trunk and what stands before it on its own branch, as
            if there were nothing else. The logits are those after the tokens at `asked_BxQ`.
        init: `key -> params`, or None where the model can't make its own parameters.
        sharding_rules: see `jaxmerge.sharding.shardings`.
        layers: the top-level entry of the parameters whose leaves are stacked over layers
            `[L, ...]` and may be `Deferred`, to be made a layer at a time; "" where there is none.
        on_cpu: the same model as it is faster on CPUs; None: there is no other. See `at`.
        vocabulary: tokens it knows, or 0 where it doesn't say.
        architecture: what `checkpoints.orbax.save` writes beside the parameters, so that the
            checkpoint can be opened without being told; {} where there is no such description.
    """

    apply: Apply
    prefill: Callable[..., tuple[Float[Array, "B V"], State]]
    decode: Callable[..., tuple[Float[Array, "B V"], State]]
    rows: Callable[[State, Int[Array, " N"]], State]
    joined: Callable[[Sequence[State], Sequence[int]], State] | None = None
    branches: Callable[..., Float[Array, "B Q V"]] | None = None
    init: Callable[[Array], Params] | None = None
    sharding_rules: tuple[tuple[str, tuple[str | None, ...]], ...] = ((".*", ()),)
    layers: str = ""
    on_cpu: Model | None = None
    vocabulary: int = 0
    architecture: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def at(self, mesh: Mesh) -> Model:
        """The model as it is fastest on the devices of a mesh."""
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        return self.on_cpu if on_cpu and self.on_cpu else self


class _Written(NamedTuple):
    """The state of a model without a cache: all tokens so far, padded on the right."""

    tokens_BxS: Int[Array, "B S"]
    length_B: Int[Array, " B"]


def from_apply(apply: Apply) -> Model:
    """A model out of a causal `apply` alone.

    Without a cache each new token reads the whole sequence again, so generation costs about
    `slots` times the work; log-likelihoods cost the same as with a cache.
    """

    def last_logits(params: Params, written: _Written) -> Float[Array, "B V"]:
        logits_BxSxV = apply(params, written.tokens_BxS)
        last_B = written.length_B - 1
        return jnp.take_along_axis(logits_BxSxV, last_B[:, None, None], axis=1)[:, 0]

    def prefill(params, tokens_BxT, padding_B, slots):
        left_aligned = jax.vmap(lambda row, padding: jnp.roll(row, -padding))(tokens_BxT, padding_B)
        T = tokens_BxT.shape[1]
        written = _Written(jnp.pad(left_aligned, ((0, 0), (0, slots - T))), T - padding_B)
        return last_logits(params, written), written

    def decode(params, tokens_B, written):
        here_BxS = jnp.arange(written.tokens_BxS.shape[1])[None] == written.length_B[:, None]
        tokens_BxS = jnp.where(here_BxS, tokens_B[:, None], written.tokens_BxS)
        written = _Written(tokens_BxS, written.length_B + 1)
        return last_logits(params, written), written

    def rows(written, rows_N):
        return jax.tree.map(lambda of_B: of_B[rows_N], written)

    def joined(states, skipped):
        tokens = [
            jnp.pad(state.tokens_BxS, ((0, 0), (0, more))) for state, more in zip(states, skipped)
        ]
        lengths = [state.length_B for state in states]
        return _Written(jnp.concatenate(tokens), jnp.concatenate(lengths))

    return Model(apply=apply, prefill=prefill, decode=decode, rows=rows, joined=joined)
