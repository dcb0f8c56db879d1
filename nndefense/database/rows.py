"""Rows on disk: shards of contiguous HDF5 arrays, mapped into memory so that only the rows asked for are touched.

Features are stored as float32 or float16, and posteriors either whole or as their largest entries: with 1,000 classes
the 20 largest take 120 bytes a row, all of them 4,000. What is left of the probability is read as spread evenly over
the other classes. Whatever is stored, features and posteriors are read as float32, posteriors whole.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from nndefense.database.mapped_shards import DIGEST, TOP, MappedShards, reading
from nndefense.files import held_array, open_hdf5

Array = NDArray[Any]


def write_shard(path: Path, columns: Mapping[str, Array], attributes: Mapping[str, int] | None = None) -> None:
    """Write the columns of M rows, each as one contiguous uncompressed array, which a reader can map.

    Raises:
        OSError: the file cannot be written, as on a full disk.
    """
    # By way of memory: where the disk is full, HDF5 itself can crash the whole process when it closes the file.
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for name, column in columns.items():
            file.create_dataset(name, data=column)
        for name, value in (attributes or {}).items():
            file.attrs[name] = value
    path.write_bytes(buffer.getbuffer())


def read_columns(path: Path) -> tuple[dict[str, Array], dict[str, int]]:
    """All columns and attributes of one shard, as they are stored: what :func:`write_shard` was given.

    Raises:
        DatabaseError: a shard that is missing, truncated or not of this form, or that the system does not read.
    """
    with reading(path), open_hdf5(path) as file:
        return {name: held_array(file, name, path)[()] for name in file}, {
            name: int(value) for name, value in file.attrs.items()
        }


def write_virtual(path: Path, shards: Sequence[Path]) -> None:
    """Write an HDF5 file that shows the rows of all shards as one table: virtual data sets, which hold no rows.

    Args:
        path: where it will be; it finds the shards beside itself, by name.
        shards: in row order, at least one.

    Raises:
        OSError: the file cannot be written.
        DatabaseError: a shard that cannot be read.
    """
    layouts: dict[str, list[tuple[str, tuple[int, ...], np.dtype[Any]]]] = {}
    attributes: dict[str, int] = {}
    for shard in shards:
        with reading(shard), open_hdf5(shard) as file:
            attributes = {name: int(value) for name, value in file.attrs.items()}
            for name in file:
                column = held_array(file, name, shard)
                layouts.setdefault(name, []).append((shard.name, column.shape, column.dtype))
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for name, parts in layouts.items():
            whole = h5py.h5s.create_simple((sum(shape[0] for _, shape, _ in parts), *parts[0][1][1:]))
            # By h5py's lower level: its upper one notes the time, and equal databases would have unequal files.
            layout, first = h5py.h5p.create(h5py.h5p.DATASET_CREATE), 0
            layout.set_obj_track_times(False)
            for shard_name, shape, _ in parts:
                whole.select_hyperslab((first, *(0 for _ in shape[1:])), shape)
                layout.set_virtual(whole, shard_name.encode(), name.encode(), h5py.h5s.create_simple(shape))
                first += shape[0]
            whole.select_all()
            # Ids are as wide as the longest of them in a shard; HDF5 pads them when they are read.
            widest = max((kind for _, _, kind in parts), key=lambda kind: kind.itemsize)
            h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(widest, logical=True), whole, layout)
        for name, value in attributes.items():
            file.attrs[name] = value
    path.write_bytes(buffer.getbuffer())


class StoredRows:
    """The rows of all shards as one table.

    Columns: ``features`` n x d float32, ``posteriors`` n x C float32, ``cbw_e`` and ``cbw_d`` n float32, ``ids`` n
    bytes (UTF-8), ``labels`` n int64 with -1 for unknown; ``digest`` n x 16 uint8 where :attr:`digests`.
    """

    def __init__(self, paths: Sequence[Path], sizes: Sequence[int] | None = None) -> None:
        """Map the shards, or of many those that are read; ``sizes`` are their rows, where they are known.

        Raises:
            DatabaseError: a shard that is missing, truncated or not of this form.
        """
        self._shards = MappedShards(paths, sizes)
        self.starts = np.concatenate([[0], np.cumsum(self._shards.sizes)]).astype(np.int64)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def classes(self) -> int:
        """C, of the posteriors."""
        return self._shards.classes or int(self._shards[0]["posteriors"].shape[-1])

    @property
    def dimension(self) -> int:
        """d, of the features."""
        return int(self._shards[0]["features"].shape[-1])

    @property
    def nbytes(self) -> int:
        """The size of all files."""
        return self._shards.nbytes

    @cached_property
    def digests(self) -> bool:
        """Whether there is a column of digests: whether every shard has one."""
        return all(DIGEST in self._shards[number] for number in range(len(self._shards)))

    def hold(self) -> None:
        """Copy everything into memory: from then on nothing that happens to the files changes what is read."""
        self._shards.hold()

    def take(self, name: str, rows: Array) -> Array:
        """Read one column at the given row numbers, of any shape: ``rows.shape`` + the column's own."""
        if name == "posteriors" and self._shards.classes:
            chosen, values = (self.take(part, rows) for part in TOP)
            return spread_posteriors(chosen, values, self._shards.classes)
        flat = np.asarray(rows, dtype=np.int64).ravel()
        if not len(flat):
            none = self._shards[0][name][:0]
            return _full(name, none).reshape((*np.shape(rows), *none.shape[1:]))
        shard = np.searchsorted(self.starts, flat, side="right") - 1
        order = np.argsort(shard, kind="stable")
        numbers, begins = np.unique(shard[order], return_index=True)
        parts = [
            self._shards[number][name][flat[here] - self.starts[number]]
            for number, here in zip(numbers.tolist(), np.split(order, begins[1:]), strict=True)
        ]
        taken = np.concatenate(parts)
        if len(parts) > 1:
            back = np.empty_like(order)
            back[order] = np.arange(len(order))
            taken = taken[back]
        return _full(name, taken).reshape((*np.shape(rows), *taken.shape[1:]))

    def slice(self, name: str, first: int, last: int) -> Array:
        """Read one column from row ``first`` up to, but without, row ``last``."""
        if name == "posteriors" and self._shards.classes:
            chosen, values = (self.slice(part, first, last) for part in TOP)
            return spread_posteriors(chosen, values, self._shards.classes)
        begin = max(int(np.searchsorted(self.starts, first, side="right")) - 1, 0)
        end = min(int(np.searchsorted(self.starts, last, side="left")), len(self._shards))
        pieces = [
            self._shards[number][name][max(first - start, 0) : max(last - start, 0)]
            for number, start in enumerate(self.starts[begin:end].tolist(), begin)
        ]
        pieces = [piece for piece in pieces if len(piece)]
        return _full(name, np.concatenate(pieces) if pieces else self._shards[0][name][:0])

    def pieces(self, name: str, size: int = 1 << 16) -> Iterator[Array]:
        """Read one column in row order, at most ``size`` rows at a time."""
        for first in range(0, len(self), size):
            yield self.slice(name, first, min(first + size, len(self)))


