"""Training an index: what can be learnt from a sample of the rows, before any row is in it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nndefense.database.faiss_tools import import_faiss, is_graph, threads, transforms, unusable
from nndefense.database.gpu import check_device, on_device
from nndefense.database.index import FaissIndex
from nndefense.errors import InputError

Array = NDArray[Any]
ROWS_PER_LIST = 50
"""Rows of the sample for each inverted list; FAISS calls fewer than 39 too few."""
_CODE_ROWS = 1 << 16
_SEED = 1234


def check_factory(factory: str, dimension: int) -> bool:
    """Whether parts of an index of this kind can be merged.

    Args:
        factory: FAISS's factory string.
        dimension: d.

    Raises:
        InputError: a factory string that FAISS does not know, or that does not fit the dimension.
        DatabaseError: FAISS is not installed.
    """
    return FaissIndex.empty(factory, dimension).mergeable


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
        device: where the centres of inverted lists are computed; see :func:`~nndefense.database.gpu.check_device`.
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
