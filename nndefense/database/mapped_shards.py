"""The shards of a database, mapped into memory: all of them where the system allows so many, else those read last.

A map costs the process a file descriptor and one of the system's maps, of which it has 1,024 and 65,530 as a rule. Of a
database with more shards than a fair share of that, only where each column begins is kept: then a shard is mapped again
without being looked at.
"""

from __future__ import annotations

import math
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nndefense.errors import DatabaseError, DataError
from nndefense.files import HDF5_ERRORS, held_array, not_read, open_hdf5

try:
    import resource
except ImportError:  # pragma: no cover  # not a Unix: there is no such limit there
    resource = None  # type: ignore[assignment]

Array = NDArray[Any]
COLUMNS = ("features", "posteriors", "cbw_e", "cbw_d", "ids", "labels")
TOP = ("top_classes", "top_values")
DIGEST = "digest"
"""Column of 16 bytes a row: of an image's pixels. Shards made from features that somebody else computed have none."""
MOST_MAPPED = 4096
"""Shards that are mapped at once where the system's limit is generous."""


@dataclass(frozen=True)
class _Layout:
    """Where each column of a shard begins, its kind and its shape, and the number of classes (0: all are stored)."""

    columns: tuple[tuple[str, int, np.dtype[Any], tuple[int, ...]], ...]
    classes: int


class MappedShards:
    """The columns of each shard, by its number.

    A shard that is mapped again must be the file that was there at first: another one in its place, as of a database
    that was built anew in the folder, is refused.

    Attributes:
        sizes: how many rows each shard holds.
        classes: the number of classes where only the largest posteriors are stored, else 0.
    """

    def __init__(self, paths: Sequence[Path], sizes: Sequence[int] | None = None) -> None:
        """Map the shards, or as many as there is room for.

        Args:
            paths: in row order.
            sizes: how many rows each holds, where that is known; else every shard is looked at.

        Raises:
            DatabaseError: a shard that is missing, truncated or not of this form, or that the system does not read.
        """
        self._paths, self._room = list(paths), room_for_shards()
        self._lock = threading.Lock()
        self._mapped: OrderedDict[int, dict[str, Array]] = OrderedDict()
        self._layouts: dict[int, _Layout] = {}
        self._known: dict[_Layout, _Layout] = {}
        self._files = [_identity(path) for path in self._paths]
        self.sizes, self.classes = list(sizes or ()), 0
        looked_at = range(len(self._paths) if sizes is None or len(self._paths) <= self._room else 1)
        for number in looked_at:
            rows = len(self[number]["labels"])
            if sizes is None:
                self.sizes.append(rows)

    def __len__(self) -> int:
        return len(self._paths)

    def __deepcopy__(self, memo: object) -> MappedShards:
        """Itself: nothing but files that never change is read through it."""
        return self

    def __getitem__(self, number: int) -> dict[str, Array]:
        """The columns of a shard; they can be read for as long as somebody holds them.

        Raises:
            DatabaseError: as at first, or where another file has come into the shard's place.
        """
        with self._lock:
            if number not in self._mapped:
                self._mapped[number] = self._map(number)
                if len(self._mapped) > self._room:
                    self._mapped.popitem(last=False)
            self._mapped.move_to_end(number)
            return self._mapped[number]

    @property
    def nbytes(self) -> int:
        """The size of all files."""
        return sum(size for _, _, size, _ in self._files)

    def hold(self) -> None:
        """Copy everything into memory: from then on nothing that happens to the files changes what is read."""
        self._room = len(self)
        for number in range(len(self)):
            self._mapped[number] = {name: np.array(part) for name, part in self[number].items()}

    def _map(self, number: int) -> dict[str, Array]:
        path, layout = self._paths[number], self._layouts.get(number)
        if layout is not None:
            with reading(path):
                columns = _mapped(path, layout)
        else:
            columns, layout = _looked_at(path)
            if number == 0:
                self.classes = layout.classes
            if layout.classes != self.classes or not {"features", "ids"} <= set(columns):
                raise DatabaseError(f"the shards beside {self._paths[0]} are not of one kind: build the database again")
            if len(layout.columns) == len(columns):
                # Most shards are laid out alike, and share one record of it.
                self._layouts[number] = self._known.setdefault(layout, layout)
        if _identity(path) != self._files[number]:
            raise DatabaseError(f"{path} is another file than the one that was opened: open the database again")
        if number < len(self.sizes) and len(columns["labels"]) != self.sizes[number]:
            raise DatabaseError(
                f"{path} holds {len(columns['labels']):,} rows, but its manifest says {self.sizes[number]:,}: restore "
                "it or build the database again"
            )
        return columns


def room_for_shards() -> int:
    """How many shards a database may have mapped: a quarter of the files that the process may open."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if resource is not None else 512
    return MOST_MAPPED if limit < 0 else max(8, min(limit // 4, MOST_MAPPED))


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Tell in one line what is wrong with a shard, or with what the system allows."""
    try:
        yield
    except FileNotFoundError as error:
        raise DatabaseError(f"{path} is missing: restore it or build the database again") from error
    except DataError as error:
        raise DatabaseError(str(error)) from error
    except HDF5_ERRORS as error:
        told = not_read(path, error) or f"{path} is truncated or damaged: restore it or build the database again"
        raise DatabaseError(told) from error


def _identity(path: Path) -> tuple[int, int, int, int]:
    with reading(path):
        found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _looked_at(path: Path) -> tuple[dict[str, Array], _Layout]:
    """The columns of a shard, and where those begin that can be mapped."""
    with reading(path), open_hdf5(path) as file:
        classes = int(file.attrs["classes"]) if "posteriors" not in file else 0
        names = [*(name for name in COLUMNS if name != "posteriors"), *(TOP if classes else ("posteriors",))]
        names += [DIGEST] if DIGEST in file else []
        found = {name: held_array(file, name, path) for name in names}
        # Not contiguous (a shard repacked by other tools), or empty: it is read.
        offsets = {name: column.id.get_offset() for name, column in found.items() if column.size}
        layout = _Layout(
            tuple(
                (name, int(offset), found[name].dtype, found[name].shape)
                for name, offset in offsets.items()
                if offset is not None
            ),
            classes,
        )
        mapped = _mapped(path, layout)
        return {name: mapped[name] if name in mapped else np.asarray(found[name][()]) for name in names}, layout


def _mapped(path: Path, layout: _Layout) -> dict[str, Array]:
    # One map for all columns.
    whole = np.memmap(path, mode="r", dtype=np.uint8)
    return {
        name: whole[offset : offset + kind.itemsize * math.prod(shape)].view(kind).reshape(shape)
        for name, offset, kind, shape in layout.columns
    }
