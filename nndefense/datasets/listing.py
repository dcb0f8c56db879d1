"""Lists of image files: a path a line, or a table with a column of them."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Sequence

import numpy as np

from nndefense.datasets.base import update_with_strings
from nndefense.datasets.derived import Size, check_form
from nndefense.datasets.encoded import EncodedDataset
from nndefense.datasets.ids import PackedIds
from nndefense.datasets.labels import LABEL_NAMES, Label, class_numbers
from nndefense.datasets.picture_names import SUFFIXES
from nndefense.datasets.remote import has_suffix, open_store
from nndefense.datasets.store import LocalStore, Store, is_url
from nndefense.errors import DataError
from nndefense.files import text_lines

_TABLES = {".csv": ",", ".tsv": "\t"}
_PATH_NAMES = ("path", "file", "filename", "file_name", "image", "image_path", "url")
_ID_NAMES = ("id", "key")
_ASKED = 10
# "a.png 3": the path, and what stands behind it.
_LABELLED = re.compile(rf"(.+(?:{'|'.join(map(re.escape, SUFFIXES))}))[\s,;]+(\S.*)", re.IGNORECASE)


class FileListDataset(EncodedDataset):
    """The images that a text file names, decoded when asked for.

    A ``.csv`` or ``.tsv`` has a line of column names: ``path`` (or ``file``, ``filename``, ``file_name``, ``image``,
    ``image_path``, ``url``), and if there are any, ``label`` (or another one of
    :data:`~nndefense.datasets.labels.LABEL_NAMES`, the same as in Parquet) and ``id`` (or ``key``). Labels are whole
    numbers (also ``10.0``), -1, NaN or nothing where unknown, or else names of classes. Any other file has one path a
    line and no labels. Lines end in LF, CR LF or CR; empty ones are passed over. Paths are relative to the list's
    folder, absolute, or URLs; a list that is itself a URL names no files of this machine. Without ids, the paths as
    they are written are the ids.

    The files are not looked at before they are read: one that is missing then is a bad image.

    Args:
        path: the list, or its URL.
        size, channels: as for :class:`~nndefense.datasets.ImageFolderDataset`.

    Raises:
        DataError: there is no list, it is empty, has no such columns, or names an id twice.
        InputError: ``size`` or ``channels`` is out of range.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        size: Size | None = None,
        channels: int | None = None,
        name: str | None = None,
    ) -> None:
        form = check_form(size, channels)
        text = os.fspath(path)
        title = name or f"files:{text}"
        self._store, self._list = open_store(text)
        self._remote = is_url(text)
        paths, labels, ids, lines = _entries(_read(self._store, self._list, text), text)
        if not paths:
            raise DataError(f"{text} names no images: write one path a line")
        _check_unique(ids, lines, text)
        if self._remote:
            for item, line in zip(paths, lines, strict=True):
                if item.startswith("/") or item.lower().startswith(("file:", "local:")):
                    raise DataError(
                        f"line {line} of {text} names a file of this machine: a list that is a URL must not"
                    )
        classes, numbers = class_numbers(labels, None, title, text)
        self._paths = PackedIds(paths)
        self._check_form(lines, text)
        kept = self._paths if ids is paths else PackedIds(ids)
        super().__init__(name=title, classes=classes, ids=kept, labels=numbers, size=form, channels=channels)

    def _check_form(self, lines: Sequence[int], written: str) -> None:
        """Raise :class:`DataError` where lines are of another form than paths: of a few, those that name no file."""
        rows = np.unique(np.linspace(0, len(self._paths) - 1, _ASKED).astype(np.int64)).tolist()
        for row in rows:
            item = self._paths[row]
            labelled = _LABELLED.fullmatch(item)
            if is_url(item) or not (labelled or "\\" in item):
                continue
            store, path = self._place(row)
            if store.is_file(path):
                continue
            if labelled and not item.lower().endswith(SUFFIXES):
                raise DataError(
                    f"line {lines[row]} of {written} is a path and {labelled[2]!r}: a list with labels is a .csv file "
                    "whose first line is path,label"
                )
            if "\\" in item:
                raise DataError(
                    f"line {lines[row]} of {written} has backslashes ({item}), which divide paths on Windows alone: "
                    f"write {item.replace(chr(92), '/')}"
                )

    def _place(self, row: int) -> tuple[Store, str]:
        item = self._paths[row]
        if is_url(item):
            return open_store(item)
        if self._remote:
            return self._store, self._store.sibling(self._list, item)
        return LocalStore(), os.path.join(os.path.dirname(self._list), os.path.expanduser(item))

    def _fetch(self, row: int, item: str) -> tuple[str, bytes]:
        store, path = self._place(row)
        return store.url(path), store.image_bytes(path, self._reachable)

    def _reachable(self) -> bool:
        """Whether one of a few files of the list is there: a list without any is wrong, or its disk is away."""
        rows = np.unique(np.linspace(0, len(self) - 1, _ASKED).astype(np.int64))
        return any(store.is_file(path) for store, path in map(self._place, rows.tolist()))

    def _digest(self) -> str:
        """Hash the form, the list, and the byte count of each file of this machine."""
        digest = self._begun_digest("files")
        update_with_strings(digest, self._paths)
        digest.update(self.labels.astype("<i8").tobytes())
        sizes = np.full(len(self), -1, dtype="<i8")
        if not self._remote:
            for row in range(len(self)):
                store, path = self._place(row)
                if isinstance(store, LocalStore):
                    sizes[row] = store.size(path)
        digest.update(sizes.tobytes())
        return digest.hexdigest()


