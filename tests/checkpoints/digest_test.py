"""Checksums: what they see, and what they must not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxmerge.checkpoints import digest
from jaxmerge.checkpoints.digest import LeafDigest, check_digests, digests, fingerprint
from jaxmerge.checkpoints.source import Source
from jaxmerge.errors import JaxmergeError
from jaxmerge.sharding import make_mesh

# Even and odd last dimensions: small dtypes share words in the first and not in the second.
SHAPES = [(2, 4), (3, 5), ()]
DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int32", "int8", "bool"]
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def random_values(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Finite values of a dtype: no two neighbours are equal, except for bool."""
    rng = np.random.default_rng(seed)
    if dtype == "bool":
        return rng.integers(2, size=shape).astype(bool)
    if dtype.startswith("int"):
        return rng.integers(-100, 100, size=shape).astype(dtype)
    return np.asarray(rng.normal(size=shape), jnp.dtype(dtype))


def as_bytes(values: np.ndarray) -> np.ndarray:
    """The bytes of an array, as `[values, bytes per value]`."""
    return np.frombuffer(values.tobytes(), np.uint8).reshape(values.size, -1).copy()


def checksums_of(arrays: list[np.ndarray]) -> list[str]:
    """The checksum of each array, as if all were leaves of one tree."""
    found = digests({f"{i:04}": jnp.asarray(array) for i, array in enumerate(arrays)})
    return [found[name].checksum for name in sorted(found)]


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_single_bit_counts(dtype, shape):
    """Flipping any one bit gives another checksum, and another for every bit."""
    values = random_values(dtype, shape)
    raw = as_bytes(values)
    flipped = []
    # A bool is a byte of which only the values 0 and 1 exist.
    bits = 1 if dtype == "bool" else 8
    for index in np.ndindex(raw.shape):
        for bit in range(bits):
            changed = raw.copy()
            changed[index] ^= 1 << bit
            flipped.append(np.frombuffer(changed.tobytes(), values.dtype).reshape(shape))
    found = checksums_of([values, *flipped])
    assert len(found) == 1 + raw.size * bits
    assert len(set(found)) == len(found)


@each_dtype
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_every_swap_counts(dtype, shape):
    """Exchanging any two different values gives another checksum: the place is part of it."""
    values = random_values(dtype, shape)
    swapped = []
    flat = values.reshape(-1)
    for i in range(flat.size):
        for j in range(i):
            if flat[i].tobytes() != flat[j].tobytes():
                order = np.arange(flat.size)
                order[[i, j]] = j, i
                swapped.append(flat[order].reshape(shape))
    assert swapped
    assert checksums_of([values])[0] not in checksums_of(swapped)


def test_transposed_values_count():
    """A matrix and its transpose have different checksums, square or not, as do row and column."""
    square = random_values("float32", (4, 4))
    row = random_values("float32", (1, 6))
    assert len(set(checksums_of([square, square.T, row, row.T]))) == 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "bool"])
@pytest.mark.parametrize(
    ("sizes", "spec"),
    [
        ({"fsdp": 8}, (None, "fsdp")),  # a column a shard: two small values of a word are parted
        ({"fsdp": 2, "tensor": 4}, ("fsdp", "tensor")),
        ({"pop": 2, "fsdp": 2, "tensor": 2}, ("tensor", "fsdp")),
    ],
    ids=str,
)
def test_sharding_does_not_count(dtype, sizes, spec):
    """The same bits, whole or in shards along either axis or both."""
    values = jnp.asarray(random_values(dtype, (8, 8)))
    placed = jax.device_put(values, NamedSharding(make_mesh(**sizes), PartitionSpec(*spec)))
    assert not placed.sharding.is_fully_replicated
    assert digests([placed]) == digests([values])


