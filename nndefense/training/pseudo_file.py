"""The file of pseudo-labels: HDF5 columns, written whole or not at all, ids read when they are asked for."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nndefense.datasets.ids import Ids
from nndefense.errors import DataError, one_line, warn
from nndefense.files import DIGEST, HDF5_ERRORS, digest_of, held_array, not_read, open_hdf5, write_atomically

Array = NDArray[Any]
FORMAT, VERSION = "nndefense-pseudo-labels", 1
BLOCK = 65536
# What every file has besides the ids; and NAME_label and NAME_confidence of each labeller that was combined.
COLUMNS = ("rows", "label", "confidence", "near_row", "near_distance")
_REMEDY = "restore it or label the pool again"


def read_file(
    path: Path,
) -> tuple[dict[str, Array], Ids, tuple[str, ...], tuple[str, ...] | None, dict[str, Any], dict[str, Any] | None]:
    """What :class:`nndefense.training.pseudo_labels.PseudoLabels` is made of; all columns are read but the ids.

    Raises:
        DataError: the file is missing, damaged or of another kind.
    """
    if not path.is_file():
        raise DataError(f"there are no pseudo-labels at {path}: make them with 'nndefense pseudo-label write'")
    try:
        with open_hdf5(path) as file:
            if file.attrs.get("format") != FORMAT or int(file.attrs["version"]) != VERSION:
                raise DataError(f"{path} is no file of pseudo-labels of version {VERSION}: name one that is")
            columns = {name: np.asarray(held_array(file, name, path)[...]) for name in file if name != "ids"}
            names = {key: tuple(map(_text, file.attrs[key])) for key in ("classes", "class_ids") if key in file.attrs}
            job, selection = json.loads(file.attrs["job"]), json.loads(file.attrs.get("selection", "null"))
            ids = held_array(file, "ids", path)
            lengths = {len(column) for column in columns.values()} | {int(ids.shape[0])}
            digests = {name: _hasher(column.dtype, column) for name, column in columns.items()}
            digests["ids"] = _hasher(ids.dtype)
            for first in range(0, ids.shape[0], BLOCK):
                digests["ids"].update(ids[first : first + BLOCK])
            written = file.attrs.get(DIGEST)
        labels = columns["label"]
        if len(lengths) != 1 or not set(COLUMNS) <= set(columns):
            raise ValueError("its columns do not fit together")
        if not -1 <= labels.min(initial=0) <= labels.max(initial=0) < len(names["classes"]):
            raise ValueError("it has labels outside its classes")
        # A file that does not say who labelled which pool is of no use.
        teachers_of(job), job["pool"]["ids_sha256"]
        told = _digest_of_file(digests, names["classes"], names.get("class_ids"), job, selection)
        if written is not None and _text(written) != told:
            raise ValueError("its values have changed since it was written")
    except DataError:
        raise
    except HDF5_ERRORS as error:
        told = not_read(path, error) or f"{path} cannot be read as pseudo-labels ({one_line(error)}): {_REMEDY}"
        raise DataError(told) from error
    if written is None:
        warn(
            f"{path} was written before pseudo-labels had a digest, so that a change would go unnoticed: 'nndefense "
            "pseudo-label select' writes a file that has one"
        )
    return columns, FileIds(path, len(labels)), names["classes"], names.get("class_ids"), job, selection


def _hasher(dtype: np.dtype[Any], column: Array | None = None) -> hashlib._Hash:
    """The hash of a column, or one that is to be fed with its values."""
    digest = hashlib.sha256(f"{dtype.str}\n".encode())
    if column is not None:
        digest.update(np.ascontiguousarray(column).data)
    return digest


def _digest_of_file(
    columns: Mapping[str, hashlib._Hash],
    classes: Sequence[str],
    class_ids: Sequence[str] | None,
    job: Any,
    selection: Any,
) -> str:
    """The digest of all that a file says."""
    plain = {name: digest.hexdigest() for name, digest in columns.items()}
    return digest_of([plain, list(classes), None if class_ids is None else list(class_ids), job, selection])


def teachers_of(job: Mapping[str, Any]) -> dict[str, str]:
    """Fingerprint and source of every classifier in the description of a job."""
    labeller = job["labeller"]
    return {part["teacher"]["fingerprint"]: part["teacher"]["source"] for part in labeller.get("parts", [labeller])}


class FileIds(Ids):
    """The ids in a file of pseudo-labels, read when asked for."""

    def __init__(self, path: Path, count: int) -> None:
        self._path, self._count = path, count

    def __len__(self) -> int:
        return self._count

    def take(self, rows: Array) -> list[str]:
        if not len(rows):
            return []
        # One slice and a choice in memory: HDF5 is slow with lists of rows, and callers ask for neighbours.
        found = np.empty(len(rows), dtype=object)
        order = np.argsort(rows, kind="stable")
        try:
            with open_hdf5(self._path) as file:
                for first in range(0, len(rows), BLOCK):
                    places = order[first : first + BLOCK]
                    low, high = int(rows[places[0]]), int(rows[places[-1]])
                    for start in range(low, high + 1, BLOCK):
                        block = held_array(file, "ids", self._path)[start : min(start + BLOCK, high + 1)]
                        inside = places[(rows[places] >= start) & (rows[places] < start + BLOCK)]
                        found[inside] = block[rows[inside] - start]
        except HDF5_ERRORS as error:
            told = not_read(self._path, error) or f"{self._path} cannot be read any more ({error}): {_REMEDY}"
            raise DataError(told) from error
        return [bytes(item).decode("utf-8", "surrogateescape") for item in found]


def encode_ids(ids: Sequence[str]) -> Array:
    """Ids as an array of bytes, UTF-8, as wide as the longest."""
    return np.array([item.encode("utf-8", "surrogateescape") for item in ids], dtype="S")


def write_file(
    path: Path,
    count: int,
    blocks: Callable[[], Iterable[Mapping[str, Array]]],
    classes: Sequence[str],
    class_ids: Sequence[str] | None,
    job: Any,
    selection: Any = None,
) -> None:
    """Write ``count`` rows that come in blocks (``blocks()`` gives them anew each time); whole or not at all.

    Raises:
        DataError: the disk is full or cannot be written.
    """
    import h5py

    width, types = 1, {}
    for block in blocks():
        width = max(width, block["ids"].dtype.itemsize)
        types = {name: column.dtype for name, column in block.items()}
    types["ids"] = np.dtype(f"S{width}")

    def write(part: Path) -> None:
        # Where the disk is full, HDF5 can crash the whole process when it closes the file: so it is asked before.
        need = count * sum(dtype.itemsize for dtype in types.values()) + (1 << 20)
        if shutil.disk_usage(part.parent).free < need:
            raise OSError(f"{need:,} bytes are needed, and fewer are free")
        # Version 1.10 of the format, because older ones hold at most 64 KiB of class names. Nobody else knows the part.
        with h5py.File(part, "w", libver=("v110", "v110"), locking=False) as file:
            for name, dtype in types.items():
                file.create_dataset(name, shape=(count,), dtype=dtype)
            first, digests = 0, {name: _hasher(dtype) for name, dtype in types.items()}
            for block in blocks():
                last = first + len(block["ids"])
                for name, column in block.items():
                    file[name][first:last] = stored = np.ascontiguousarray(column, dtype=types[name])
                    digests[name].update(stored.data)
                first = last
            text = h5py.string_dtype()
            file.attrs.update(format=FORMAT, version=VERSION, job=json.dumps(job, sort_keys=True))
            file.attrs["classes"] = np.array(list(classes), dtype=text)
            if class_ids is not None:
                file.attrs["class_ids"] = np.array(list(class_ids), dtype=text)
            if selection is not None:
                file.attrs["selection"] = json.dumps(selection, sort_keys=True)
            file.attrs[DIGEST] = _digest_of_file(digests, classes, class_ids, job, selection)

    try:
        write_atomically(path, write)
    except OSError as error:
        raise DataError(f"cannot write {path} ({error}): free some space or choose another folder") from error


def _text(item: object) -> str:
    return item.decode("utf-8") if isinstance(item, bytes) else str(item)
