"""Sequences of item ids that stay small with millions of items: made, unpacked or read only when asked for."""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

_BLOCK = 8192

RowNumbers = NDArray[np.int64]
"""n numbers of rows, int64."""


class Ids(Sequence[str]):
    """A read-only sequence of strings that can give many of its items at once.

    Equal to any other sequence with the same strings, so ``dataset.ids == ["a", "b"]`` works.
    """

    _count: int

    def __len__(self) -> int:
        return self._count

    @abstractmethod
    def take(self, rows: RowNumbers) -> list[str]:
        """Return the ids at ``rows`` (each in 0..len-1), in that order."""

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return self.take(np.arange(*index.indices(len(self)), dtype=np.int64))
        row = int(index)
        if row < 0:
            row += len(self)
        if not 0 <= row < len(self):
            raise IndexError(f"no item {index} among {len(self)}")
        return self.take(np.array([row], dtype=np.int64))[0]

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _BLOCK):
            yield from self.take(np.arange(start, min(start + _BLOCK, len(self)), dtype=np.int64))

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if isinstance(other, str) or not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(mine == its for mine, its in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = ", ".join(repr(item) for item in self[:3])
        return f"<{len(self)} ids: {shown}{', ...' if len(self) > 3 else ''}>"


class NumberedIds(Ids):
    """``prefix/00000``, ``prefix/00001``, ... (at least five digits, so that text order is number order)."""

    def __init__(self, prefix: str, count: int) -> None:
        self._prefix, self._count = prefix, count

    def take(self, rows: RowNumbers) -> list[str]:
        return [f"{self._prefix}/{row:05d}" for row in rows.tolist()]


class PackedIds(Ids):
    """Given strings, held as one block of bytes.

    Millions of separate ``str`` objects would take several times the memory, and in forked loader processes their
    reference counts would make the operating system copy them all.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        ends = array("q", [0])
        packed = bytearray()
        for string in strings:
            # File names need not be valid UTF-8; surrogateescape carries their bytes through unchanged.
            packed += string.encode("utf-8", "surrogateescape")
            ends.append(len(packed))
        self._ends = np.frombuffer(ends, dtype=np.int64)
        self._bytes = bytes(packed)
        self._count = len(ends) - 1

    def take(self, rows: RowNumbers) -> list[str]:
        bounds = zip(self._ends[rows].tolist(), self._ends[rows + 1].tolist(), strict=True)
        return [self._bytes[start:end].decode("utf-8", "surrogateescape") for start, end in bounds]


class PickedIds(Ids):
    """Some of another sequence's ids."""

    def __init__(self, ids: Ids, rows: RowNumbers) -> None:
        self._ids, self._rows, self._count = ids, rows, len(rows)

    def take(self, rows: RowNumbers) -> list[str]:
        return self._ids.take(self._rows[rows])


class JoinedIds(Ids):
    """The ids of several sequences, one after another."""

    def __init__(self, parts: Sequence[Ids]) -> None:
        self._parts = tuple(parts)
        self._starts = np.cumsum([0, *map(len, self._parts)], dtype=np.int64)
        self._count = int(self._starts[-1])

    def take(self, rows: RowNumbers) -> list[str]:
        taken = [""] * len(rows)
        owners = np.searchsorted(self._starts, rows, side="right") - 1
        for owner in np.unique(owners).tolist():
            places = np.flatnonzero(owners == owner)
            strings = self._parts[owner].take(rows[places] - self._starts[owner])
            for place, string in zip(places.tolist(), strings, strict=True):
                taken[place] = string
        return taken
