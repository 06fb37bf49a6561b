"""The numbers that a method takes for a tensor, out of the parameters of a document."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxmerge.errors import JaxmergeError
from jaxmerge.merge.methods import METHODS, Gene, Method, check_inputs
from jaxmerge.mergekit.document import Document, Input, Reference
from jaxmerge.mergekit.nodes import Node
from jaxmerge.mergekit.settings import Parameters, Value, lookup

# It sets the type of a temporary of mergekit's, and changes no result.
_HARMLESS = ("int8_mask",)
# Parameters of old versions of mergekit, which its newer ones pass over.
_OLD = ("embed_slerp", "use_slerp", "weight_norm")


class Roles(NamedTuple):
    """What the models of a slice are for a method, by their numbers."""

    base: int | None
    inputs: tuple[int, ...]


def method_of(document: Document) -> Method:
    """The method of a document.

    Raises:
        JaxmergeError: there is no such method.
    """
    return METHODS[document.method.choice(tuple(METHODS))]


def roles(document: Document, inputs: Sequence[Input], base: Reference | None, node: Node) -> Roles:
    """Which model is the base, and which are merged, in the order that the method takes.

    Raises:
        JaxmergeError: the method takes another number of models, or a base that is not there.
    """
    method, name = method_of(document), document.method.value
    at = next((i for i, each in enumerate(inputs) if each.model == base), None)
    numbers = tuple(range(len(inputs)))
    if name == "slerp":
        if at is None:
            raise node.error("slerp goes from its base to the other model", expected="base_model")
        found = Roles(None, (at, *(i for i in numbers if i != at)))
    elif method.base == "none" or at is None:
        found = Roles(None, numbers)
    else:
        found = Roles(at, tuple(i for i in numbers if i != at))
    try:
        check_inputs(name, len(found.inputs), with_base=found.base is not None)
    except JaxmergeError as error:
        listed = ", ".join(str(each.model) for each in inputs)
        based = f"; base_model {base}" if base else "; no base_model"
        raise node.error(error.what, expected=error.expected, found=listed + based) from error
    return found


def genes(
    document: Document,
    roles: Roles,
    inputs: Sequence[Input],
    common: Sequence[Parameters],
    names: Sequence[str],
    name: str,
    at: float,
) -> dict[str, Any]:
    """The genes of the method for one tensor, see `merge.methods.merge_tensor`.

    Args:
        document: of the merge.
        roles: of the models.
        inputs: the models.
        common: the levels above them, the nearest first.
        names: of the tensor in each of them, for the filters of what each model has of its own.
        name: in the result, for the filters of what is common to them.
        at: where the tensor's layer is in its slice.

    Raises:
        JaxmergeError: a parameter is missing, or is of another kind.
    """
    found: dict[str, Any] = {}
    for gene in method_of(document).genes:
        if not gene.per_checkpoint:
            value = _value(gene, lookup(gene.name, common, name, at))
            if value is None:
                raise document.node.error(
                    f"{document.method.value} needs the parameter {gene.name}, and nothing says "
                    f"what it is for {name}"
                )
            found[gene.name] = value
            continue
        values = []
        for i in roles.inputs:
            levels = [inputs[i].parameters, *common]
            value = _value(gene, lookup(gene.name, levels, names[i], at))
            if value is None:
                raise inputs[i].node.error(
                    f"{document.method.value} needs the parameter {gene.name} of "
                    f"{inputs[i].model}, and nothing says what it is for {names[i]}"
                )
            values.append(value)
        found[gene.name] = values
    return found


def _value(gene: Gene, found: Value | None) -> Any:
    if found is None:
        return gene.default
    wanted = bool if isinstance(gene.default, bool) else float
    if not isinstance(found.value, wanted):
        raise found.node.error(
            "must be true or false" if wanted is bool else "must be a number",
            found=str(found.value),
        )
    return found.value


def check_parameters(document: Document) -> list[str]:
    """What parameters do nothing here, in sentences, as they do nothing in mergekit.

    Raises:
        JaxmergeError: a parameter is of no method at all.
    """
    own = {gene.name for gene in method_of(document).genes}
    known = {gene.name for method in METHODS.values() for gene in method.genes}
    warnings = []
    for settings in _all(document):
        for name, setting in settings.items():
            if name in own or name in _HARMLESS:
                continue
            if name not in known and name not in _OLD:
                near = difflib.get_close_matches(name, [*own, *_HARMLESS], 1)
                raise setting.node.error(
                    "there is no such parameter" + (f"; is {near[0]} meant?" if near else ""),
                    expected=", ".join(sorted(own)) or f"none, for {document.method.value}",
                    found=name,
                )
            warnings.append(
                f"{setting.node.where}: {document.method.value} has no parameter {name}; it does "
                "nothing"
            )
    return warnings


def _all(document: Document) -> Iterator[Mapping[str, Any]]:
    yield document.parameters
    for module in document.modules:
        yield module.parameters
        for part in module.slices:
            yield part.parameters
            for each in part.inputs:
                yield each.parameters
