"""Leaf names, and the comparison of trees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge import trees
from jaxmerge.errors import JaxmergeError

TREE = {
    "layers": {"up": np.ones((2, 3), np.float32), "down": jnp.ones((3, 2), jnp.bfloat16)},
    "embedding": jax.ShapeDtypeStruct((4,), jnp.int8),
    "blocks": [np.float32(0), (np.float32(1),)],
}


def test_named_leaves_are_in_tree_order():
    """Names are paths joined by slashes, and values are the leaves themselves."""
    named = trees.named_leaves(TREE)
    assert list(named) == ["blocks/0", "blocks/1/0", "embedding", "layers/down", "layers/up"]
    assert [id(leaf) for leaf in named.values()] == [id(leaf) for leaf in jax.tree.leaves(TREE)]


def test_map_named_passes_the_name_and_the_leaves_of_every_tree():
    """The result has the structure of the first tree."""
    one, two = {"a": [1, 2]}, {"a": [10, 20]}
    mapped = trees.map_named(lambda name, x, y: (name, x + y), one, two)
    assert mapped == {"a": [("a/0", 11), ("a/1", 22)]}


def test_counts():
    """Values and bytes: 6 float32, 6 bfloat16, 4 int8, 2 float32."""
    assert trees.parameter_count(TREE) == 18
    assert trees.byte_count(TREE) == 24 + 12 + 4 + 8


def test_alike_trees_have_no_differences():
    """Arrays and their abstract values are alike."""
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), TREE)
    assert trees.differences({"a": TREE, "b": abstract, "c": TREE}) == []


def test_every_difference_is_listed_at_once():
    """Missing, extra, another shape, another dtype, in two trees."""

    def tree(**leaves: tuple[tuple[int, ...], str]):
        return {
            name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
            for name, (shape, dtype) in leaves.items()
        }

    first = tree(gone=((1,), "float32"), shape=((2, 3), "float32"), dtype=((4,), "float32"))
    second = tree(more=((1,), "float32"), shape=((3, 2), "float32"), dtype=((4,), "bfloat16"))
    third = tree(gone=((1,), "float32"), shape=((2, 3), "float32"), dtype=((), "float32"))
    assert trees.differences({"first": first, "second": second, "third": third}) == [
        "second: no leaf gone",
        "second: leaf more is not in first",
        "second: leaf dtype is bfloat16[4], in first float32[4]",
        "second: leaf shape is float32[3,2], in first float32[2,3]",
        "third: leaf dtype is float32[], in first float32[4]",
    ]


@pytest.mark.parametrize(
    "tree", [{"a/b": 1, "a": {"b": 2}}, {"a": {"b/c": 1}, "a/b": {"c": 2}}], ids=str
)
def test_names_that_are_the_same(tree):
    with pytest.raises(JaxmergeError, match="the same name"):
        trees.named_leaves(tree)
