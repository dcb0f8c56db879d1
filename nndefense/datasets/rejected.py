"""Images that cannot be used, told apart from sources that cannot be read."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nndefense.datasets.ids import RowNumbers
from nndefense.errors import DataError

OTHER_SIZE = "other size"
BRING = "give a size that all images are brought to (--size)"

REJECTED_KINDS = (
    "empty",
    "damaged",
    "not an image",
    "too large",
    "unreadable",
    "missing",
    OTHER_SIZE,
    "out of range",
)
"""What can be wrong with an image, for counting."""


class BadImage(DataError):
    """One image that cannot be used, whatever becomes of the others.

    Attributes:
        kind: one of :data:`REJECTED_KINDS`.
        reason: what is wrong, without the name of the image.
    """

    def __init__(self, message: str, kind: str, reason: str) -> None:
        super().__init__(message)
        self.kind, self.reason = kind, reason

    def __reduce__(self) -> tuple[type[BadImage], tuple[str, str, str]]:
        # Errors travel between processes, and an exception is otherwise made anew from its message alone.
        return BadImage, (str(self), self.kind, self.reason)


class SourceError(DataError):
    """The source itself cannot be read: a folder that vanished, a network that is down, no memory or files left.

    It says nothing about the images, so it is never turned into rejected ones.
    """


@dataclass(frozen=True)
class Rejected:
    """An image that was left out: its row in the data set, its id, one of :data:`REJECTED_KINDS`, and the reason."""

    row: int
    id: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Reading:
    """What :meth:`~nndefense.datasets.ImageDataset.read_each` found: the good images, and those left out.

    Attributes:
        rows: int64 n, the row of each image that was read, in the order asked for.
        images: float32 n x C x H x W in [0, 1].
        labels: int64 n, -1 where unknown.
        ids: n ids.
        rejected: the images that cannot be used, in the order asked for.
    """

    rows: RowNumbers
    images: Tensor
    labels: Tensor
    ids: list[str]
    rejected: tuple[Rejected, ...]
