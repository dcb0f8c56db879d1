"""One column of Parquet files, read row group by row group, in memory that what is packed in it does not decide."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from nndefense.datasets.ids import RowNumbers
from nndefense.datasets.rejected import SourceError
from nndefense.datasets.store import Store

DENSE = 100
"""How many times what is packed may be unpacked, where that is much."""
BATCH = 1 << 16
WHOLE_GROUP = 128 << 20
"""A row group with at most so many bytes of pictures is read whole."""
KEPT_BYTES = 256 << 20
_PIECE = 32


class Cells:
    """Reads one column of several files. Safe to use from many threads, one of which reads at a time.

    A row group is the smallest part that Parquet can reach. Small ones are read whole. In a large one a cursor moves
    forwards a few rows at a time and stays where it is, so that reading in order is one pass over it. What was read
    last is kept, as far as it fits into :data:`KEPT_BYTES`: threads that share the rows do not ask in perfect order. So
    memory holds that and a page; who writes a table decides how large its pages are.
    """

    def __init__(self, store: Store, files: tuple[str, ...], column: str) -> None:
        self._store, self._files, self._column = store, files, column
        self._forget()

    def __getstate__(self) -> dict[str, object]:
        return {"_store": self._store, "_files": self._files, "_column": self._column}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._kept: OrderedDict[tuple[int, int, int], Any] = OrderedDict()
        self._kept_bytes = 0
        # Row groups that turned out larger than they are said to be, as a value can stand for many.
        self._grown: set[tuple[int, int]] = set()
        self._opened: tuple[int, Any] | None = None
        # Of the cursor: its row group, the row that its next piece begins with, and the pieces to come.
        self._cursor: tuple[tuple[int, int], int, Iterator[Any]] | None = None

    def read(self, file: int, group: int, group_bytes: int, rows: RowNumbers) -> list[Any]:
        """Return the cells at ``rows`` (ascending, within the row group), as Python values.

        Raises:
            SourceError: the file cannot be read any more.
        """
        import pyarrow as arrow

        if self._process != os.getpid():
            # What a parent process had open is not ours, and its lock may have been held.
            self._forget()
        with self._lock:
            try:
                whole = None if group_bytes > WHOLE_GROUP else self._whole((file, group), group_bytes)
                if whole is None:
                    return [self._piece_with((file, group), row)[row % _PIECE].as_py() for row in rows.tolist()]
                return [whole[row].as_py() for row in rows.tolist()]
            except (OSError, ValueError, IndexError, arrow.ArrowException) as error:
                self._opened = self._cursor = None
                place, reason = self._store.url(self._files[file]), " ".join(str(error).split())
                raise SourceError(
                    f"cannot read row group {group} of {place} ({reason}): write or fetch the file again"
                ) from error

    def _keep(self, key: tuple[int, int, int], column: Any) -> None:
        self._kept[key] = column
        self._kept_bytes += column.nbytes
        while self._kept_bytes > KEPT_BYTES and len(self._kept) > 1:
            self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes

    def _whole(self, group: tuple[int, int], group_bytes: int) -> Any:
        """The column of a row group; None where it is too large to be held."""
        key = (*group, -1)
        if group in self._grown:
            return None
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if self._opened is None or self._opened[0] != group[0]:
            self._opened = (group[0], self._open(group[0]))
        held, total = [], 0
        # Small even where all rows of a batch are the largest value.
        size = max(1, min(BATCH, WHOLE_GROUP // 2 // max(1, group_bytes)))
        for batch in self._opened[1].iter_batches(size, row_groups=[group[1]], columns=[self._column]):
            held.append(batch.column(0))
            total += held[-1].nbytes
            if total > WHOLE_GROUP:
                self._grown.add(group)
                return None
        self._keep(key, _joined(held))
        return self._kept[key]

    def _piece_with(self, group: tuple[int, int], row: int) -> Any:
        key = (*group, row // _PIECE)
        if key not in self._kept and (self._cursor is None or self._cursor[0] != group or self._cursor[1] > row):
            self._cursor = (group, 0, self._pieces(group))
        while key not in self._kept:
            assert self._cursor is not None
            start, pieces = self._cursor[1:]
            piece = next(pieces, None)
            if piece is None:
                raise IndexError(f"it ends before row {row}")
            self._keep((*group, start // _PIECE), piece)
            self._cursor = (group, start + _PIECE, pieces)
        return self._kept[key]

    def _pieces(self, group: tuple[int, int]) -> Iterator[Any]:
        held: list[Any] = []
        count = 0
        most = max(WHOLE_GROUP, DENSE * self._store.size(self._files[group[0]]))
        # A row at a time, as a small table can stand for rows of any size. The library cuts where pages end.
        for batch in self._open(group[0]).iter_batches(
            1 if group in self._grown else _PIECE, row_groups=[group[1]], columns=[self._column]
        ):
            held.append(batch.column(0))
            count += len(batch)
            if sum(part.nbytes for part in held) > most:
                raise ValueError(
                    f"{_PIECE} of its pictures have more than {most:,} bytes, far more than the file holds"
                )
            while count >= _PIECE:
                joined = _joined(held)
                yield joined.slice(0, _PIECE)
                held, count = [joined.slice(_PIECE)], count - _PIECE
        if count:
            yield _joined(held)

    def _open(self, file: int) -> Any:
        import pyarrow.parquet as parquet

        # With a buffer, a column is read as it is used; without, all of a row group's at once.
        return parquet.ParquetFile(self._store.open(self._files[file]), buffer_size=1 << 20, pre_buffer=False)


def _joined(arrays: list[Any]) -> Any:
    import pyarrow as arrow

    return arrow.concat_arrays(arrays) if len(arrays) > 1 else arrays[0]
