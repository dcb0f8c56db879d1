"""Merging parts of an index into one file, in memory that does not grow with it."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from nndefense.database.faiss_tools import import_faiss, list_ids
from nndefense.database.index import FaissIndex
from nndefense.errors import DatabaseError, InputError
from nndefense.files import write_atomically

# How FAISS writes inverted lists: a mark, their number, bytes per row, and the lengths, of all lists or of none.
_LISTS, _FULL, _NONE = b"ilar", b"full", b"sprs"
_SLICE = 1 << 24
_NOTHING = np.empty(0, dtype=np.int64)


def merge_parts(
    parts: Sequence[Path], out: Path, *, memory: int | None = None, without: NDArray[np.int64] = _NOTHING
) -> list[Path]:
    """Merge index files into one, which appears whole or not at all.

    Each part was made by adding rows to the same trained index. FAISS's own merging renumbers rows, or holds the whole
    in memory, or leaves it in two files; here inverted lists and plain vectors go from the mapped parts straight into
    the new file, list by list and row by row. The bytes are those of an index to which all rows were added in order.

    Args:
        parts: the files, in the order of their rows; at least one.
        out: the file to write.
        memory: bytes that an index may take in memory. Matters only for codes without inverted lists (``PQ32``), which
            have to be held.
        without: numbers of rows that are left out, ascending; the rows after them move up.

    Returns:
        The files that were written.

    Raises:
        InputError: no parts, a kind that cannot be merged, or one that would have to be held and is too large for it.
        DatabaseError: parts that cannot be read or do not belong together.
    """
    if not parts:
        raise InputError("there are no index parts to merge: add rows first")
    opened = [FaissIndex.read(path, mapped=True) for path in parts]
    how = opened[0].merges
    if not how:
        raise InputError(
            f"an index of the kind {type(opened[0].inner).__name__} cannot be merged from parts: "
            "add all rows to one, or choose a kind with inverted lists (IVF...)"
        )
    rows = sum(part.rows for part in opened) - len(without)
    head, end = _head(parts[0], rows, how)
    for path, part in zip(parts[1:], opened[1:], strict=True):
        if part.merges != how or _head(path, rows, how)[0] != head:
            raise DatabaseError(f"{path} was made from another trained index than {parts[0]}: add its rows again")
    if how == "lists" and head.endswith(end):
        write_atomically(out, lambda path: _write_lists(path, head[: -len(end)], opened, without))
    elif how == "codes" and isinstance(opened[0].inner, import_faiss().IndexFlat) and head.endswith(end):
        write_atomically(out, lambda path: _write_flat(path, head[: -len(end)], opened, without))
    else:
        size = sum(path.stat().st_size for path in parts)
        if memory is not None and size > memory:
            raise InputError(
                f"the index would take {size:,} bytes of memory, but {memory:,} are allowed: choose a kind with "
                "inverted lists (IVF...), or allow more"
            )
        write_atomically(out, lambda path: _write_held(path, parts, how, without))
    return [out]


def emptied(path: Path) -> FaissIndex:
    """The index in a file without its rows, but with all that it has learnt: what more parts of it are made from.

    Raises:
        DatabaseError: not an index.
    """
    faiss = import_faiss()
    part = FaissIndex.read(path, mapped=True)
    inner = part.inner
    if isinstance(faiss.downcast_index(part.index), faiss.IndexFlat):
        # FAISS empties lists that are mapped, but not rows; here there is nothing else.
        return FaissIndex(faiss.IndexFlatL2(inner.d))
    if part.merges != "lists":
        part = FaissIndex.read(path)
        part.index.reset()
        return part
    lists = faiss.ArrayInvertedLists(inner.nlist, inner.code_size)
    inner.replace_invlists(lists, True)
    lists.this.disown()
    inner.ntotal = part.index.ntotal = 0
    return part


def _head(path: Path, rows: int, how: str) -> tuple[bytes, bytes]:
    """An index file as it would be with so many rows and none of their vectors, and what it should end with."""
    part = emptied(path)
    inner = part.inner
    end = struct.pack("<Q", 0)
    if how == "lists":
        end = _LISTS + struct.pack("<QQ", inner.nlist, inner.code_size) + _NONE + end
    inner.ntotal = part.index.ntotal = rows
    return import_faiss().serialize_index(part.index).tobytes(), end


def _write_lists(path: Path, head: bytes, parts: Sequence[FaissIndex], without: NDArray[np.int64]) -> None:
    faiss = import_faiss()
    held = [faiss.downcast_InvertedLists(part.inner.invlists) for part in parts]
    count, width = held[0].nlist, held[0].code_size

    def kept(lists: Any, number: int) -> NDArray[np.bool_]:
        return _kept(list_ids(lists, number), without)

    sizes = np.array([[lists.list_size(number) for number in range(count)] for lists in held], dtype=np.int64)
    lengths = sizes.sum(0)
    if len(without):
        lengths = np.array([sum(int(kept(lists, number).sum()) for lists in held) for number in range(count)])
    with path.open("wb") as file:
        file.write(head + _LISTS + struct.pack("<QQ", count, width) + _lengths(lengths.astype("<u8")))
        for number in range(count):
            some = [(lists, int(size)) for lists, size in zip(held, sizes[:, number], strict=True) if size]
            for lists, size in some:
                _copy(file, lists.get_codes(number), size, width, kept(lists, number) if len(without) else None)
            for lists, _ in some:
                ids = list_ids(lists, number)
                if len(without):
                    ids = ids[_kept(ids, without)]
                    ids = ids - np.searchsorted(without, ids)
                file.write(np.ascontiguousarray(ids, dtype="<i8").data)


def _kept(rows: NDArray[np.int64], without: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of these row numbers are not among those of ``without``, which ascend."""
    places = np.minimum(np.searchsorted(without, rows), len(without) - 1)
    return np.asarray(without[places] != rows)


