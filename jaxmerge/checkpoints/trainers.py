"""Checkpoints of JAX trainers as those of the package's decoder, and merges written as theirs.

A layout is recognised by its tree: every leaf of the checkpoint has its place in the table of the
layout, with its shape, and every place its leaf. Sizes and family come from a Hugging Face config.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array

from jaxmerge.checkpoints import gemma, levanter, maxtext, npz, orbax, tunix, zarr
from jaxmerge.checkpoints.leaves import Keep, as_read
from jaxmerge.checkpoints.source import Source
from jaxmerge.checkpoints.tables import AXES, Known, Leaf, Table, from_decoder, to_decoder
from jaxmerge.errors import JaxmergeError, check_choice
from jaxmerge.models.architecture import DecoderConfig
from jaxmerge.trees import PyTree, map_named, named_leaves, pruned

# What reads checkpoints whose leaves are merged by name, and may be of a trainer; by format.
STORED: dict[str, Any] = {"orbax": orbax, "npz": npz, "zarr": zarr}
_VALUE = "/value"  # how leaves of Flax NNX end
ROPE_TYPES = ("", "default", "llama3.1")


class Form(NamedTuple):
    """How a layout is written.

    Attributes:
        item: of the step that the tree is in; "": there is none.
        subtree: what is above the leaves.
        below: what is below each.
        custom: metadata that the trainer looks for.
        storage: of `STORED`.
    """

    item: str = ""
    subtree: str = ""
    below: str = ""
    custom: Mapping[str, Any] = {}
    storage: str = "orbax"


# By the name in `export.formats`.
FORMS = {
    "maxtext": Form("items", "params/params", custom={"scan_layers": True}),
    "maxtext_unscanned": Form("items", "params/params", custom={"scan_layers": False}),
    "gemma": Form(),
    "tunix": Form("model_params", below="value"),
    "levanter": Form(subtree="model", custom=levanter.CUSTOM, storage="zarr"),
}


class View(NamedTuple):
    """A checkpoint of a trainer, and what its leaves are."""

    stored: Source
    table: Mapping[str, Leaf]  # by the name of the leaf in `stored`
    known: Known


def known(directory: str) -> Known | None:
    """Family and sizes of the model of a Hugging Face directory; None: there is no decoder for it.

    Raises:
        JaxmergeError: its config can't be read, or has what the decoder does not heed.
    """
    from jaxmerge.models import families  # imports Flax, which takes half a second

    directory = os.path.expanduser(directory)
    if not directory or not os.path.exists(os.path.join(directory, "config.json")):
        return None
    found = families.read(directory)
    return Known(families.model_type(directory), found.config) if found else None


def as_decoder(source: Source, directory: str, rope_type: str = "") -> Source:
    """The checkpoint as one of the decoder, if it is of a trainer that is known; else as it is.

    Args:
        source: of a format in `STORED`.
        directory: Hugging Face directory of the same model; its config is enough.
        rope_type: see `config.pool.rope_type`.

    Raises:
        JaxmergeError: it is nearly of a known layout: then every difference is listed; or it could
            be of two that mean different things.
    """
    model = None if source.architecture else known(directory)
    if model is None:
        return source
    found = named_leaves(source.abstract)
    if found.keys() == abstract(model).keys():
        return source  # of the decoder itself
    tables = _tables(model, rope_type)
    fitting, nearest = [], (0.0, "", [""])
    for layout, of_layout in tables.items():
        leaves = of_layout(model)
        if leaves is None:
            continue
        names = _placed(found, leaves)
        share = len(names.keys() & found.keys()) / max(len(found), 1)
        problems = _problems(found, names, model)
        if not problems:
            fitting.append((layout, names))
        elif share > nearest[0]:
            nearest = (share, layout, problems)
    if not fitting and nearest[0] < 0.5:
        return source
    if not fitting:
        raise JaxmergeError(
            f"the checkpoint is not what {nearest[1]} writes of the model of {directory}:\n  "
            + "\n  ".join(nearest[2][:20]),
            where=source.path,
            expected="a checkpoint of that model; or pool.model, your own; "
            f'or a merge by name: export.formats = ("{source.format}",)',
        )
    layout, names = fitting[0]
    if len(fitting) > 1 and any(dict(other) != dict(names) for _, other in fitting[1:]):
        raise JaxmergeError(
            "the checkpoint fits several layouts, and its names and shapes do not say which",
            where=source.path,
            expected=f'a merge by name: export.formats = ("{source.format}",)',
            found=", ".join(name for name, _ in fitting),
        )
    _check_rope(model, layout, rope_type, source.path)
    return _viewed(source, layout.split("_")[0], View(source, names, model), directory)


def restore(source: Source, abstract: PyTree, keep: Keep = as_read) -> PyTree:
    """Reads the decoder's leaves, one after the other, out of the trainer's.

    Args:
        source: from `as_decoder`.
        abstract: `ShapeDtypeStruct` with shardings; leaves that it leaves out are not read.
        keep: called with the name of each leaf and the leaf, which what it returns replaces.

    Raises:
        JaxmergeError: data are missing or cut short.
    """
    view: View = source.view
    return map_named(lambda name, leaf: keep(name, _restored(view, name, leaf)), abstract)


def write(
    path: str | os.PathLike[str],
    layout: str,
    directory: str,
    leaf: Callable[[str], Array],
    *,
    rope_type: str = "",
) -> None:
    """Writes leaves of the decoder as a checkpoint of a trainer.

    Args:
        path: the directory to make.
        layout: of `FORMS`.
        directory: Hugging Face directory of the model.
        leaf: the decoder's leaf of a name.
        rope_type: see `config.pool.rope_type`.

    Raises:
        JaxmergeError: see `check`.
    """
    model, form = check(layout, directory, rope_type), FORMS[layout]
    leaves = table(model, layout, rope_type)
    assert leaves is not None
    tree: dict[str, Any] = {}
    at_hand: dict[str, Array] = {}
    for name in sorted(leaves, key=lambda name: leaves[name].of):  # no leaf is merged twice
        of = leaves[name].of
        if set(of) != set(at_hand):
            at_hand = {each: leaf(each) for each in of}
        _put(
            tree,
            [*name.split("/"), *filter(None, [form.below])],
            from_decoder(at_hand, leaves[name], model.config),
        )
    where = {"subtree": form.subtree, "item": form.item, "custom": form.custom}
    like = Source("", "", form.storage, {}, architecture={}, checksums={}, **where)
    if form.storage == "orbax":
        return orbax.save(path, tree, like=like)
    return STORED[form.storage].save(path, tree, named_leaves(tree).__getitem__, like)


def check(layout: str, directory: str, rope_type: str = "") -> Known:
    """The model of a directory, if a layout has it.

    Raises:
        JaxmergeError: there is no such model, or the trainer has none such.
    """
    model = known(directory)
    if model is None or table(model, layout, rope_type) is None:
        raise JaxmergeError(
            f"{layout} has no models of this kind, as far as is known here",
            where="export.formats",
            expected="a Hugging Face member, or pool.base, of a family that docs/trainers.md lists",
            found=f"model_type {model.model_type}" if model else f"no known model in {directory!r}",
        )
    _check_rope(model, layout, rope_type, "export.formats")
    return model


def table(model: Known, layout: str, rope_type: str = "") -> dict[str, Leaf] | None:
    """The leaves of a model in a layout; None: the trainer has no such models."""
    return _tables(model, rope_type)[layout](model)


def _tables(model: Known, rope_type: str) -> dict[str, Table]:
    check_choice("pool.rope_type", rope_type, ROPE_TYPES)
    interleaved = model.model_type == "llama" and (
        rope_type == "llama3.1" or (not rope_type and _scaled(model))
    )
    others = {**gemma.tables(), **tunix.tables(), **levanter.tables()}
    return {**maxtext.tables(interleaved), **others}


def _scaled(model: Known) -> bool:
    """Whether the rope is scaled as that of Llama 3.1, which MaxText's `llama3.1` alone can do."""
    ropes = [kind.rope for kind in model.config.attention if kind.rope]
    return any(rope.scaling == "llama3" for rope in ropes)


