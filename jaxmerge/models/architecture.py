"""The shape of a decoder: everything that its checkpoint does not say by itself."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

from jaxmerge.errors import JaxmergeError
from jaxmerge.models.rope import Rope

_LARGEST = 10**7  # size: more than any model has


@dataclasses.dataclass(frozen=True)
class AttentionKind:
    """What a layer's queries may look at, and how they know where it is."""

    window: int = 0  # a token sees itself and window - 1 tokens before it; 0: all before it
    # None: no positions at all (NoPE, arXiv 2305.19466).
    rope: Rope | None = dataclasses.field(default_factory=Rope)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder and the variations that families differ in.

    Raises:
        JaxmergeError: fields that contradict each other.
    """

    vocab: int  # tokens
    width: int  # D
    layers: int  # L
    heads: int  # H, query heads
    kv_heads: int  # J, key/value heads; divides heads
    head_width: int  # C, even
    feed_forward: int  # F; of each expert where there are experts
    # Kinds of attention, and which of them each layer has; (): all have the first.
    attention: tuple[AttentionKind, ...] = (AttentionKind(),)
    pattern: tuple[int, ...] = ()
    # Where the norms stand. pre: before each branch. post: after each branch, before it is added to
    # the residual. both: before and after. parallel: one norm before both branches, which read the
    # same input.
    block: Literal["pre", "post", "both", "parallel"] = "pre"
    norm: Literal["rms", "layer"] = "rms"  # layer: the mean is subtracted too; no bias
    norm_epsilon: float = 1e-6
    norm_offset: float = 0.0  # added to every norm's scale; 1.0 where scales are stored as w - 1
    # Norm of queries and keys before rotation. head: one scale [C] for all heads. heads: a scale
    # [H, C], each head by itself. joint: over all heads together, scale [H, C].
    query_key_norm: Literal["", "head", "heads", "joint"] = ""
    query_key_value_bias: bool = False
    out_bias: bool = False
    feed_forward_bias: bool = False
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    experts: int = 0  # E; 0: a dense feed-forward
    experts_per_token: int = 0
    normalize_experts: bool = True  # weights of a token's experts sum to 1
    attention_scale: float = 0.0  # of query-key products; 0: C^-1/2
    attention_softcap: float = 0.0  # x -> cap tanh(x / cap); 0: none
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what a branch adds to the residual
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    tied_embeddings: bool = True  # the output projection is the embedding

    def __post_init__(self):
        sizes = (self.vocab, self.width, self.layers, self.heads, self.kv_heads, self.head_width)
        self._require(
            all(type(size) is int and 0 < size <= _LARGEST for size in (*sizes, self.feed_forward)),
            f"sizes must be whole numbers from 1 to {_LARGEST}",
        )
        self._require(self.heads % self.kv_heads == 0, "kv_heads must divide heads")
        self._require(
            self.layers * max(self.experts, 1) <= 10**6,
            "there are more layers and experts than any model has",
        )
        self._require(
            self.head_width % 2 == 0, "head_width must be even (rotary positions turn pairs)"
        )
        self._require(
            not self.pattern or len(self.pattern) == self.layers, "pattern needs one entry a layer"
        )
        self._require(
            all(0 <= kind < len(self.attention) for kind in self.pattern),
            "pattern names a kind of attention that is not there",
        )
        self._require(
            not self.experts or 0 < self.experts_per_token <= self.experts,
            "experts_per_token must be from 1 to experts",
        )

    @property
    def kinds(self) -> tuple[int, ...]:
        """Of each layer the number of its kind of attention."""
        return self.pattern or (0,) * self.layers

    @staticmethod
    def from_plain(fields: Mapping[str, Any]) -> DecoderConfig:
        """The config that `plain` wrote, also after a way through JSON.

        Raises:
            TypeError: a field is missing or unknown.
        """
        values = dict(fields)
        if "attention" in values:
            values["attention"] = tuple(
                AttentionKind(
                    kind["window"], Rope.from_plain(kind["rope"]) if kind["rope"] else None
                )
                for kind in values["attention"]
            )
        if "pattern" in values:
            values["pattern"] = tuple(values["pattern"])
        return DecoderConfig(**values)

    def plain(self) -> dict[str, Any]:
        """The fields as dicts, lists, strings and numbers."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def _require(self, holds: bool, message: str) -> None:
        if not holds:
            raise JaxmergeError(
                message, where="DecoderConfig", expected="fields that go together", found=str(self)
            )


def up_to_date(said: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a checkpoint says of its model, with the fields that a decoder has got since.

    Versions that did not know a field made what its default is.
    """
    if said.get("model") != "decoder":
        return said
    fields = {key: value for key, value in said.items() if key != "model"}
    try:
        return {"model": "decoder", **DecoderConfig.from_plain(fields).plain()}
    except (TypeError, KeyError, JaxmergeError):  # of a later version, or wrong: told where used
        return said