def _read(store: Store, path: str, written: str) -> str:
    if not store.is_file(path):
        raise DataError(
            f"there is no list {written}: give a text file with one path a line, or a .csv with a column path"
        )
    try:
        return store.read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the list {written} ({' '.join(str(error).split())}): save it as UTF-8") from error


def _entries(text: str, written: str) -> tuple[list[str], list[Label], Sequence[str], list[int]]:
    """Paths, labels, ids and line numbers; ids are the very paths where there are none."""
    delimiter = next((mark for suffix, mark in _TABLES.items() if has_suffix(written, (suffix,))), None)
    if delimiter is None:
        lines = [(number, line.strip(" \t")) for number, line in enumerate(text_lines(text), 1)]
        paths = [line for _, line in lines if line]
        return paths, [None] * len(paths), paths, [number for number, line in lines if line]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    paths, ids, numbers = [], [], []
    labels: list[Label] = []
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        where = _column(header, _PATH_NAMES)
        if where is None:
            raise DataError(f"{written} has no column path: begin it with the line path{delimiter}label")
        label, key = _column(header, LABEL_NAMES), _column(header, _ID_NAMES)
        for cells in reader:
            if not any(cells):
                continue
            if len(cells) != len(header) or not cells[where].strip():
                raise DataError(
                    f"line {reader.line_num} of {written} has {len(cells)} cells or no path, but the first line names "
                    f"{len(header)} columns: mend it"
                )
            paths.append(cells[where].strip(" \t"))
            labels.append(cells[label] if label is not None else "")
            ids.append(cells[key].strip() if key is not None else "")
            numbers.append(reader.line_num)
    except csv.Error as error:
        raise DataError(f"line {reader.line_num} of {written} is no line of a table ({error}): mend it") from error
    return paths, labels, ids if key is not None else paths, numbers


def _column(header: Sequence[str], names: Sequence[str]) -> int | None:
    return next((header.index(name) for name in names if name in header), None)


def _check_unique(ids: Sequence[str], lines: Sequence[int], written: str) -> None:
    seen: dict[str, int] = {}
    for item, line in zip(ids, lines, strict=True):
        if not item:
            raise DataError(f"line {line} of {written} has no id: give one, or leave the column out")
        if seen.setdefault(item, line) != line:
            raise DataError(f"line {line} of {written} repeats line {seen[item]} ({item}): name every image once")