def pieces_of(paths: Sequence[Path], name: str, size: int = 1 << 16) -> Iterator[Array]:
    """Read one column of shards in row order, at most ``size`` rows at a time, as :meth:`StoredRows.pieces` does.

    Only one shard is mapped at a time: pages that were read count as the process's memory until they are unmapped.
    """
    for path in paths:
        yield from StoredRows([path]).pieces(name, size)


def sample_of(paths: Sequence[Path], sizes: Sequence[int], name: str, rows: Array) -> Array:
    """Read one column at ascending row numbers of shards that hold so many rows each; one shard is mapped at a time."""
    bounds = np.searchsorted(rows, np.concatenate([[0], np.cumsum(sizes)]))
    taken, start = [], 0
    for path, size, first, last in zip(paths, sizes, bounds[:-1], bounds[1:], strict=True):
        if first < last:
            taken.append(StoredRows([path]).take(name, np.asarray(rows[first:last]) - start))
        start += size
    return np.concatenate(taken)


def spread_posteriors(classes: Array, values: Array, count: int) -> NDArray[np.float32]:
    """Whole posteriors from their largest entries: the rest of the probability is spread evenly over the others.

    Args:
        classes: ... x M, which classes the entries belong to; all different.
        values: ... x M, at least 0.
        count: C, the number of classes, at least M.

    Returns:
        ... x C float32, each row with sum 1 up to rounding.
    """
    values = values.astype(np.float32)
    total, others = values.sum(-1, keepdims=True), count - values.shape[-1]
    left = np.maximum(1 - total, 0) / others if others else np.zeros_like(total)
    whole = np.broadcast_to(left, (*values.shape[:-1], count)).astype(np.float32)
    np.put_along_axis(whole, classes.astype(np.int64), values, -1)
    return whole


def top_posteriors(posteriors: Array, top: int) -> dict[str, Array]:
    """The columns that :func:`spread_posteriors` reads: the ``top`` largest entries of each row, largest first.

    Classes are int16 where they fit, else int32.
    """
    # Only what was chosen is sorted: a whole sort of 1,000 classes would take as long as a fast net does.
    chosen = np.sort(np.argpartition(posteriors, -top, axis=1)[:, -top:], axis=1)
    values = np.take_along_axis(posteriors, chosen, 1)
    order = np.argsort(-values, axis=1, kind="stable")
    kind = np.int16 if posteriors.shape[1] <= 1 << 15 else np.int32
    chosen, values = np.take_along_axis(chosen, order, 1), np.take_along_axis(values, order, 1).astype(np.float32)
    return {"top_classes": chosen.astype(kind), "top_values": values}


def _full(name: str, values: Array) -> Array:
    return values.astype(np.float32) if name == "features" and values.dtype == np.float16 else values
