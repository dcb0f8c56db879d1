"""Vectors and their metadata in files of other programs: ``.npy``, HDF5 and Parquet, whole or numbered in a folder.

Nothing in them is run (no pickles), and what a file declares is compared with its size before memory is taken for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nndefense.errors import DataError
from nndefense.files import HDF5_ERRORS, held_array, not_read, open_hdf5, open_regular

Array = NDArray[Any]
PIECE = 1 << 14
"""Rows that are read at once."""
ENDINGS = (".npy", ".h5", ".hdf5", ".parquet")
_DENSE, _SMALL = 100, 64 << 20


def numbered_files(place: Path, endings: Sequence[str] = ENDINGS) -> list[Path]:
    """The files at a place that end in one of ``endings``: the file itself, or a folder's, in order of their numbers.

    Raises:
        DataError: there is none, or there are several kinds of them.
    """
    there = [path for path in place.iterdir() if path.name[0] != "."] if place.is_dir() else [place]
    found = [path for path in there if path.suffix in endings and path.is_file()]
    if not found:
        raise DataError(
            f"{place} holds nothing to import: give a file that ends in {', '.join(endings)}, or a folder of them"
        )
    kinds = sorted({path.suffix for path in found})
    if len(kinds) > 1:
        raise DataError(
            f"{place} holds files of several kinds ({', '.join(kinds)}): name one of them, or a folder of one"
        )
    return sorted(found, key=lambda path: ([int(part) for part in re.findall(r"\d+", path.stem)], path.name))


def matrix_pieces(paths: Sequence[Path], column: str) -> Iterator[NDArray[np.float32]]:
    """The vectors in files, in order: pieces M x d float32.

    Args:
        paths: as :func:`numbered_files` gives them.
        column: where a file has several: the array of an HDF5 file, the column of a Parquet file (lists of numbers).

    Raises:
        DataError: a file that cannot be read or holds no vectors, or vectors of another length than those before.
    """
    width: int | None = None
    for path in paths:
        for piece in _pieces(path, column):
            if piece.ndim != 2 or piece.dtype.kind not in "fiu":
                raise DataError(f"{path} holds {piece.dtype} of shape {piece.shape}: give vectors N x d of numbers")
            if width not in (None, piece.shape[1]):
                raise DataError(f"{path} holds vectors of {piece.shape[1]:,} numbers, but those before have {width:,}")
            width = piece.shape[1]
            yield np.array(piece, dtype=np.float32, order="C")


def read_table(paths: Sequence[Path], columns: Sequence[str]) -> dict[str, list[Any]]:
    """Those of the columns that Parquet files have, as lists, each value a number, a text or None.

    Raises:
        DataError: a file that cannot be read, or declares far more than it holds.
    """
    found: dict[str, list[Any]] = {}
    for place, path in enumerate(paths):
        with _reading(path):
            file, here, rows = _parquet(path, columns)
            total = 0
            if place and set(here) != set(found):
                raise DataError(f"{path} has other columns than {paths[0]}: give files that were written together")
            for name in here:
                found.setdefault(name, [])
            for batch in file.iter_batches(rows, columns=here):
                total += batch.nbytes
                if total > max(_SMALL, _DENSE * path.stat().st_size):
                    raise DataError(
                        f"{path} has metadata of more than {total:,} bytes, far more than it holds: fetch it again"
                    )
                for name in here:
                    found[name].extend(batch.column(name).to_pylist())
    return found


def _pieces(path: Path, column: str) -> Iterator[Array]:
    with _reading(path):
        if path.suffix == ".npy":
            # Mapped: NumPy compares the shape with the file's length, and a pickle is refused.
            whole = np.load(path, mmap_mode="r", allow_pickle=False)
            if whole.ndim != 2:
                raise DataError(f"{path} has the shape {whole.shape}: give vectors N x d")
            yield from (whole[first : first + PIECE] for first in range(0, len(whole), PIECE))
        elif path.suffix == ".parquet":
            file, here, rows = _parquet(path, [column])
            if not here:
                raise DataError(
                    f"{path} has no column {column!r}: name one of {', '.join(file.schema_arrow.names)} by --column"
                )
            for batch in file.iter_batches(rows, columns=here):
                lists = batch.column(0)
                values = lists.flatten().to_numpy(zero_copy_only=False)
                if lists.null_count or not len(lists) or len(values) % len(lists):
                    raise DataError(f"{path} has rows in {column!r} without a vector, or of different lengths")
                if len(set(lists.value_lengths().to_pylist())) > 1:
                    raise DataError(f"{path} has vectors of different lengths in {column!r}: give them one length")
                yield values.reshape(len(lists), -1)
        else:
            with open_hdf5(path) as file:
                names = ", ".join(file) or "nothing"
                if column not in file:
                    raise DataError(f"{path} has no array {column!r} but {names}: name one by --column")
                whole = held_array(file, column, path)
                if len(whole.shape) != 2:
                    raise DataError(f"{path} has {column!r} of shape {whole.shape}: give vectors N x d")
                yield from (whole[first : first + PIECE] for first in range(0, len(whole), PIECE))


def _parquet(path: Path, columns: Sequence[str] | None) -> tuple[Any, list[str], int]:
    """A Parquet file, those of the columns that it has (None: all), and how many rows of them may be read at once."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError("Parquet files are read by pyarrow, which is not installed: pip install pyarrow") from None
    file, size = parquet.ParquetFile(path), path.stat().st_size
    here = [name for name in file.schema_arrow.names if columns is None or name in columns]
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    parts = [group.column(number) for group in groups for number in range(group.num_columns)]
    parts = [part for part in parts if part.path_in_schema.split(".")[0] in here]
    # A value that stands for several is counted once when it is unpacked, and a value of a list takes 8 bytes at most.
    largest = max((part.total_uncompressed_size for part in parts), default=0)
    most = max([largest, 8 * file.metadata.num_rows, *(8 * part.num_values for part in parts)])
    if min([0, largest, *(part.num_values for part in parts)]) < 0 or most > max(_SMALL, _DENSE * size):
        raise DataError(
            f"{path} declares {most:,} bytes in a column, far more than its {size:,} can hold: write or fetch it again"
        )
    return file, here, max(1, min(PIECE, _SMALL // max(largest, 1)))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Tell in one line what is wrong with a file."""
    try:
        open_regular(path).close()
        yield
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: give a file that is there") from error
    except (*HDF5_ERRORS, EOFError, MemoryError, SyntaxError, TokenError) as error:
        told = (
            not_read(path, error) or f"{path} cannot be read ({' '.join(str(error).split())}): write or fetch it again"
        )
        raise DataError(told) from error
