"""Merging parts of an index into one file, in memory that does not grow with it."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from nndefense.database.faiss_tools import import_faiss
from nndefense.database.index import FaissIndex
from nndefense.errors import DatabaseError, InputError
from nndefense.files import write_atomically

# How FAISS writes inverted lists: a mark, their number, bytes per row, and the lengths, of all lists or of none.
_LISTS, _FULL, _NONE = b"ilar", b"full", b"sprs"
_SLICE = 1 << 24


def merge_parts(parts: Sequence[Path], out: Path, *, memory: int | None = None) -> list[Path]:
    """Merge index files into one, which appears whole or not at all.

    Each part was made by adding rows to the same trained index. FAISS's own merging renumbers rows, or holds the whole
    in memory, or leaves it in two files; here inverted lists and plain vectors go from the mapped parts straight into
    the new file, list by list and row by row. The bytes are those of an index to which all rows were added in order.

    Args:
        parts: the files, in the order of their rows; at least one.
        out: the file to write.
        memory: bytes that an index may take in memory. Matters only for codes without inverted lists (``PQ32``), which
            have to be held.

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
    head, end = _head(parts[0], sum(part.rows for part in opened), how)
    for path, part in zip(parts[1:], opened[1:], strict=True):
        if part.merges != how or _head(path, sum(part.rows for part in opened), how)[0] != head:
            raise DatabaseError(f"{path} was made from another trained index than {parts[0]}: add its rows again")
    if how == "lists" and head.endswith(end):
        write_atomically(out, lambda path: _write_lists(path, head[: -len(end)], opened))
    elif how == "codes" and isinstance(opened[0].inner, import_faiss().IndexFlat) and head.endswith(end):
        write_atomically(out, lambda path: _write_flat(path, head[: -len(end)], opened))
    else:
        size = sum(path.stat().st_size for path in parts)
        if memory is not None and size > memory:
            raise InputError(
                f"the index would take {size:,} bytes of memory, but {memory:,} are allowed: choose a kind with "
                "inverted lists (IVF...), or allow more"
            )
        write_atomically(out, lambda path: _write_held(path, parts, how))
    return [out]


def _head(path: Path, rows: int, how: str) -> tuple[bytes, bytes]:
    """An index file as it would be with so many rows and none of their vectors, and what it should end with."""
    faiss = import_faiss()
    # FAISS empties lists that are mapped, but not rows.
    part = FaissIndex.read(path, mapped=how == "lists")
    inner = part.inner
    if how == "lists":
        lists = faiss.ArrayInvertedLists(inner.nlist, inner.code_size)
        inner.replace_invlists(lists, True)
        lists.this.disown()
        end = _LISTS + struct.pack("<QQ", inner.nlist, inner.code_size) + _NONE + struct.pack("<Q", 0)
    else:
        part.index.reset()
        end = struct.pack("<Q", 0)
    inner.ntotal = part.index.ntotal = rows
    return faiss.serialize_index(part.index).tobytes(), end


def _write_lists(path: Path, head: bytes, parts: Sequence[FaissIndex]) -> None:
    faiss = import_faiss()
    held = [faiss.downcast_InvertedLists(part.inner.invlists) for part in parts]
    count, width = held[0].nlist, held[0].code_size
    sizes = np.array([[lists.list_size(number) for number in range(count)] for lists in held], dtype=np.int64)
    lengths = sizes.sum(0).astype("<u8")
    with path.open("wb") as file:
        file.write(head + _LISTS + struct.pack("<QQ", count, width) + _lengths(lengths))
        for number in range(count):
            some = [(lists, int(size)) for lists, size in zip(held, sizes[:, number], strict=True) if size]
            for lists, size in some:
                _copy(file, lists.get_codes(number), size * width)
            for lists, size in some:
                file.write(np.asarray(faiss.rev_swig_ptr(lists.get_ids(number), size), dtype="<i8").data)


def _lengths(lengths: NDArray[Any]) -> bytes:
    """The lists' lengths as FAISS writes them: all of them, or (number, length) pairs where most are empty."""
    filled = np.flatnonzero(lengths)
    if len(filled) > len(lengths) // 2:
        return _FULL + struct.pack("<Q", len(lengths)) + lengths.tobytes()
    pairs = np.stack([filled.astype("<u8"), lengths[filled]], axis=1)
    return _NONE + struct.pack("<Q", pairs.size) + pairs.tobytes()


def _write_flat(path: Path, head: bytes, parts: Sequence[FaissIndex]) -> None:
    numbers = sum(part.rows * part.inner.d for part in parts)
    with path.open("wb") as file:
        file.write(head + struct.pack("<Q", numbers))
        for part in parts:
            if part.rows:
                _copy(file, part.inner.get_xb(), part.rows * part.inner.d)


def _copy(file: BinaryIO, pointer: Any, size: int) -> None:
    """Write what FAISS points to, in slices that the system need not hold at once."""
    values = import_faiss().rev_swig_ptr(pointer, size)
    for first in range(0, size, _SLICE):
        file.write(np.ascontiguousarray(values[first : first + _SLICE]).data)


def _write_held(path: Path, parts: Sequence[Path], how: str) -> None:
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
    whole.write(path)
