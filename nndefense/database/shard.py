"""One part of a sharded index, as it lives in an actor.

Nothing here loads torch unless the torch backend is asked for: an actor that died is back within about a second.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nndefense.database.rows import StoredRows
from nndefense.errors import DatabaseError
from nndefense.files import sha256_of

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[Any]
Found = tuple[NDArray[np.float32], NDArray[np.int64]]
TORCH_BLOCK = 1 << 17
"""Rows that the torch search compares at once."""
_PIECE = 1 << 16


@dataclass(frozen=True)
class Share:
    """Which rows a part holds, and where they are.

    Attributes:
        files: path, sha256 and length in bytes of each file with such rows, in row order.
        skipped: rows of the database that stand before the first of these files.
        first: the first row.
        last: the row after the last.
        dimension: d.
    """

    files: tuple[tuple[Path, str, int], ...]
    skipped: int
    first: int
    last: int
    dimension: int


class Shard:
    """The rows of a share, to be searched exactly.

    Its methods return an error's text or None, and the answer: an error that was raised while Ray starts an actor
    would be reported as a traceback, and the actor never be started again.

    Args:
        share: the rows. Every file is compared with its sha256 before it is read.
        backend: ``faiss`` or ``torch``.
        device: where torch searches.
        threads: of one search.
    """

    def __init__(self, share: Share, *, backend: str, device: str = "cpu", threads: int = 1) -> None:
        self._share, self._backend, self._device, self._threads = share, backend, device, threads
        self._rows = share.last - share.first
        self._local = threading.local()
        self._failed: str | None = None
        try:
            for path, sha256, size in share.files:
                if not path.is_file() or path.stat().st_size != size or sha256_of(path) != sha256:
                    raise DatabaseError(f"{path} is missing or has changed since it was built: restore it")
            self._load()
        except DatabaseError as error:
            self._failed = str(error)

    def count(self) -> tuple[str | None, int]:
        """The number of rows."""
        return self._failed, self._rows

    def process(self) -> tuple[str | None, int]:
        """The process's number."""
        return None, os.getpid()

    def search(self, queries: Array, k: int) -> tuple[str | None, Found | None]:
        """The k nearest rows of this part, or all where it has fewer.

        Args:
            queries: N x d float32.
            k: at least 1.

        Returns:
            N x min(k, rows): what to sort by (FAISS: squared distances; torch: those less the query's own square), and
            row numbers of the whole database, in the order of both.
        """
        if self._failed is not None:
            return self._failed, None
        k = min(k, self._rows)
        keys, rows = self._by_faiss(queries, k) if self._backend == "faiss" else self._by_torch(queries, k)
        # A search for many neighbours may leave those of equal distance in any order.
        order = np.lexsort((rows, keys), axis=1)
        return None, (np.take_along_axis(keys, order, 1), np.take_along_axis(rows, order, 1) + self._share.first)

    def _load(self) -> None:
        if self._backend == "faiss":
            import faiss

            self._index = faiss.IndexFlatL2(self._share.dimension)
            for rows in self._pieces(_PIECE):
                self._index.add(rows)
        else:
            import torch

            held = [torch.from_numpy(rows).to(self._device) for rows in self._pieces(TORCH_BLOCK)]
            self._blocks: list[tuple[int, Tensor]] = [(TORCH_BLOCK * i, rows) for i, rows in enumerate(held)]

    def _pieces(self, size: int) -> Iterator[NDArray[np.float32]]:
        """The features of the share, in copies: files that change later do not change what was verified."""
        share = self._share
        table = StoredRows([path for path, _, _ in share.files])
        first, last = share.first - share.skipped, share.last - share.skipped
        for start in range(first, last, size):
            yield np.array(table.slice("features", start, min(start + size, last)), dtype=np.float32, order="C")

    def _by_faiss(self, queries: Array, k: int) -> Found:
        if not getattr(self._local, "ready", False):
            import faiss

            # FAISS keeps the number for each thread.
            faiss.omp_set_num_threads(self._threads)
            self._local.ready = True
        keys, rows = self._index.search(np.ascontiguousarray(queries, dtype=np.float32), k)
        return keys, rows.astype(np.int64)

    def _by_torch(self, queries: Array, k: int) -> Found:
        import torch

        from nndefense.database.exact_search import running_top_k

        torch.set_num_threads(self._threads)
        with torch.no_grad():
            wanted = torch.from_numpy(np.array(queries, dtype=np.float32)).to(self._device)
            pieces = ((first, rows, (rows * rows).sum(1)) for first, rows in self._blocks)
            keys, rows = running_top_k(wanted, pieces, k, relative=True)
        return keys.cpu().numpy(), rows.cpu().numpy()
