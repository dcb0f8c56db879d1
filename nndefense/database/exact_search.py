"""Exact nearest-neighbour search in torch: matrix products and a running top-k, on any device.

The same few functions are the search backend where FAISS is missing (:class:`TorchIndex`), the oracle that FAISS is
compared with, and what an attack on the retrieval searches with and differentiates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nndefense.errors import InputError

Array = NDArray[Any]
PIECE = 1 << 14


class TorchIndex:
    """Exact search by matrix products and a running top-k, on any device; reads the rows in pieces."""

    def __init__(
        self, rows: Callable[[int, int], Array], count: int, *, device: str = "cpu", piece: int = 1 << 17
    ) -> None:
        """``rows(first, last)`` gives rows (last - first) x d float32; ``piece`` is how many are compared at once."""
        self.rows, self.count, self.device, self.piece = rows, count, torch.device(device), piece

    @torch.no_grad()
    def search(self, queries: Array, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The k nearest rows of each query: N x d -> Euclidean distances N x k, row numbers N x k, nearest first."""
        wanted = torch.from_numpy(np.ascontiguousarray(queries, dtype=np.float32)).to(self.device)
        squared, ids = running_top_k(wanted, self._pieces(), k)
        return squared.sqrt().cpu().numpy(), ids.cpu().numpy()

    def _pieces(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        for first in range(0, self.count, self.piece):
            rows = self.rows(first, min(first + self.piece, self.count))
            piece = torch.from_numpy(np.ascontiguousarray(rows)).to(self.device)
            yield first, piece, (piece * piece).sum(1)


class ExactSearch:
    """Rows held in memory, searched exactly; a search can be confined to rows of a group, or to rows outside one.

    Attributes:
        rows: n x d, the vectors; on the device that searches.
        groups: n whole numbers, or None: what ``of`` and ``but`` compare with (an attack uses the predicted class).
    """

    def __init__(self, rows: Tensor, groups: Tensor | None = None, *, piece: int = PIECE) -> None:
        """
        Args:
            rows: n x d with n >= 1, of a floating type.
            groups: n whole numbers.
            piece: how many rows are compared at once; bounds the memory to N x piece numbers.

        Raises:
            InputError: no rows, rows that are no matrix, groups of another number, or a piece below 1.
        """
        if rows.dim() != 2 or not len(rows) or not rows.is_floating_point():
            raise InputError(f"an exact search needs float rows n x d with n >= 1, but was given {tuple(rows.shape)}")
        if groups is not None and groups.shape != rows.shape[:1]:
            raise InputError(f"{len(rows)} rows need as many groups, but {tuple(groups.shape)} were given")
        if piece < 1:
            raise InputError(f"piece is {piece}, but must be at least 1")
        self.rows, self.groups, self.piece = rows.detach(), groups, piece
        self.lengths = (self.rows * self.rows).sum(1)

    def __len__(self) -> int:
        return len(self.rows)

    @torch.no_grad()
    def search(
        self, queries: Tensor, k: int, *, of: Tensor | None = None, but: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Find the k nearest rows of each query.

        Args:
            queries: N x d.
            k: 1 to n.
            of: N groups: only rows of that group are found.
            but: N groups: only rows of other groups are found.

        Returns:
            Euclidean distances N x k, nearest first, and row numbers N x k (int64). Where a query has fewer than k
            rows to find, the rest have distance infinity and a row number that means nothing.

        Raises:
            InputError: k, or the shape of the queries, does not fit; ``of`` or ``but`` without groups.
        """
        if not 1 <= k <= len(self):
            raise InputError(f"k is {k}, but must be from 1 to the {len(self):,} rows: lower k")
        if queries.dim() != 2 or queries.shape[1] != self.rows.shape[1]:
            raise InputError(f"queries have shape {tuple(queries.shape)}, but must be N x {self.rows.shape[1]}")
        if self.groups is None and (of is not None or but is not None):
            raise InputError("a search within groups needs the group of every row: give groups")
        squared, ids = running_top_k(queries.detach(), self._pieces(), k, groups=self.groups, of=of, but=but)
        return squared.sqrt(), ids

    def _pieces(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        for first in range(0, len(self), self.piece):
            last = first + self.piece
            yield first, self.rows[first:last], self.lengths[first:last]


def running_top_k(
    queries: Tensor,
    pieces: Iterable[tuple[int, Tensor, Tensor]],
    k: int,
    *,
    groups: Tensor | None = None,
    of: Tensor | None = None,
    but: Tensor | None = None,
    relative: bool = False,
) -> tuple[Tensor, Tensor]:
    """The k nearest rows over all pieces, keeping no more than k of them for each query.

    Args:
        queries: N x d.
        pieces: (number of the first row, rows M x d, their squared lengths M).
        k: at least 1; at most the number of rows is returned.
        groups, of, but: as for :meth:`ExactSearch.search`.
        relative: leave out the queries' own squared lengths, as is needed to merge several results without rounding.

    Returns:
        Squared distances N x k, at least 0 (unless relative), nearest first, and row numbers N x k.
    """
    best = queries.new_full((len(queries), 0), torch.inf)
    ids = torch.zeros((len(queries), 0), dtype=torch.int64, device=queries.device)
    for first, rows, lengths in pieces:
        # ||q - r||^2 less ||q||^2, which does not change the order.
        squared = torch.addmm(lengths[None], queries, rows.T, alpha=-2)
        if groups is not None:
            here = groups[first : first + len(rows)][None]
            if of is not None:
                squared.masked_fill_(here != of[:, None], torch.inf)
            if but is not None:
                squared.masked_fill_(here == but[:, None], torch.inf)
        near, position = squared.topk(min(k, len(rows)), dim=1, largest=False)
        best, ids = torch.cat([best, near], 1), torch.cat([ids, position + first], 1)
        best, order = best.topk(min(k, best.shape[1]), dim=1, largest=False)
        ids = ids.gather(1, order)
    if relative:
        return best, ids
    return (best + (queries * queries).sum(1, keepdim=True)).clamp_min(0), ids


def squared_distances(queries: Tensor, vectors: Tensor) -> Tensor:
    """Differentiable squared distances of each query to rows of its own: N x d, N x m x d -> N x m.

    By differences, not by products of lengths, so that a distance of 0 is 0 and its gradient is right beside it.
    """
    return (queries.unsqueeze(1) - vectors).square().sum(2)
