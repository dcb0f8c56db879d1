"""Whatever a caller gives as images, as batches of tensors; one batch is in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from os import PathLike
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from nndefense.datasets import ImageDataset, load_image
from nndefense.datasets.image_files import convert, to_tensor
from nndefense.errors import DataError, InputError
from nndefense.images import check_images, shape_text

Shape = tuple[int, int, int]


def batches(images: Any, shape: Shape, size: int) -> Iterator[Tensor]:
    """Yield the images as float32 tensors of at most ``size`` x C x H x W in [0, 1], on the CPU.

    Args:
        images: one image or any number of them: a path, a Pillow image, a uint8 array H x W x C or H x W, a tensor
            C x H x W in [0, 1]; a tensor N x C x H x W, a uint8 array N x H x W x C, a data set, or anything else that
            can be gone through and gives images, of mixed kinds too.
        shape: C, H, W of the classifier. Paths, Pillow images and arrays are turned into it, as data sets turn theirs:
            to grey or colour, cut to the aspect ratio around the centre, resized. Tensors and data sets must have it.
        size: at least 1.

    Raises:
        InputError: what is given is no image, or not clearly one; a tensor of another shape, type or range.
        DataError: a file that is missing or damaged.
    """
    if size < 1:
        raise InputError(f"the batch size must be at least 1, not {size}")
    if isinstance(images, ImageDataset):
        for batch, _, _ in images.batches(size):
            yield _checked(batch, shape, images.name)
        return
    if isinstance(images, Tensor) and images.dim() == 4:
        for batch in torch.split(_shaped(images, shape, "images"), size) if len(images) else ():
            yield _checked(batch, shape, "images")
        return
    waiting: list[Tensor] = []
    for image in _one_by_one(images, shape):
        waiting.append(image)
        if len(waiting) == size:
            yield torch.stack(waiting)
            waiting = []
    if waiting:
        yield torch.stack(waiting)


def _one_by_one(images: Any, shape: Shape) -> Iterator[Tensor]:
    alone = isinstance(images, (str, PathLike, Image.Image, Tensor)) or (
        isinstance(images, np.ndarray) and images.ndim != 4
    )
    if alone:
        yield _tensor(images, shape, "the image")
    elif isinstance(images, Iterable) and not isinstance(images, (bytes, bytearray, dict)):
        for number, image in enumerate(images):
            yield _tensor(image, shape, f"image {number}")
    else:
        raise InputError(f"{type(images).__name__} is no image: give a path, a Pillow image, a uint8 array or a tensor")


def _tensor(image: Any, shape: Shape, name: str) -> Tensor:
    """One image as a tensor C x H x W."""
    if isinstance(image, (str, PathLike)):
        return load_image(image, channels=shape[0], size=shape[1:])
    if isinstance(image, Tensor):
        return _checked(_shaped(image[None], shape, name), shape, name)[0]
    if isinstance(image, np.ndarray):
        image = _from_array(image, name)
    if not isinstance(image, Image.Image):
        raise InputError(
            f"{name} is {type(image).__name__}, but must be a path, a Pillow image, a uint8 array H x W x C or a "
            "tensor C x H x W"
        )
    try:
        # Upright in a copy, since the caller's image must stay as it is.
        return to_tensor(convert(name, ImageOps.exif_transpose(image), shape[0], shape[1:]))
    except DataError:
        raise
    except Exception as error:
        # Pillow decodes when the pixels are asked for, and its decoders raise nearly anything on damaged files.
        raise DataError(f"{name} cannot be read ({' '.join(str(error).split())}): repair or replace it") from error


def _from_array(array: NDArray[Any], name: str) -> Image.Image:
    if array.dtype != np.uint8:
        raise InputError(
            f"{name} is an array of {array.dtype}, whose range is not known: give uint8 from 0 to 255, or a float "
            "tensor C x H x W in [0, 1]"
        )
    if array.ndim not in (2, 3) or array.size == 0:
        raise InputError(f"{name} is an array {shape_text(array.shape)}, but must be H x W x C or, if grey, H x W")
    if array.ndim == 3:
        first, last = (side in (1, 3, 4) for side in (array.shape[0], array.shape[2]))
        if not last or first:
            what = "may be H x W x C or C x H x W" if last else "is not H x W x C with 1, 3 or 4 channels"
            hint = "give a Pillow image" if last else "use array.transpose(1, 2, 0) if it is C x H x W"
            raise InputError(f"{name} is an array {shape_text(array.shape)}, which {what}: {hint}")
        if array.shape[2] == 1:
            array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(array))


def _shaped(images: Tensor, shape: Shape, name: str) -> Tensor:
    if images.dim() != 4 or tuple(images.shape[1:]) != shape:
        raise InputError(
            f"{name}: a tensor {shape_text(images.shape[1:])} was given, but the classifier takes {shape_text(shape)}; "
            "resize it, or give paths, Pillow images or uint8 arrays, which are resized"
        )
    return images


def _checked(images: Tensor, shape: Shape, name: str) -> Tensor:
    images = _shaped(images, shape, name).detach().cpu()
    check_images(images, name=name)
    return images.float().contiguous()
