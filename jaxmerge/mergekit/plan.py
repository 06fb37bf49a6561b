"""From a document to a recipe for each tensor of the result.

Layer j of L of a slice is at j / (L - 1) of its gradients, that of a slice of one layer at 1; what
is in no layer is at 0: before the layers with the settings of the first slice, after them with
those of the last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.checkpoints.vocabulary import Vocabulary
from jaxmerge.errors import JaxmergeError
from jaxmerge.mergekit.document import Document, Input, Module, Reference, Slice
from jaxmerge.mergekit.genes import Roles, check_parameters, genes, method_of, roles
from jaxmerge.mergekit.models import Member, Place, is_embedding, is_head, place
from jaxmerge.mergekit.vocabulary import vocabulary
from jaxmerge.streaming.recipes import Model, Read, Recipe


class Plan(NamedTuple):
    """A merge, as it will be made.

    Attributes:
        recipes: by the name of the tensor.
        models: that are read.
        first: the model whose config the merge has, and whose tokenizer if nothing is said.
        vocabulary: of the merge; None: that of `first`.
        stacked: for each module the layers of the result: in which model, and which of its layers,
            each begins.
        warnings: what should be known of it.
    """

    recipes: Mapping[str, Recipe]
    models: tuple[Model, ...]
    first: Member
    vocabulary: Vocabulary | None
    stacked: Mapping[str, Sequence[tuple[Member, int]]]
    warnings: tuple[str, ...]


class _Part(NamedTuple):
    """A slice whose models and layers are known."""

    module: Module
    slice: Slice
    inputs: tuple[Input, ...]  # the base among them, where there is one
    begins: tuple[int, ...]  # first layer in each of them
    count: int  # of layers
    offset: int  # of the first layer in the result
    roles: Roles


def plan(document: Document, members: Mapping[Reference, Member]) -> Plan:
    """The recipes of a document.

    Raises:
        JaxmergeError: parameters are missing or of a wrong kind; models have other tensors, shapes
            or layers than each other; something is not supported.
    """
    method_of(document)
    warnings = check_parameters(document)
    _check_same_tensors(document, members)
    base = document.base_model or document.modules[0].slices[0].inputs[0].model
    first = members[base]
    words = _vocabulary(document, members, base)
    recipes: dict[str, Recipe] = {}
    stacked: dict[str, list[tuple[Member, int]]] = {}
    maker = _Maker(document, members, words)
    for module in document.modules:
        names = _claimed(module, document, first)
        for prefix in dict.fromkeys(spot.module for name in names if (spot := place(name))):
            parts = _parts(module, document, members, prefix)
            recipes |= maker.layers(parts, prefix)
            stacked[prefix] = [
                (members[part.inputs[0].model], part.begins[0] + j)
                for part in parts
                for j in range(part.count)
            ]
        loose = [name for name in names if place(name) is None]
        ends = _ends(module, document)
        for name in loose:
            before = is_embedding(name) or "embed" in name
            part = ends[0 if before else -1]
            recipes[name] = maker.recipe(part, name, [name] * len(part.inputs), 0.0)
    _check_covered(first, document, recipes, stacked)
    models = tuple(
        Model(each.name, str(each.directory), each.tensors, each.values, each.files)
        for each in members.values()
    )
    return Plan(recipes, models, first, words, stacked, tuple(warnings))


class _Maker:
    """Makes recipes of the tensors of a document."""

    def __init__(
        self,
        document: Document,
        members: Mapping[Reference, Member],
        words: Vocabulary | None,
    ):
        self._document, self._members, self._words = document, members, words
        self._order = list(members)

    def layers(self, parts: Sequence[_Part], prefix: str) -> dict[str, Recipe]:
        """The recipes of a module's layers."""
        recipes = {}
        for part in parts:
            spots = _by_layer(self._members[part.inputs[0].model], prefix)
            for j in range(part.count):
                at = 1.0 if part.count == 1 else j / (part.count - 1)
                for spot in spots.get(part.begins[0] + j, ()):
                    names = [spot.at(begin + j) for begin in part.begins]
                    name = spot.at(part.offset + j)
                    recipes[name] = self.recipe(part, name, names, at)
        return recipes

    def recipe(self, part: _Part, name: str, names: Sequence[str], at: float) -> Recipe:
        """The recipe of one tensor.

        Args:
            part: the slice that it is in.
            name: in the result.
            names: in each of the models.
            at: where in the slice.
        """
        document, members = self._document, self._members
        found = [members[each.model].tensor(of_model) for each, of_model in zip(part.inputs, names)]
        for each, of_model in zip(part.inputs, found):
            if of_model not in members[each.model].tensors:
                raise each.node.error(f"{each.model} has no tensor {of_model}")
        common = [part.slice.parameters, part.module.parameters, document.parameters]
        numbers = genes(document, part.roles, part.inputs, common, names, name, at)
        vocabular = bool(self._words and (is_embedding(name) or is_head(name)))
        if vocabular:
            reads = [Read(k, self._rows(members[ref], name)) for k, ref in enumerate(self._order)]
            at_read = [self._order.index(each.model) for each in part.inputs]
        else:
            reads = [
                Read(self._order.index(each.model), of_model)
                for each, of_model in zip(part.inputs, found)
            ]
            at_read = list(range(len(reads)))
        leaves = [members[self._order[read.model]].tensors[read.tensor] for read in reads]
        shape = leaves[0].shape
        if self._words and vocabular:
            shape = (self._words.rows, *shape[1:])
        else:
            self._check_shapes(part, found, leaves)
        merged, written = self._dtypes(part, name, leaves)
        return Recipe(
            method=str(document.method.value),
            reads=tuple(reads),
            inputs=tuple(at_read[i] for i in part.roles.inputs),
            base=None if part.roles.base is None else at_read[part.roles.base],
            genes=numbers,
            shape=shape,
            merged=merged,
            written=written,
            align=self._words.align if self._words and vocabular else None,
        )

    def _rows(self, member: Member, name: str) -> str:
        of_model = member.tensor(name)
        if of_model not in member.tensors:
            raise JaxmergeError(
                f"there is no tensor {name}",
                where=str(member.directory),
                expected="a model that has it, as the others do",
            )
        return of_model

    def _check_shapes(
        self, part: _Part, names: Sequence[str], leaves: Sequence[jax.ShapeDtypeStruct]
    ) -> None:
        shapes = [leaf.shape for leaf in leaves]
        if len({*shapes}) == 1:
            return
        rows = is_embedding(names[0]) or is_head(names[0])
        found = (f"{each.model} {list(shape)}" for each, shape in zip(part.inputs, shapes))
        raise part.slice.node.error(
            f"tensor {names[0]} has different shapes",
            expected="tokenizer: {source: base}, or union: then rows are matched by token"
            if rows
            else "models of the same shapes",
            found=", ".join(found),
        )

    def _dtypes(
        self, part: _Part, name: str, leaves: Sequence[jax.ShapeDtypeStruct]
    ) -> tuple[np.dtype, np.dtype]:
        """What values are cast to first, and what is written."""
        stored = {np.dtype(leaf.dtype) for leaf in leaves}
        if not all(jnp.issubdtype(each, jnp.floating) for each in stored):
            if len(stored) > 1:
                raise part.slice.node.error(f"tensor {name} has different types")
            return stored.pop(), np.dtype(leaves[0].dtype)
        dtype = self._document.dtype
        if not dtype and len(stored) > 1:
            raise part.slice.node.error(
                f"tensor {name} is stored in different types",
                expected="dtype: float32, or another that all are cast to",
                found=", ".join(sorted(map(str, stored))),
            )
        merged = np.dtype(jnp.dtype(dtype)) if dtype else stored.pop()
        out = self._document.out_dtype
        return merged, np.dtype(jnp.dtype(out)) if out else merged


