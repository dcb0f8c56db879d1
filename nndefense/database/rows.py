"""Rows on disk: shards of contiguous HDF5 arrays, mapped into memory so that only the rows asked for are touched."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from nndefense.errors import DatabaseError

Array = NDArray[Any]
COLUMNS = ("features", "posteriors", "cbw_e", "cbw_d", "ids", "labels")


def write_shard(path: Path, columns: Mapping[str, Array]) -> None:
    """Write the columns of M rows, each as one contiguous uncompressed array, which a reader can map.

    Raises:
        OSError: the file cannot be written, as on a full disk.
    """
    # By way of memory: where the disk is full, HDF5 itself can crash the whole process when it closes the file.
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for name in COLUMNS:
            file.create_dataset(name, data=columns[name])
    path.write_bytes(buffer.getbuffer())


class Rows:
    """The rows of all shards as one table.

    Columns: ``features`` n x d float32, ``posteriors`` n x C, ``cbw_e`` and ``cbw_d`` n float32, ``ids`` n bytes
    (UTF-8), ``labels`` n int64 with -1 for unknown.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """Map the shards.

        Raises:
            DatabaseError: a shard that is missing, truncated or not of this form.
        """
        self._columns: dict[str, list[Array]] = {name: [] for name in COLUMNS}
        for path in paths:
            for name, column in _map_shard(path).items():
                self._columns[name].append(column)
        sizes = [len(column) for column in self._columns["labels"]]
        self.starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def nbytes(self) -> int:
        """The size of all columns."""
        return sum(part.nbytes for parts in self._columns.values() for part in parts)

    def hold(self) -> None:
        """Copy everything into memory: from then on nothing that happens to the files changes what is read."""
        for name, parts in self._columns.items():
            self._columns[name] = [np.array(part) for part in parts]

    def take(self, name: str, rows: Array) -> Array:
        """Read one column at the given row numbers, of any shape: ``rows.shape`` + the column's own."""
        flat = np.asarray(rows, dtype=np.int64).ravel()
        parts = self._columns[name]
        if len(parts) == 1:
            taken = parts[0][flat]
        else:
            shard = np.searchsorted(self.starts, flat, side="right") - 1
            dtype = np.result_type(*parts)
            taken = np.empty((len(flat), *parts[0].shape[1:]), dtype=dtype)
            for number in np.unique(shard):
                here = shard == number
                taken[here] = parts[number][flat[here] - self.starts[number]]
        return np.asarray(taken).reshape((*np.shape(rows), *parts[0].shape[1:]))

    def slice(self, name: str, first: int, last: int) -> Array:
        """Read one column from row ``first`` up to, but without, row ``last``."""
        pieces = [
            part[max(first - start, 0) : max(last - start, 0)]
            for part, start in zip(self._columns[name], self.starts[:-1], strict=True)
        ]
        pieces = [piece for piece in pieces if len(piece)]
        return np.concatenate(pieces) if pieces else self._columns[name][0][:0]

    def pieces(self, name: str, size: int = 1 << 16) -> Iterator[Array]:
        """Read one column in row order, at most ``size`` rows at a time."""
        for first in range(0, len(self), size):
            yield self.slice(name, first, min(first + size, len(self)))


def _map_shard(path: Path) -> dict[str, Array]:
    try:
        with h5py.File(path, "r") as file:
            return {name: _map_column(path, file[name]) for name in COLUMNS}
    except FileNotFoundError as error:
        raise DatabaseError(f"{path} is missing: restore it or build the database again") from error
    except (OSError, KeyError, ValueError) as error:
        raise DatabaseError(f"{path} is truncated or damaged: restore it or build the database again") from error


def _map_column(path: Path, dataset: Any) -> Array:
    offset = dataset.id.get_offset()
    if offset is None or dataset.size == 0:
        # Not contiguous (a shard repacked by other tools), or empty: read it.
        return np.asarray(dataset[()])
    return np.memmap(path, mode="r", dtype=dataset.dtype, shape=dataset.shape, offset=offset)
