"""Which images of a pool lie at or near images of a test set, by exact search over pixels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nndefense.database.exact_search import running_top_k
from nndefense.datasets import ImageDataset
from nndefense.datasets.base import pool_identity
from nndefense.errors import InputError
from nndefense.images import shape_text

_PIECE = 2048
_MEMORY = 1 << 30


@dataclass(frozen=True)
class Near:
    """For each of n images, the nearest reference within the threshold.

    Attributes:
        rows: int64 n, the reference's row; -1 where none is near.
        distances: float64 n, L2 in pixels of [0, 1]; infinity where none is near.
    """

    rows: Tensor
    distances: Tensor


class NearSearch:
    """Finds images that are equal or near to one of the references (Carmon et al. 2019: 2000/255 on CIFAR-10).

    Exact: every image is compared with every reference by float32 matrix products, and those that rounding could put
    on either side of the threshold are compared again in float64 and by differences.
    """

    def __init__(
        self,
        references: ImageDataset,
        eps: float | None = None,
        *,
        device: str | torch.device = "cpu",
        memory: int = _MEMORY,
    ) -> None:
        """
        Args:
            references: M images, such as a test set; their labels are not looked at.
            eps: the largest L2 distance, in pixels of [0, 1], that counts as near; 0 finds equal images only; by
                default :func:`near_threshold`.
            device: where to compare.
            memory: bytes up to which the references are kept in memory; a larger set is read again for every batch.

        Raises:
            InputError: there are no references, or eps is below 0 or not finite.
        """
        self.eps = near_threshold(references.shape) if eps is None else eps
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise InputError(f"the distance to a test image must be 0 or more, not {self.eps}")
        if not len(references):
            raise InputError(f"{references.name} has no images to keep the pool apart from: name another set or none")
        references = references.usable
        self.references, self.device = references, torch.device(device)
        dimensions = math.prod(references.shape)
        self._kept: list[tuple[int, Tensor, Tensor]] | None = None
        if len(references) * dimensions * 4 <= memory:
            self._kept = list(self._read())

    def as_dict(self) -> dict[str, object]:
        """What was searched for, as plain values."""
        return {"references": pool_identity(self.references), "l2": self.eps}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Near:
        """Search for n images n x C x H x W in [0, 1] of the references' shape.

        Raises:
            InputError: images of another shape.
        """
        if images.shape[1:] != self.references.shape:
            raise InputError(
                f"the pool's images are {shape_text(images.shape[1:])}, but those of {self.references.name} "
                f"{shape_text(self.references.shape)}: open both in one size and number of channels"
            )
        flat = images.to(self.device).flatten(1)
        squared, _ = running_top_k(flat, self._pieces(), 1)
        # What float32 can be wrong by in a sum of d products of numbers up to 1, for both vectors' lengths.
        slack = 4 * torch.finfo(torch.float32).eps * flat.shape[1] * math.sqrt(flat.shape[1])
        rows = torch.full((len(flat),), -1, dtype=torch.int64)
        distances = torch.full((len(flat),), math.inf, dtype=torch.float64)
        (close,) = torch.nonzero(squared[:, 0].double() <= self.eps**2 + slack, as_tuple=True)
        if len(close):
            queries = flat[close].double()
            doubled = ((first, piece.double(), piece.double().square().sum(1)) for first, piece, _ in self._pieces())
            nearest = running_top_k(queries, doubled, 1)[1][:, 0]
            found = self.references.batch(nearest.cpu())[0].flatten(1).to(queries)
            exact = (queries - found).norm(dim=1)
            inside = (exact <= self.eps).cpu()
            rows[close.cpu()[inside]] = nearest.cpu()[inside]
            distances[close.cpu()[inside]] = exact.cpu()[inside]
        return Near(rows, distances)

    def _pieces(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        return iter(self._kept) if self._kept is not None else self._read()

    def _read(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        for first in range(0, len(self.references), _PIECE):
            rows = np.arange(first, min(first + _PIECE, len(self.references)))
            piece = self.references.batch(rows)[0].flatten(1).to(self.device)
            yield first, piece, (piece * piece).sum(1)


def near_threshold(shape: Sequence[int]) -> float:
    """The L2 distance, in pixels of [0, 1], below which an image counts as a copy of a test image.

    Carmon et al. (2019) drop what lies within 2000 of a CIFAR-10 test image in pixels of 0 to 255, that is 2000/255
    at 3 x 32 x 32 = 3,072 dimensions; a length grows with the root of the number of dimensions, so here it is
    2000/255 * sqrt(dimensions / 3072), a root mean square of 36/255 a pixel.
    """
    return 2000 / 255 * math.sqrt(math.prod(shape) / 3072)
