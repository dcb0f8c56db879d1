"""Data sets whose images lie in memory as 8-bit or float arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from nndefense.datasets.base import ImageDataset, update_with_strings
from nndefense.datasets.ids import NumberedIds
from nndefense.errors import DataError, InputError
from nndefense.images import check_images, shape_text


class ArrayDataset(ImageDataset):
    """Images in memory.

    Args:
        images: uint8 N x H x W x C in 0..255, kept as bytes and converted batch by batch;
            or float32 N x C x H x W in [0, 1].
        labels: N class numbers, -1 where unknown.
        classes: the names of the classes.
        ids: N ids; left out, ``<name>/00000`` and so on.

    Raises:
        DataError: shapes, types or ranges do not fit.
    """

    def __init__(
        self,
        images: NDArray[np.uint8] | NDArray[np.float32],
        labels: ArrayLike,
        *,
        name: str,
        classes: Sequence[str],
        ids: Sequence[str] | None = None,
    ) -> None:
        self._images = images
        shape = image_shape(images.shape, images.dtype, name)
        super().__init__(
            name=name,
            classes=classes,
            shape=shape,
            ids=ids if ids is not None else NumberedIds(name, len(images)),
            labels=labels,
        )
        if images.dtype == np.float32:
            try:
                check_images(torch.from_numpy(images), name=f"the images of {name}")
            except InputError as error:
                raise DataError(str(error)) from error

    def _read(self, rows: NDArray[np.int64]) -> Tensor:
        return to_float(self._images[rows])

    def _digest(self) -> str:
        digest = hashlib.sha256(f"array {self._images.shape} {self._images.dtype.name}\n".encode())
        digest.update(np.ascontiguousarray(self._images).data)
        digest.update(self.labels.astype("<i8").tobytes())
        update_with_strings(digest, self.classes)
        return digest.hexdigest()


def image_shape(shape: tuple[int, ...], dtype: np.dtype[np.generic], name: str) -> tuple[int, int, int]:
    """Return C, H, W of stored images: uint8 N x H x W x C or float32 N x C x H x W, with 1 or 3 channels.

    Raises:
        DataError: the images have another form; ``name`` says whose.
    """
    forms = {"uint8": ("N x H x W x C", 3), "float32": ("N x C x H x W", 1)}
    if dtype.name not in forms:
        raise DataError(
            f"{name} has images of type {dtype.name}: store them as uint8 N x H x W x C, "
            "or as float32 N x C x H x W in [0, 1]"
        )
    layout, channel_axis = forms[dtype.name]
    if len(shape) != 4 or shape[channel_axis] not in (1, 3) or 0 in shape[1:]:
        raise DataError(
            f"{name} has {dtype.name} images of shape {shape_text(shape)}: store them as {layout} with C = 1 or 3"
        )
    sides = shape[1:4]
    return (sides[2], sides[0], sides[1]) if channel_axis == 3 else (sides[0], sides[1], sides[2])


def to_float(stored: NDArray[np.uint8] | NDArray[np.float32]) -> Tensor:
    """Turn uint8 n x H x W x C or float32 n x C x H x W into a float32 tensor n x C x H x W in [0, 1]."""
    if stored.dtype == np.float32:
        return torch.from_numpy(stored)
    # By numpy: in a thread of a reader's, torch would begin a team of threads of its own.
    return torch.from_numpy(np.divide(stored.transpose(0, 3, 1, 2), np.float32(255), order="C"))
