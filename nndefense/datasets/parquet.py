"""Parquet tables with encoded pictures in a column, as the usual hubs of data sets hand them out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nndefense.datasets.cells import BATCH, DENSE, Cells
from nndefense.datasets.derived import Size, check_form
from nndefense.datasets.encoded import EncodedDataset
from nndefense.datasets.ids import Ids, JoinedIds, NumberedIds, PackedIds, RowNumbers
from nndefense.datasets.labels import LABEL_NAMES, Label, class_numbers
from nndefense.datasets.rejected import BadImage
from nndefense.datasets.remote import find_files
from nndefense.datasets.store import Store, check_bytes, empty_image
from nndefense.errors import DataError

SUFFIXES = (".parquet",)
_REMEDY = "write or fetch the file again"
_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo")
_ID_NAMES = ("id", "key", "__key__")
_FINGERPRINT_IMAGES = 100
# A few bytes can stand for any number of rows, each of any length. So many rows may be in any file, in a larger
# one a row for each byte; so many bytes may be unpacked, and of a larger one DENSE times as many as are packed.
_FEW_ROWS, _SMALL = 1 << 20, 64 << 20


class ParquetDataset(EncodedDataset):
    """The pictures in a column of Parquet files, read row group by row group and decoded when asked for.

    The column of images holds the files' bytes, or a struct with ``bytes`` (and ``path``, which is passed over: a
    table does not say what else is read). It is the one named ``image``, ``img``, ``jpg``, ``png`` or the like, else
    the only column of that type. Labels, where there are any, are in a column of
    :data:`~nndefense.datasets.labels.LABEL_NAMES`: whole numbers from 0 (-1, NaN or null where unknown) or names; the
    names of numbered classes are taken from the Hugging Face schema where the file has one, else they are 0, 1, ...
    Ids are the column ``id``, ``key`` or ``__key__`` if it is text, else ``<file>/00000`` and so on.

    Labels and ids are in memory; of the pictures, what was read last, up to 256 MiB.

    Args:
        source: a folder (all its ``*.parquet``, sorted), a file, a pattern, or the URL of one of these.
        split: a folder in ``source``, or the beginning of its files' names.
        size, channels: as for :class:`~nndefense.datasets.ImageFolderDataset`.

    Raises:
        DataError: pyarrow is not installed; no files, a file that is damaged, columns that are missing or not alike.
        InputError: ``size`` or ``channels`` is out of range.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        *,
        split: str | None = None,
        size: Size | None = None,
        channels: int | None = None,
        name: str | None = None,
    ) -> None:
        form = check_form(size, channels)
        text = os.fspath(source)
        self._store, self.files = find_files(text, split, SUFFIXES, "file")
        title = name or f"parquet:{text}" + (f":{split}" if split else "")
        tables = [_Table(self._store, path) for path in self.files]
        for table in tables[1:]:
            if (table.image, table.label, table.id) != (tables[0].image, tables[0].label, tables[0].id):
                raise DataError(f"{table.place} has other columns than {tables[0].place}: open them one by one")
        if not sum(table.rows for table in tables):
            raise DataError(f"{title} has no rows: give a table that holds images")
        # Of each row group of all files: the file, its number in it, its first row, and its pictures' bytes.
        self._group_file = np.array([n for n, t in enumerate(tables) for _ in t.groups], dtype=np.int64)
        self._group_number = np.array([n for t in tables for n in range(len(t.groups))], dtype=np.int64)
        rows = np.array([count for t in tables for count, _ in t.groups], dtype=np.int64)
        self._group_bytes = np.array([count for t in tables for _, count in t.groups], dtype=np.int64)
        self._group_start = np.concatenate([[0], np.cumsum(rows)])
        self._cells = Cells(self._store, self.files, tables[0].image)
        names = tables[0].names
        labels: list[Label] = []
        for table in tables:
            labels.extend(table.labels())
        classes, numbers = class_numbers(labels, names, title, "the table")
        super().__init__(
            name=title, classes=classes, ids=_ids(tables, title), labels=numbers, size=form, channels=channels
        )

    def _fetcher(self, rows: RowNumbers) -> Callable[[int], tuple[str, bytes]]:
        items = self.ids.take(rows)
        groups = np.searchsorted(self._group_start, rows, side="right") - 1
        cells: dict[int, Any] = {}
        for group in np.unique(groups).tolist():
            inside = np.unique(rows[groups == group] - self._group_start[group])
            place = (int(self._group_file[group]), int(self._group_number[group]))
            found = self._cells.read(*place, int(self._group_bytes[group]), inside)
            cells.update(zip((inside + self._group_start[group]).tolist(), found, strict=True))

        def fetch(place: int) -> tuple[str, bytes]:
            row = int(rows[place])
            file = self._store.url(self.files[self._group_file[groups[place]]])
            return cell_bytes(f"{items[place]} in {file}", cells[row])

        return fetch

    def _digest(self) -> str:
        """Hash the form, labels, ids and up to 100 evenly spaced files: all of them could take hours."""
        digest = self._begun_digest("parquet")
        digest.update(self.labels.astype("<i8").tobytes())
        digest.update(self._group_bytes.astype("<i8").tobytes())
        for path in self.files:
            digest.update(b"%d\n" % self._store.size(path))
        # The first picture of evenly spaced row groups: from there a group is read without what lies before.
        groups = np.linspace(0, len(self._group_bytes) - 1, min(len(self._group_bytes), _FINGERPRINT_IMAGES))
        for row in np.unique(self._group_start[:-1][groups.astype(np.int64)]):
            if row < len(self):
                try:
                    digest.update(self._fetcher(np.array([row], dtype=np.int64))(0)[1])
                except BadImage as error:
                    digest.update(error.kind.encode())
        return digest.hexdigest()