def test_known_checksums():
    """These stand in checkpoints that people have: change them only with a new format name."""
    tree = {
        "float32": jnp.arange(6, dtype=jnp.float32).reshape(2, 3),
        "bfloat16": jnp.arange(6, dtype=jnp.bfloat16).reshape(3, 2),
        "bool": jnp.array([True, False]),
    }
    assert {name: digest.checksum for name, digest in digests(tree).items()} == {
        "bfloat16": "01038dc92e3bdd0b",
        "bool": "e001efbe1532d3c2",
        "float32": "90a68c949188b1b6",
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e5m2"])
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_one_value_that_is_not_finite_is_found(dtype, sharded):
    """Wherever it stands; the largest finite value and a subnormal one are finite."""
    info = jnp.finfo(dtype)
    values = np.asarray([info.max, -info.max, info.smallest_subnormal, 0, 1, -1, 2, 3], info.dtype)
    placement = NamedSharding(make_mesh(fsdp=8), PartitionSpec("fsdp" if sharded else None))

    def finite(array: np.ndarray) -> bool:
        (found,) = digests([jax.device_put(jnp.asarray(array), placement)]).values()
        return found.finite

    assert finite(values)
    for index in (0, 3, 7):
        for bad in (np.nan, np.inf, -np.inf):
            changed = values.copy()
            changed[index] = bad
            assert not finite(changed)


def test_integers_are_finite():
    """So is a leaf without values."""
    tree = [jnp.array([2**31 - 1]), jnp.array([True]), jnp.zeros((0, 3))]
    assert all(found.finite for found in digests(tree).values())


def test_fingerprint_depends_on_names_shapes_dtypes_and_values():
    """And on nothing else: not on the order of the keys, nor on sharding."""

    def of(tree):
        return fingerprint(tree, digests(tree))

    x, y = jnp.arange(8.0), jnp.ones(3)
    first = of({"a": x, "b": {"c": y}})
    placed = jax.device_put(x, NamedSharding(make_mesh(fsdp=8), PartitionSpec("fsdp")))
    assert of({"b": {"c": y}, "a": placed}) == first
    assert len(first) == 16
    zeros = jnp.zeros(4)
    others = [
        {"a": x, "b": {"d": y}},
        {"a": y, "b": {"c": x}},
        {"a": x},
        {"a": x.at[3].set(-3.0), "b": {"c": y}},
        {"a": x.reshape(2, 4), "b": {"c": y}},
        {"a": x.view(jnp.int32), "b": {"c": y}},
        {"x": zeros},
        {"x": zeros.reshape(4, 1)},
        {"x": zeros.astype(jnp.int32)},
        {"x": zeros.astype(jnp.bfloat16)},
    ]
    assert len({first, *map(of, others)}) == 1 + len(others)


def test_every_damaged_leaf_is_named():
    """With the directory; leaves without a known checksum are not judged."""
    known = {"a": "0" * 16, "b": "1" * 16, "c": "2" * 16}
    source = Source("model", "/pool/model", "orbax", {}, "", {}, known)
    found = {name: LeafDigest("1" * 16, True) for name in ("a", "b", "c", "unknown")}
    with pytest.raises(JaxmergeError, match="leaf a, c") as caught:
        check_digests(source, found)
    assert caught.value.where == "/pool/model"
    check_digests(source, {name: LeafDigest(checksum, True) for name, checksum in known.items()})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("shape", [(30, 7, 64), (5, 333), (1000,), (77, 13), ()])
def test_a_leaf_in_blocks_has_the_same_digest(shape, dtype):
    """Wherever it is cut: within rows, between them, or across several."""
    rng = np.random.default_rng(0)
    leaf = np.asarray(10 * rng.normal(size=shape)).astype(dtype)
    per_word = digest.values_per_word(shape, leaf.dtype)
    words = digest.words(leaf.reshape(-1), per_word)
    lanes, first = np.zeros(2, np.uint32), 0
    while first < words.size:
        count = min(int(rng.integers(1, 900)), words.size - first)
        block, positions = np.zeros((1, 900), np.uint32), np.zeros(900, np.uint32)
        block[0, :count] = words[first : first + count]
        digest.positions(shape, leaf.dtype, first, positions[:count])
        sums = digest.block_sums(jnp.asarray(block), jnp.asarray(positions), leaf.dtype)
        lanes += np.asarray(sums)[0, :2]
        first += count
    assert digest.checksum(lanes) == digest.digests({"x": leaf})["x"].checksum
