"""An index of codes whose candidates are put in order by the rows themselves.

A code of 64 bytes for 256 numbers finds the neighbourhood and loses who in it is nearest. The rows are on disk anyway:
a search asks the codes for ``rerank`` times as many, reads these rows, and gives the nearest by their true distances.
Jegou et al. (2011), "Searching in one billion vectors: re-rank with source coding", read finer codes for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nndefense.database.index import FaissIndex, Search
from nndefense.errors import InputError

Array = NDArray[Any]
RERANK = "rerank"
MOST_RERANKED = 32
# Numbers of candidates' vectors that are held at once.
_HELD = 1 << 24


def set_as_stored(
    index: FaissIndex, stored: Mapping[str, Any], rows: Callable[[NDArray[np.int64]], Array]
) -> FaissIndex:
    """The index, searched in the way that was found to give the recall that was asked for.

    Args:
        index: as it was read.
        stored: what the manifest says of it.
        rows: as for :class:`RerankedIndex`.
    """
    setting = stored.get("search", {}).get("setting", {})
    made = RerankedIndex(index.index, rows) if RERANK in setting else index
    made.set_search(setting)
    return made


class RerankedIndex(FaissIndex):
    """A FAISS index that reads the rows which it finds.

    Args:
        index: FAISS's index.
        rows: gives the vectors of row numbers of any shape: ``numbers.shape`` x d.
    """

    def __init__(self, index: Any, rows: Callable[[NDArray[np.int64]], Array]) -> None:
        super().__init__(index)
        self._read, self._rerank = rows, 1

    @property
    def parameters(self) -> dict[str, int]:
        """As :attr:`FaissIndex.parameters`, and ``rerank``: candidates for each row that is wanted; 1: codes decide."""
        return {**super().parameters, RERANK: self._rerank}

    def set_search(self, parameters: Mapping[str, int]) -> None:
        """As :meth:`FaissIndex.set_search`, and ``rerank``, from 1 to 32."""
        value = parameters.get(RERANK, self._rerank)
        if not (isinstance(value, int) and 1 <= value <= MOST_RERANKED):
            raise InputError(f"{RERANK} is {value!r}, but must be a whole number from 1 to {MOST_RERANKED}")
        super().set_search({name: one for name, one in parameters.items() if name != RERANK})
        self._rerank = value

    def search(self, queries: Array, k: int) -> Search:
        """The k nearest of ``rerank`` x k candidates, at their true distances; see :meth:`FaissIndex.search`."""
        if self._rerank == 1:
            return super().search(queries, k)
        count = min(k * self._rerank, self.rows)
        found = super().search(queries, count)[1]
        asked = np.asarray(queries, dtype=np.float32)
        distances, rows = np.empty((len(asked), k), np.float32), np.empty((len(asked), k), np.int64)
        step = max(_HELD // (count * self.dimension), 1)
        for first in range(0, len(asked), step):
            part = slice(first, first + step)
            numbers = found[part]
            apart = self._read(np.maximum(numbers, 0)) - asked[part, None]
            exact = np.sqrt(np.einsum("ncd,ncd->nc", apart, apart))
            exact[numbers < 0] = np.inf
            order = np.argsort(exact, axis=1, kind="stable")[:, :k]
            distances[part] = np.take_along_axis(exact, order, 1)
            rows[part] = np.take_along_axis(numbers, order, 1)
        return distances, rows