class _Table:
    """What the footer of one file tells, and its labels and ids."""

    def __init__(self, store: Store, path: str) -> None:
        try:
            import pyarrow as arrow
            import pyarrow.parquet as parquet
        except ImportError:
            raise DataError("Parquet files are read by pyarrow, which is not installed: pip install pyarrow") from None

        self.place = store.url(path)
        self.stem = Path(path.rpartition("/")[2]).stem
        self._arrow = arrow
        try:
            with store.open(path) as handle:
                file = parquet.ParquetFile(handle)
                schema, metadata, size = file.schema_arrow, file.metadata, handle.seek(0, os.SEEK_END)
                self.image = image_column(schema, self.place)
                self.label = next((name for name in LABEL_NAMES if name in schema.names), None)
                texts = [name for name in schema.names if arrow.types.is_string(schema.field(name).type)]
                self.id = next((name for name in _ID_NAMES if name in texts), None)
                self.rows = metadata.num_rows
                if self.rows > max(_FEW_ROWS, size):
                    raise DataError(
                        f"{self.place} declares {self.rows:,} rows in {size:,} bytes, far more than it can hold: "
                        f"{_REMEDY}"
                    )
                self.groups, largest = [], 1
                wanted = [name for name in (self.label, self.id) if name]
                for group in map(metadata.row_group, range(metadata.num_row_groups)):
                    columns = [*map(group.column, range(metadata.num_columns))]
                    of = {
                        name: [part for part in columns if part.path_in_schema.split(".")[0] == name]
                        for name in (self.image, *wanted)
                    }
                    unpacked = {name: self._unpacked(parts, size) for name, parts in of.items()}
                    self.groups.append((group.num_rows, unpacked[self.image]))
                    largest = max(largest, *(unpacked[name] for name in (self.image, *wanted)))
                self._columns = self._read(file, wanted, largest, size) if wanted else None
        except (OSError, ValueError, LookupError, RuntimeError, TypeError, arrow.ArrowException) as error:
            raise DataError(
                f"cannot read {self.place} as a Parquet file ({' '.join(str(error).split())}): {_REMEDY}"
            ) from error
        self.names = class_names(schema, self.label)

    def _unpacked(self, parts: Sequence[Any], size: int) -> int:
        """The bytes of a column in a row group when it is unpacked, a value that stands for several counted once."""
        unpacked = sum(part.total_uncompressed_size for part in parts)
        packed = sum(part.total_compressed_size for part in parts)
        if not 0 <= unpacked <= max(_SMALL, DENSE * min(packed, size)):
            raise DataError(
                f"{self.place} has a column that unpacks to {unpacked:,} bytes, far more than the file holds: {_REMEDY}"
            )
        return int(unpacked)

    def _read(self, file: Any, wanted: list[str], largest: int, size: int) -> Any:
        """Columns as a table, in batches, each of which is small even where all its rows are the largest value."""
        held, total = [], 0
        for batch in file.iter_batches(max(1, min(BATCH, _SMALL // largest)), columns=wanted):
            held.append(batch)
            total += batch.nbytes
            if total > max(_SMALL, DENSE * size):
                raise DataError(
                    f"{self.place} has labels or ids of more than {total:,} bytes, far more than the file holds: "
                    f"{_REMEDY}"
                )
        return self._arrow.Table.from_batches(held, None if held else file.schema_arrow)

    def labels(self) -> list[Label]:
        if self.label is None or self._columns is None:
            return [None] * self.rows
        return label_values(self._columns.column(self.label), self.place)

    def ids(self) -> Ids:
        if self.id is None or self._columns is None:
            return NumberedIds(self.stem, self.rows)
        found = self._columns.column(self.id).to_pylist()
        if None in found:
            raise DataError(f"{self.place} has rows without an id in the column {self.id}: fill it or leave it out")
        return PackedIds(found)


def label_values(column: Any, place: str) -> list[Label]:
    """The labels in an Arrow column.

    Raises:
        DataError: its type is none of numbers or texts.
    """
    from pyarrow import types

    kind = column.type.value_type if types.is_dictionary(column.type) else column.type
    readable = (types.is_integer, types.is_floating, types.is_string, types.is_large_string)
    if not any(fits(kind) for fits in readable):
        raise DataError(f"{place} has labels of type {kind}: store whole numbers from 0, or names of classes")
    if types.is_dictionary(column.type):
        # One object for all rows of a value, which may be long.
        parts = [(part.dictionary.to_pylist(), part.indices.to_pylist()) for part in column.chunks]
        return [None if place is None else values[place] for values, places in parts for place in places]
    found: list[Label] = column.to_pylist()
    return found


def image_column(schema: Any, place: str) -> str:
    """The column of encoded pictures: the one that is called so, else the only one of that type.

    Raises:
        DataError: there is none, or several.
    """
    import pyarrow as arrow

    def holds_images(field: Any) -> bool:
        kind = field.type
        if arrow.types.is_struct(kind):
            return any(
                kind.field(number).name == "bytes" and _is_binary(kind.field(number).type, arrow)
                for number in range(kind.num_fields)
            )
        return _is_binary(kind, arrow)

    able = [field.name for field in schema if holds_images(field)]
    named = [name for name in _IMAGE_NAMES if name in able]
    if named:
        return named[0]
    if len(able) == 1:
        return str(able[0])
    found = f"several: {', '.join(able)}" if able else f"none among {', '.join(schema.names[:8]) or 'no columns'}"
    raise DataError(
        f"{place} must have one column of encoded images (bytes, or a struct with bytes), but has {found}: "
        "name it image"
    )


def _is_binary(kind: Any, arrow: Any) -> bool:
    return bool(arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind))


def class_names(schema: Any, label: str | None) -> list[str] | None:
    """The names of the classes in the metadata that the ``datasets`` library of Hugging Face writes, if any."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    if isinstance(names, list) and all(isinstance(name, str) for name in names) and len(set(names)) == len(names):
        return names
    return None


def _ids(tables: list[_Table], title: str) -> Ids:
    stems = [table.stem for table in tables]
    if len(set(stems)) < len(stems) and tables[0].id is None:
        raise DataError(f"two files of {title} have the same name: give them other names, or a column id")
    ids = JoinedIds([table.ids() for table in tables])
    if tables[0].id is not None and len(set(ids)) < len(ids):
        raise DataError(f"{title} has an id twice in the column {tables[0].id}: make them unique or leave it out")
    return ids


def cell_bytes(called: str, cell: Any) -> tuple[str, bytes]:
    """What messages call the picture of a cell, and the bytes that stand in it, never those of a file that it names.

    Raises:
        BadImage: there are none.
    """
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if data is None:
        path = isinstance(cell, dict) and cell.get("path")
        what = "only the path of a file, not its bytes: embed the images" if path else "no image: its cell is empty"
        raise BadImage(f"the row {called} holds {what}", "missing", f"its row holds {what}")
    check_bytes(called, len(data))
    if not data:
        raise empty_image(called)
    return called, data
