"""Rows of embeddings in the order of a vocabulary that several models have in common.

All other tensors are read as they are. Rows are moved as they are read, so what is held is what a
pool of one vocabulary would hold, wherever it lives.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from jaxmerge.checkpoints import directory
from jaxmerge.checkpoints.leaves import Values
from jaxmerge.checkpoints.safetensors import Tensor, read_into
from jaxmerge.checkpoints.source import Source
from jaxmerge.checkpoints.vocabulary import Taken, Vocabulary
from jaxmerge.models.layout import Layout


class Rows:
    """Where a member's rows come from.

    Args:
        vocabulary: the common one.
        at: number of the member.
        values: of each member, in its own rows; called when they are needed.
        beside: where the tensors of a base lie that is no member.

    Attributes:
        count: of the rows.
        missing: tokens that the member has no row for.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        at: int,
        values: Sequence[Callable[[], Values]],
        beside: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        self.count, self._at, self._open = vocabulary.rows, at, values
        self.beside = beside
        self._opened: dict[int, Values] = {}
        # For each row the member and the row that it is; member -1: a mean, see `_taken`.
        self._row = np.array(vocabulary.own[at])
        self._member = np.full(self.count, at)
        self._taken: dict[int, Taken] = {}
        for index in np.flatnonzero(self._row < 0).tolist():
            taken = vocabulary.taken[index]
            if len(taken) == 1:
                ((self._member[index], self._row[index]),) = taken
            else:
                self._member[index] = -1
                self._taken[index] = taken
        of_token = np.array(sorted(vocabulary.ids.values()))
        self.missing = int((np.asarray(vocabulary.own[at])[of_token] < 0).sum())

    def values(self, own: Values, shapes: Mapping[str, tuple[int, ...]]) -> Values:
        """Reads the member's tensors in the rows of the common vocabulary.

        Args:
            own: reads them in its own rows.
            shapes: of its tensors.
        """
        widths = {name: math.prod(shape[1:]) for name, shape in shapes.items() if has_rows(name)}

        def read(name: str, first: int, out: np.ndarray) -> None:
            if name not in widths:
                return own(name, first, out)
            return self._fill(own, name, widths[name], first, out)

        return read

    def _fill(self, own: Values, name: str, width: int, first: int, out: np.ndarray) -> None:
        last = first + out.size
        for start, stop in self._runs(first // width, -(-last // width)):
            begin, end = max(start * width, first), min(stop * width, last)
            within, place = begin - start * width, out[begin - first : end - first]
            member = int(self._member[start])
            if member < 0:
                place[:] = self._mean(own, name, width, start)[within : within + place.size]
                continue
            self._values(own, member)(name, int(self._row[start]) * width + within, place)

    def _runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Rows that follow each other in one member; a mean is by itself."""
        member, row = self._member[start:stop], self._row[start:stop]
        joined = (member[1:] == member[:-1]) & (row[1:] == row[:-1] + 1) & (member[1:] >= 0)
        ends = [0, *(np.flatnonzero(~joined) + 1).tolist(), stop - start]
        for i, j in itertools.pairwise(ends):
            yield start + i, start + j

    def _mean(self, own: Values, name: str, width: int, index: int) -> np.ndarray:
        found = np.empty((len(self._taken[index]), width), np.float32)
        for (member, row), place in zip(self._taken[index], found):
            self._values(own, member)(name, row * width, place)
        return found.mean(axis=0) if len(found) else np.zeros(width, np.float32)

    def _values(self, own: Values, member: int) -> Values:
        if member == self._at:
            return own
        if member not in self._opened:  # two threads that open it at once do no harm
            self._opened[member] = self._open[member]()
        return self._opened[member]


def values_of(source: Source, read: Callable[[str, int, np.ndarray], None] = read_into) -> Values:
    """Reads the tensors of a Hugging Face directory, in the rows that its source says.

    Args:
        source: from `survey.find`.
        read: reads bytes, see `safetensors.read_into`.
    """
    values = functools.partial(directory.read_values, source.tensors, read=read)
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    return source.rows.values(values, shapes) if source.rows else values


def has_rows(tensor: str) -> bool:
    """Whether a tensor has a row for each token, by its name."""
    return bool(directory.EMBEDDING.search(tensor) or directory.HEAD.search(tensor))


def resized(layout: Layout, rows: int) -> Layout:
    """A layout whose embeddings have another number of rows."""
    if not rows:
        return layout
    tensors = {
        name: (rows, *shape[1:]) if has_rows(name) else shape
        for name, shape in layout.tensors.items()
    }
    leaves, shapes = dict(layout.leaves), dict(layout.shapes)
    for name, parts in layout.leaves.items():
        if len(parts) == 1 and has_rows(parts[0].tensor):
            leaves[name] = (parts[0]._replace(stop=rows),)
            shapes[name] = (rows, *shapes[name][1:])
    return layout._replace(leaves=leaves, shapes=shapes, tensors=tensors)
