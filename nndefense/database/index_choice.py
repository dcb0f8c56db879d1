"""Choosing the kind of an index from the number of rows, their dimension, and the memory there is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nndefense.database.index import FaissIndex
from nndefense.errors import InputError

EXACT_ROWS = 50_000
"""Up to here every search is exact."""
_MOST_FLAT_LISTS = 1 << 14
_MOST_LISTS = 1 << 20
_LINK_BYTES = 4


@dataclass(frozen=True)
class IndexChoice:
    """A kind of index.

    Attributes:
        factory: FAISS's factory string.
        why: the reason, in one sentence.
        bytes: about how large the index will be.
    """

    factory: str
    why: str
    bytes: int


def choose_index(rows: int, dimension: int, *, memory: int | None = None, gpu: bool = False) -> IndexChoice:
    """Choose the kind of index that ``auto`` means.

    Few rows are searched exactly. More go into inverted lists, about four times the root of their number, so that
    choosing the lists and reading them cost about the same. The vectors stay float32 where that fits into the memory,
    so that distances are exact; else they become float16, then bytes, then product-quantised codes of d/4, d/8, ...
    bytes after a rotation (OPQ), the first that fits.

    Args:
        rows: how many there will be, at least 1.
        dimension: d, at least 1.
        memory: bytes that the index may take; None: as many as it likes.
        gpu: whether a GPU will train it; there may then be more lists.

    Raises:
        InputError: numbers below 1.
    """
    if rows < 1 or dimension < 1 or (memory is not None and memory < 1):
        raise InputError("an index is chosen for at least 1 row, 1 dimension and 1 byte of memory")
    flat = index_bytes("Flat", rows, dimension)
    if rows <= EXACT_ROWS and (memory is None or flat <= memory):
        return IndexChoice("Flat", f"{rows:,} rows are few enough for an exact search", flat)
    lists = _lists(rows, gpu)
    coarse = f"IVF{lists}" if lists <= _MOST_FLAT_LISTS else f"IVF{lists}_HNSW32"
    kinds = [
        (f"{coarse},Flat", "exact distances (float32)"),
        (f"{coarse},SQfp16", "half the bytes (float16)"),
        (f"{coarse},SQ8", "a byte per dimension"),
    ]
    for share in (4, 8, 16, 32):
        if dimension % share == 0:
            codes = dimension // share
            kinds.append((f"OPQ{codes}_{dimension},{coarse},PQ{codes}", f"{codes} bytes a row, at a loss of recall"))
    budget = "no limit of memory" if memory is None else f"{_size(memory)} of memory"
    for factory, what in kinds:
        size = index_bytes(factory, rows, dimension)
        if memory is None or size <= memory:
            why = f"{rows:,} rows of {dimension} dimensions and {budget}: {lists:,} inverted lists, {what}"
            return IndexChoice(factory, f"{why}, {_size(size)}", size)
    factory, what = kinds[-1]
    size = index_bytes(factory, rows, dimension)
    return IndexChoice(
        factory,
        f"no kind fits {rows:,} rows of {dimension} dimensions into {budget}: the smallest, {what}, takes "
        f"{_size(size)}, which a search maps from the disk",
        size,
    )


def index_bytes(factory: str, rows: int, dimension: int) -> int:
    """About how large an index of so many rows will be, on disk as in memory.

    Raises:
        InputError: a factory string that FAISS does not know.
    """
    made = FaissIndex.empty(factory, dimension)
    inner = made.inner
    if hasattr(inner, "nlist"):
        # A row's number beside its code; and the centres.
        return int(rows * (_code_size(inner) + 8) + inner.nlist * 4 * inner.d)
    if hasattr(inner, "hnsw"):
        return int(rows * (_code_size(inner.storage) + _LINK_BYTES * 2 * inner.hnsw.nb_neighbors(1)))
    return int(rows * _code_size(inner))


def _code_size(inner: object) -> int:
    return int(getattr(inner, "code_size", 0)) or int(inner.sa_code_size())  # type: ignore[attr-defined]


def _lists(rows: int, gpu: bool) -> int:
    """A power of two near 4 times the root of the rows, or 16 times with a GPU, that leaves 39 rows to a list."""
    wanted = (16 if gpu else 4) * math.sqrt(rows)
    lists = 1 << round(math.log2(max(wanted, 1)))
    while lists > 1 and lists * 39 > rows:
        lists //= 2
    return min(lists, _MOST_LISTS)


def _size(count: int) -> str:
    for unit, step in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= step:
            return f"{count / step:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"