def _check_rope(model: Known, layout: str, rope_type: str, where: str) -> None:
    if not layout.startswith("maxtext") or model.model_type != "llama" or rope_type:
        return
    if not _scaled(model):
        raise JaxmergeError(
            "MaxText stores the heads of Llama models in two orders, and nothing in a checkpoint "
            "says in which",
            where=where,
            expected='pool.rope_type: "default" or "llama3.1", the rope_type of MaxText\'s config '
            '(a model_name that begins with llama3.1 means "llama3.1")',
        )


@functools.lru_cache(maxsize=8)  # the members of a pool share it; it takes a part of a second
def abstract(model: Known) -> Mapping[str, jax.ShapeDtypeStruct]:
    """The decoder's leaves by name."""
    from jaxmerge.models.decoder import decoder

    init = decoder(model.config).init
    assert init is not None
    return named_leaves(jax.eval_shape(init, jax.random.key(0)))


def _placed(found: Mapping[str, Any], table: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """A layout's leaves by the names that they would have among these: what is above, and below."""
    below = _VALUE if found and all(name.endswith(_VALUE) for name in found) else ""
    first = next(iter(table)) + below
    above = [name[: -len(first)] for name in found if f"/{name}".endswith(f"/{first}")]
    prefix = above[0] if len(above) == 1 else ""
    return {prefix + name + below: leaf for name, leaf in table.items()}


def _problems(
    found: Mapping[str, jax.ShapeDtypeStruct], names: Mapping[str, Leaf], model: Known
) -> list[str]:
    """Why a checkpoint is not of a layout; empty if it is."""

    def fits(name: str) -> bool:
        wanted, shape = names[name].shape(model.config), found[name].shape
        padded = "V" in names[name].axes  # rows of an embedding that no token has
        return len(wanted) == len(shape) and all(
            size == other or (padded and letter == "V" and other > size)
            for letter, size, other in zip(names[name].axes, wanted, shape)
        )

    return (
        [f"no leaf {name}" for name in names if name not in found]
        + [f"leaf {name} is not known" for name in found if name not in names]
        + [
            f"leaf {name} is {list(found[name].shape)}, by the config "
            f"{list(leaf.shape(model.config))}"
            for name, leaf in names.items()
            if name in found and not fits(name)
        ]
    )


def _viewed(source: Source, layout: str, view: View, directory: str) -> Source:
    """The checkpoint with the decoder's leaves for its own."""
    stored = named_leaves(source.abstract)
    tree: dict[str, Any] = {}
    for name, leaf in abstract(view.known).items():
        dtypes = [stored[each].dtype for each, part in view.table.items() if name in part.of]
        wide = functools.reduce(jnp.promote_types, dtypes)
        _put(tree, name.split("/"), jax.ShapeDtypeStruct(leaf.shape, wide))
    return source._replace(
        format=layout,
        abstract=tree,
        architecture={"model": "decoder", **view.known.config.plain()},
        checksums={},
        carried={},
        directory=directory,
        view=view,
    )


def _restored(view: View, name: str, leaf: jax.ShapeDtypeStruct) -> Array:
    """A leaf of the decoder, out of all that hold a part of it."""
    parts = [(each, part) for each, part in view.table.items() if name in part.of]
    here = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found = named_leaves(view.stored.abstract)
    table = dict(parts)

    def placed(each: str, _: Any) -> jax.ShapeDtypeStruct:
        of = found[each]
        where = _beside(here, name, table[each], of.shape)
        return jax.ShapeDtypeStruct(of.shape, of.dtype, sharding=where)

    wanted = map_named(placed, pruned(view.stored.abstract, table.__contains__))
    stored = named_leaves(STORED[view.stored.format].restore(view.stored, wanted))
    program = _program(tuple(part for _, part in parts), name, view.known.config, here)
    return program([stored[each] for each, _ in parts]).astype(leaf.dtype)


@functools.lru_cache(maxsize=64)  # the members of a pool share them
def _program(
    parts: tuple[Leaf, ...], name: str, config: DecoderConfig, where: Sharding
) -> Callable[[list[Array]], Array]:
    """The compiled making of a decoder's leaf out of the trainer's."""

    def made(stored: list[Array]) -> Array:
        pieces = [to_decoder(one, part, name, config) for one, part in zip(stored, parts)]
        order = [layer for part in parts for layer in part.layers]
        if not order:
            return pieces[0]
        values = jnp.concatenate(pieces)
        in_order = order == sorted(order)
        return values if in_order else values[jnp.argsort(jnp.array(order))]

    return jax.jit(made, out_shardings=where)


def _beside(where: Sharding, name: str, part: Leaf, shape: tuple[int, ...]) -> Sharding:
    """Where a trainer's leaf lies, so that little of it moves on its way to the decoder's."""
    if not isinstance(where, NamedSharding):
        return where
    letters = ("L" if part.layers else "") + AXES[name]
    over = dict(zip(letters, tuple(where.spec)))
    spec = PartitionSpec(*(() if part.flat else (over.get(letter) for letter in part.axes)))
    beside = NamedSharding(where.mesh, spec)
    try:
        beside.shard_shape(shape)
    except ValueError:  # an axis that is padded is not divided evenly
        return NamedSharding(where.mesh, PartitionSpec())
    return beside


def _put(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
