"""Images that cannot be used, told apart from sources that cannot be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from nndefense.datasets.ids import RowNumbers
from nndefense.errors import DataError

# Bad images that a warning names; it counts the others.
_NAMED = 5
OTHER_SIZE = "other size"
NOT_FINITE = "not finite"
BRING = "give a size that all images are brought to (--size)"

#: The words for what is wrong with an image that is left out.
REJECTED_KINDS = (
    "empty",
    "damaged",
    "not an image",
    "too large",
    "unreadable",
    "missing",
    OTHER_SIZE,
    "out of range",
    NOT_FINITE,
)
"""What can be wrong with an image, for counting."""


class BadImage(DataError):
    """One image that cannot be used, whatever becomes of the others; ``message`` names it.

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


def left_out(bad: Sequence[Rejected], images: int, name: str) -> str:
    """Say which of a data set's images are left out, for a warning; raises :class:`DataError` where all are."""
    named = "; ".join(f"{item.id}: {item.reason}" for item in bad[:_NAMED])
    if len(bad) == images:
        raise DataError(f"none of the {images:,} images of {name} can be used: {named}")
    more = f"; and {len(bad) - _NAMED:,} more" if len(bad) > _NAMED else ""
    return f"{len(bad):,} of the {images:,} images of {name} cannot be used and are left out: {named}{more}"
