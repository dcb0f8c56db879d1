"""The search index: FAISS, or exact search in torch where FAISS is not installed. Distances are Euclidean."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nndefense.database.exact import TorchIndex
from nndefense.errors import DatabaseError, InputError

Array = NDArray[Any]
Search = tuple[NDArray[np.float32], NDArray[np.int64]]
BACKENDS = ("auto", "faiss", "torch")
__all__ = ["BACKENDS", "FaissIndex", "Index", "TorchIndex", "faiss_available", "import_faiss"]


class Index(Protocol):
    """What the database asks of an index."""

    def search(self, queries: Array, k: int) -> Search:
        """The k nearest rows of each query: N x d -> Euclidean distances N x k, row numbers N x k, nearest first."""


class FaissIndex:
    """A FAISS index over the rows, in row order (Johnson et al. 2019)."""

    def __init__(self, index: Any) -> None:
        self.index = index

    @classmethod
    def build(cls, factory: str, dimension: int, sample: Array, rows: Iterable[Array]) -> FaissIndex:
        """Train an index on a sample and add all rows to it.

        Args:
            factory: FAISS's factory string: ``Flat`` is exact; ``IVF1024,Flat``, ``HNSW32`` and so on. Inverted
                lists are searched in a sixteenth of them, at least 8.
            dimension: d.
            sample: n x d float32 to train on; ignored by indexes that need no training.
            rows: pieces M x d of the rows, in order.

        Raises:
            InputError: a factory string that FAISS does not know, or a sample too small for it.
        """
        index = cls.empty(factory, dimension).index
        try:
            if not index.is_trained:
                index.train(np.ascontiguousarray(sample, dtype=np.float32))
            for piece in rows:
                index.add(np.ascontiguousarray(piece, dtype=np.float32))
            lists = import_faiss().try_extract_index_ivf(index)
            if lists is not None:
                # FAISS looks into a single list by default, which often holds fewer rows than K.
                lists.nprobe = min(lists.nlist, max(lists.nlist // 16, 8))
        except RuntimeError as error:
            raise _unusable(factory, error) from error
        return cls(index)

    @classmethod
    def empty(cls, factory: str, dimension: int) -> FaissIndex:
        """An index without rows, neither trained; see :meth:`build` for arguments and errors."""
        faiss = import_faiss()
        try:
            return cls(faiss.index_factory(dimension, factory, faiss.METRIC_L2))
        except RuntimeError as error:
            raise _unusable(factory, error) from error

    @classmethod
    def read(cls, path: Path) -> FaissIndex:
        """Open an index file; call it only for files whose checksum was found right."""
        faiss = import_faiss()
        try:
            return cls(faiss.read_index(str(path)))
        except RuntimeError as error:
            raise DatabaseError(f"{path} is not an index that this FAISS can read: build the database again") from error

    def write(self, path: Path) -> None:
        """Save the index to a file."""
        import_faiss().write_index(self.index, str(path))

    def search(self, queries: Array, k: int) -> Search:
        squared, rows = self.index.search(np.ascontiguousarray(queries, dtype=np.float32), k)
        # FAISS gives squared distances, and rounding can carry the smallest of them below 0.
        return np.sqrt(np.maximum(squared, 0)).astype(np.float32), rows.astype(np.int64)


def _unusable(factory: str, error: RuntimeError) -> InputError:
    # What FAISS says ends with the reason; before it stand a C++ signature and a line number.
    reason = re.sub(r"^Error in .* at \S+:\d+: ", "", str(error).strip().splitlines()[-1])
    return InputError(f"FAISS cannot build an index {factory!r} here ({reason.strip()}): name another, such as Flat")


def import_faiss() -> Any:
    """The faiss module, or an error that says how to get it."""
    try:
        import faiss
    except ImportError as error:
        raise DatabaseError(
            "FAISS is not installed: pip install faiss-gpu (Linux x86-64) or faiss-cpu, or use the torch backend"
        ) from error
    return faiss


def faiss_available() -> bool:
    """Whether FAISS can be imported."""
    try:
        import_faiss()
    except DatabaseError:
        return False
    return True
