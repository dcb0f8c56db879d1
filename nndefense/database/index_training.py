"""Before any row is in an index: choosing its kind, and training it on a sample of the rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nndefense.database.faiss_tools import (
    check_device,
    import_faiss,
    is_graph,
    on_device,
    threads,
    transforms,
    unusable,
)
from nndefense.database.index import FaissIndex
from nndefense.errors import InputError

Array = NDArray[Any]
ROWS_PER_LIST = 50
"""Rows of the sample for each inverted list; FAISS calls fewer than 39 too few."""
_CODE_ROWS = 1 << 16
_SEED = 1234
EXACT_ROWS = 50_000
"""Up to here every search is exact."""
_MOST_FLAT_LISTS = 1 << 14
_MOST_LISTS = 1 << 20
_LINK_BYTES = 4


def check_factory(factory: str, dimension: int) -> bool:
    """Whether parts of an index of this kind can be merged.

    Args:
        factory: FAISS's factory string.
        dimension: d.

    Raises:
        InputError: a factory string that FAISS does not know, or that does not fit the dimension.
        DatabaseError: FAISS is not installed.
    """
    return bool(FaissIndex.empty(factory, dimension).merges)


def training_rows(factory: str, dimension: int, rows: int) -> int:
    """How many of ``rows`` rows an index should be trained on: 0 where it learns nothing, else at most all of them.

    Raises:
        InputError: as for :func:`check_factory`.
    """
    empty = FaissIndex.empty(factory, dimension)
    if empty.index.is_trained:
        return 0
    inner = empty.inner
    coded = any(hasattr(inner, name) for name in ("pq", "sq")) or not hasattr(inner, "nlist")
    wanted = max(ROWS_PER_LIST * int(getattr(inner, "nlist", 0)), _CODE_ROWS if coded else 0)
    return min(rows, wanted)


def sample_rows(rows: int, size: int, seed: int = 0) -> NDArray[np.int64]:
    """``size`` of the row numbers 0 to ``rows`` - 1 without repetition, ascending; the same for the same seed."""
    chance = np.random.default_rng(seed)
    return np.sort(chance.choice(rows, size=min(size, rows), replace=False, shuffle=False)).astype(np.int64)


def train_index(factory: str, dimension: int, sample: Array, *, device: str = "cpu", seed: int = 0) -> FaissIndex:
    """An index that has learnt all it needs and holds no rows yet.

    The same sample, seed and number of threads give the same index on a CPU.

    Args:
        factory: FAISS's factory string; see :func:`build_index`.
        dimension: d.
        sample: n x d to learn from, as many as :func:`training_rows` says; ignored by kinds that learn nothing.
        device: where inverted lists' centres are computed; see :func:`~nndefense.database.faiss_tools.check_device`.
        seed: draws the first centres.

    Raises:
        InputError: a factory string that FAISS does not know, a sample too small for it or of another dimension, or a
            GPU that is not there.
    """
    check_device(device)
    made = FaissIndex.empty(factory, dimension)
    if not made.index.is_trained:
        rows = np.ascontiguousarray(sample, dtype=np.float32)
        if rows.ndim != 2 or rows.shape[1] != dimension:
            raise InputError(f"the index is trained on rows n x {dimension}, but was given {rows.shape}")
        try:
            _train(made, rows, device, seed)
        except RuntimeError as error:
            raise unusable(factory, error) from error
    if "nprobe" in made.parameters:
        # FAISS looks into a single list by default, which often holds fewer rows than K.
        lists = int(made.inner.nlist)
        made.set_search({"nprobe": min(lists, max(lists // 16, 8))})
    return made


def build_index(factory: str, dimension: int, sample: Array, rows: Iterable[Array]) -> FaissIndex:
    """Train an index on a sample and add all rows to it.

    Args:
        factory: FAISS's factory string: ``Flat`` is exact; ``IVF1024,Flat``, ``HNSW32`` and so on. Inverted lists are
            searched in a sixteenth of them, at least 8, until :meth:`FaissIndex.set_search` says otherwise.
        dimension: d.
        sample: n x d float32 to train on; ignored by indexes that need no training.
        rows: pieces M x d of the rows, in order.

    Raises:
        InputError: a factory string that FAISS does not know, or a sample too small for it.
    """
    made = train_index(factory, dimension, sample)
    for piece in rows:
        made.add(piece)
    return made


def _train(made: FaissIndex, rows: NDArray[np.float32], device: str, seed: int) -> None:
    inner, changed = made.inner, rows
    for kind in ("cp", "pq"):
        parameters = getattr(inner, kind, None)
        parameters = getattr(parameters, "cp", parameters)
        if parameters is not None:
            parameters.seed = _SEED + seed
            # A small sample is the caller's choice.
            parameters.min_points_per_centroid = 1
    for transform in transforms(made.index):
        if not transform.is_trained:
            transform.train(changed)
        changed = transform.apply(changed)
    if hasattr(inner, "quantizer"):
        _find_centres(inner, changed, device)
    made.index.train(rows)


def _find_centres(inner: Any, rows: NDArray[np.float32], device: str) -> None:
    """Give an inverted-file index its centres; kinds that find them in another way are left to FAISS."""
    faiss = import_faiss()
    coarse = faiss.downcast_index(inner.quantizer)
    if not (isinstance(coarse, faiss.IndexFlat) or is_graph(coarse)):
        return
    # A search among all centres, also where a graph will stand for it, and on the GPU where there is one.
    search = faiss.IndexFlatL2(inner.d)
    clustering = faiss.Clustering(inner.d, inner.nlist, inner.cp)
    clustering.train(rows, on_device(search, device))
    centres = faiss.vector_to_array(clustering.centroids).reshape(inner.nlist, inner.d)
    # With several threads the graph would be another one every time.
    with threads(1 if is_graph(coarse) else None):
        coarse.add(centres)


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