def _by_layer(member: Member, prefix: str) -> dict[int, list[Place]]:
    """The tensors of each layer of a module."""
    found: dict[int, list[Place]] = {}
    for name in member.tensors:
        spot = place(name)
        if spot and spot.module == prefix:
            found.setdefault(spot.layer, []).append(spot)
    return found


def _parts(
    module: Module, document: Document, members: Mapping[Reference, Member], prefix: str
) -> list[_Part]:
    """The slices of a module, each with the layers that its models give."""
    parts, offset = [], 0
    for each in module.slices:
        begins, counts = [], []
        inputs, base = _with_base(each, document)
        for given in inputs:
            L = members[given.model].layers().get(prefix, 0)
            first, last = given.layers or (0, L)
            if last > L or not L:
                raise given.node.error(
                    f"{given.model} does not have so many layers",
                    expected=f"at most {L}",
                    found=str([first, last]),
                )
            begins.append(first)
            counts.append(last - first)
        if len({*counts}) != 1:
            raise each.node.error(
                "the models of a slice give different numbers of layers",
                found=", ".join(f"{i.model} {count}" for i, count in zip(inputs, counts)),
            )
        of = roles(document, inputs, base, each.node)
        parts.append(_Part(module, each, inputs, tuple(begins), counts[0], offset, of))
        offset += counts[0]
    return parts


