"""Data sets made of others: in another size or number of channels, and one after another as one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from nndefense.datasets.base import ImageDataset, update_with_strings
from nndefense.datasets.ids import JoinedIds, RowNumbers
from nndefense.datasets.pixels import Digests, pixel_digests
from nndefense.datasets.rejected import BadImage
from nndefense.errors import DataError, InputError, plain
from nndefense.images import shape_text

Sides = tuple[int, int]
"""Height and width."""
Size = int | Sides

# ITU-R BT.601, the weights that Pillow uses too.
_LUMA = (0.299, 0.587, 0.114)


def check_form(size: Size | None, channels: int | None) -> tuple[int, int] | None:
    """Check the size (one side, or height and width) and channels that a caller asks for; return H, W."""
    if channels not in (None, 1, 3):
        raise InputError(f"channels must be 1 (grey) or 3 (colour), not {channels}")
    if size is None:
        return None
    size = plain(size)
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or min(sides) < 1:
        raise InputError(f"the image size must be one side or height and width, at least 1 pixel, not {size}")
    return int(sides[0]), int(sides[1])


def crop_box(height: int, width: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return top, left, height, width of the largest centred part that has the aspect ratio of ``size`` (H, W)."""
    scale = min(height / size[0], width / size[1])
    crop_height = min(height, max(1, round(size[0] * scale)))
    crop_width = min(width, max(1, round(size[1] * scale)))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Crop n x C x H x W images to the aspect ratio of ``size`` and resize them (bilinear, antialiased)."""
    top, left, height, width = crop_box(images.shape[-2], images.shape[-1], size)
    images = images[..., top : top + height, left : left + width]
    if (height, width) != size:
        images = functional.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
    # The weights of an interpolation add up to 1 only within rounding.
    return images.clamp(0, 1)


class TransformedDataset(ImageDataset):
    """A data set, ``parent``, in another size, in grey (luma) or in three channels (the grey one repeated).

    Where the aspect ratio changes, the centre is kept. Raises DataError for images that are neither grey nor RGB.
    """

    def __init__(self, parent: ImageDataset, *, size: tuple[int, int], channels: int) -> None:
        if channels != parent.shape[0] and (parent.shape[0], channels) not in ((1, 3), (3, 1)):
            raise DataError(f"{parent.name} has images of {parent.shape[0]} channels, which cannot become {channels}")
        self.parent = parent
        super().__init__(
            name=parent.name, classes=parent.classes, shape=(channels, *size), ids=parent.ids, labels=parent.labels
        )

    def _read(self, rows: RowNumbers) -> Tensor:
        return self._formed(self.parent._read(rows))

    def read_into(self, rows: RowNumbers, images: Tensor, digests: Digests | None = None) -> dict[int, BadImage]:
        """As for every data set: see :meth:`ImageDataset.read_into`."""
        read = torch.empty((len(rows), *self.parent.shape))
        wrong = self.parent.read_into(rows, read)
        images[:] = self._formed(read)
        if digests is not None:
            digests[:] = pixel_digests(images)
        return wrong

    def _formed(self, images: Tensor) -> Tensor:
        channels, height, width = self.shape
        if channels == 1 and images.shape[1] == 3:
            weights = torch.tensor(_LUMA).view(1, 3, 1, 1)
            images = (images * weights).sum(dim=1, keepdim=True).clamp_(0, 1)
        if images.shape[-2:] != (height, width):
            images = resize(images, (height, width))
        if channels == 3 and images.shape[1] == 1:
            images = images.repeat(1, 3, 1, 1)
        return images

    def _digest(self) -> str:
        return hashlib.sha256(f"transformed {self.parent.fingerprint} {self.shape}\n".encode()).hexdigest()


def in_form(dataset: ImageDataset, size: Sides | None, channels: int | None) -> ImageDataset:
    """Return ``dataset`` in the size (H, W) and channels asked for: itself where it already has them."""
    wanted = (channels or dataset.shape[0], *(size or dataset.shape[1:]))
    if wanted == dataset.shape:
        return dataset
    return TransformedDataset(dataset, size=wanted[1:], channels=wanted[0])


class ConcatenatedDataset(ImageDataset):
    """Several data sets one after another; made by :func:`concatenate`."""

    def __init__(self, parts: Sequence[ImageDataset], *, name: str) -> None:
        self.parts = tuple(parts)
        classes = tuple(dict.fromkeys(label for part in self.parts for label in part.classes))
        numbers = {label: number for number, label in enumerate(classes)}
        self._starts = np.cumsum([0, *map(len, self.parts)], dtype=np.int64)
        labels = []
        for part in self.parts:
            # One entry more than classes: label -1 (unknown) picks the last one, which is -1 again.
            renumber = np.array([*(numbers[label] for label in part.classes), -1], dtype=np.int64)
            labels.append(renumber[part.labels])
        super().__init__(
            name=name,
            classes=classes,
            shape=self.parts[0].shape,
            ids=JoinedIds([part.ids for part in self.parts]),
            labels=np.concatenate(labels),
        )

    def _read(self, rows: RowNumbers) -> Tensor:
        images = torch.empty((len(rows), *self.shape))
        for part, places, inner in self._by_part(rows):
            images[torch.from_numpy(places)] = part._read(inner)
        return images

    def read_into(self, rows: RowNumbers, images: Tensor, digests: Digests | None = None) -> dict[int, BadImage]:
        """As for every data set: see :meth:`ImageDataset.read_into`."""
        wrong: dict[int, BadImage] = {}
        for part, places, inner in self._by_part(rows):
            read = torch.empty((len(inner), *self.shape))
            hashed = None if digests is None else np.empty((len(inner), digests.shape[1]), dtype=np.uint8)
            found = part.read_into(inner, read, hashed)
            images[torch.from_numpy(places)] = read
            if digests is not None and hashed is not None:
                digests[places] = hashed
            wrong.update({int(places[place]): error for place, error in found.items()})
        return wrong

    def _by_part(self, rows: RowNumbers) -> Iterator[tuple[ImageDataset, NDArray[np.int64], NDArray[np.int64]]]:
        """For each part that has some of the rows: the part, their places in ``rows``, and their rows in the part."""
        owners = np.searchsorted(self._starts, rows, side="right") - 1
        for owner in np.unique(owners).tolist():
            places = np.flatnonzero(owners == owner)
            yield self.parts[owner], places, rows[places] - self._starts[owner]

    def _digest(self) -> str:
        digest = hashlib.sha256(b"concatenation\n")
        update_with_strings(digest, [part.fingerprint for part in self.parts])
        update_with_strings(digest, self.classes)
        return digest.hexdigest()


def concatenate(datasets: Sequence[ImageDataset], name: str | None = None) -> ImageDataset:
    """Join data sets of one image shape. Classes are the union by name, in order of first appearance.

    Ids are kept as they are; where two items have the same id, :meth:`ImageDataset.index_of` gives the first.

    Raises:
        InputError: ``datasets`` is empty.
        DataError: the data sets have images of different shapes.
    """
    if not datasets:
        raise InputError("give at least one data set to concatenate")
    first = datasets[0]
    if len(datasets) == 1 and name is None:
        return first
    for other in datasets[1:]:
        if other.shape != first.shape:
            raise DataError(
                f"{other.name} has images {shape_text(other.shape)}, but {first.name} {shape_text(first.shape)}: "
                "open both with the same size and channels"
            )
    return ConcatenatedDataset(datasets, name=name or " + ".join(dataset.name for dataset in datasets))