def _lengths(lengths: NDArray[Any]) -> bytes:
    """The lists' lengths as FAISS writes them: all of them, or (number, length) pairs where most are empty."""
    filled = np.flatnonzero(lengths)
    if len(filled) > len(lengths) // 2:
        return _FULL + struct.pack("<Q", len(lengths)) + lengths.tobytes()
    pairs = np.stack([filled.astype("<u8"), lengths[filled]], axis=1)
    return _NONE + struct.pack("<Q", pairs.size) + pairs.tobytes()


def _write_flat(path: Path, head: bytes, parts: Sequence[FaissIndex], without: NDArray[np.int64]) -> None:
    width = parts[0].inner.d
    first = 0
    with path.open("wb") as file:
        file.write(head + struct.pack("<Q", (sum(part.rows for part in parts) - len(without)) * width))
        for part in parts:
            kept = np.ones(part.rows, dtype=np.bool_) if len(without) else None
            if kept is not None:
                kept[without[(without >= first) & (without < first + part.rows)] - first] = False
            if part.rows:
                _copy(file, part.inner.get_xb(), part.rows, width, kept)
            first += part.rows


def _copy(file: BinaryIO, pointer: Any, rows: int, width: int, kept: NDArray[np.bool_] | None = None) -> None:
    """Write the rows that FAISS points to, or those that are kept, in slices that the system need not hold at once."""
    values = import_faiss().rev_swig_ptr(pointer, rows * width).reshape(rows, width)
    each = max(_SLICE // width, 1)
    for first in range(0, rows, each):
        piece = values[first : first + each]
        file.write(np.ascontiguousarray(piece if kept is None else piece[kept[first : first + each]]).data)


def _write_held(path: Path, parts: Sequence[Path], how: str, without: NDArray[np.int64]) -> None:
    whole = FaissIndex.read(parts[0])
    for name in parts[1:]:
        part = FaissIndex.read(name)
        if how == "lists":
            # Rows have their numbers already.
            whole.inner.invlists.merge_from(part.inner.invlists, 0)
            whole.inner.ntotal += part.rows
            whole.index.ntotal = whole.inner.ntotal
        else:
            whole.index.merge_from(part.index)
    if len(without):
        # Lists keep the numbers of the rows, which then have gaps; that they are written held is of odd kinds alone.
        if how == "lists":
            raise InputError("rows cannot be taken out of an index of this kind: build it again without them")
        whole.index.remove_ids(import_faiss().IDSelectorBatch(without))
    whole.write(path)