def _ends(module: Module, document: Document) -> tuple[_Part, _Part]:
    """The first and the last slice, for what is in no layer."""
    found = []
    for each in (module.slices[0], module.slices[-1]):
        inputs, base = _with_base(each, document)
        of = roles(document, inputs, base, each.node)
        found.append(_Part(module, each, inputs, (), 0, 0, of))
    return found[0], found[1]


def _with_base(part: Slice, document: Document) -> tuple[tuple[Input, ...], Reference | None]:
    """The models of a slice with the base, which `models` need not have among them."""
    base = part.base_model or document.base_model
    inputs = part.inputs
    named = [each.model for each in inputs]
    for each in inputs:
        if named.count(each.model) > 1:
            raise each.node.error("the model is in this slice twice", found=str(each.model))
    if base is None or base in named:
        return inputs, base
    if any(each.layers for each in inputs):
        if method_of(document).base != "required":
            return inputs, None
        raise part.node.error(
            "the base is not among the sources of this slice, so its layers are not known",
            expected=f"a source with model: {base} and a layer_range",
        )
    return (*inputs, Input(base, None, {}, part.node)), base


def _claimed(module: Module, document: Document, first: Member) -> list[str]:
    """The tensors of a module: of all modules where it has no name."""
    names = list(first.tensors)
    prefixes = list(first.layers())
    sliced = any(each.layers for part in module.slices for each in part.inputs)
    if sliced and len(prefixes) != 1 and not module.name:
        raise module.node.error(
            "slices with layers are for models of one stack of layers",
            expected="models:, or modules: with slices in each",
            found=", ".join(prefixes),
        )
    if not module.name or (module.name == "default" and len(prefixes) == 1):
        return names
    others = [each.name for each in document.modules if each is not module]
    own = [name for name in names if _is_in(name, module.name)]
    if not own or any(_is_in(name, other) for name in own for other in others):
        raise module.node.error(
            "can't be told from the names of the tensors",
            expected=f"a part of their names, such as those of {', '.join(prefixes)}"
            + ("; or default, for all of them" if len(prefixes) == 1 else ""),
            found=module.name,
        )
    return own


def _is_in(name: str, module: str) -> bool:
    return f".{module}." in f".{name}"


def _check_covered(
    first: Member,
    document: Document,
    recipes: Mapping[str, Recipe],
    stacked: Mapping[str, Sequence[Any]],
) -> None:
    """Raises unless every tensor outside of stacks of layers is made by some module."""
    missing = [
        name
        for name in first.tensors
        if name not in recipes and ((spot := place(name)) is None or spot.module not in stacked)
    ]
    if missing:
        raise document.node.error(
            "no module has these tensors",
            found=", ".join(missing[:5]) + ", ..." * (len(missing) > 5),
        )


def _check_same_tensors(document: Document, members: Mapping[Reference, Member]) -> None:
    """Raises unless the models have the same tensors, but for the number of their layers."""

    def kinds(member: Member) -> set[str]:
        found = {spot.at(0) if (spot := place(name)) else name for name in member.tensors}
        return {name for name in found if not is_head(name)}

    base = document.base_model or document.modules[0].slices[0].inputs[0].model
    first = members[base]
    for member in members.values():
        differs = sorted(kinds(member) ^ kinds(first))
        if differs:
            raise document.node.error(
                f"{member.name} does not have the same tensors as {first.name}",
                found=", ".join(differs[:5]) + ", ..." * (len(differs) > 5),
            )
        heads = [name for name in member.tensors if is_head(name)]
        if any(name not in first.tensors for name in heads):
            raise document.node.error(
                f"{member.name} has output embeddings of its own, and {first.name}, whose config "
                "the merge has, has not",
                expected="a base_model with such a tensor",
                found=heads[0],
            )


def _vocabulary(
    document: Document, members: Mapping[Reference, Member], base: Reference
) -> Vocabulary | None:
    if document.tokenizer is None:
        return None
    rows = []
    for member in members.values():
        named = [name for name in member.tensors if is_embedding(name)]
        if len(named) != 1:
            raise document.tokenizer.node.error(
                "the input embeddings can't be told by their name",
                expected="one tensor such as model.embed_tokens.weight",
                found=f"{named} in {member.name}",
            )
        rows.append(member.tensors[named[0]].shape[0])
    return vocabulary(document.tokenizer, members, base, rows)
