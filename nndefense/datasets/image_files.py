"""Reading single image files with Pillow into [0, 1] tensors.

Every file gives the picture as a viewer shows it: turned by its EXIF orientation, transparent parts on white, 16-bit
grey scaled by 65535 (Pillow's own conversion would clip it), CMYK turned into RGB without a colour profile, 16-bit
colour read with 8 bits. Of an animation, or a file of several pages, the first. The content tells the format, never the
suffix. What cannot be shown whole is refused: a picture that is cut short is no picture.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from nndefense.datasets.derived import Sides, Size, check_form, crop_box
from nndefense.datasets.pixels import Pixels
from nndefense.datasets.rejected import BadImage, SourceError
from nndefense.files import open_regular

# Only these decoders: Pillow has others that start helper programs, and a file's suffix proves nothing.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")

FilePath = str | os.PathLike[str]
_BAND = 1 << 20
_GREY_MODES = ("1", "L", "LA", "La", "F", "I")


def load_image(path: FilePath, *, channels: int = 3, size: Size | None = None) -> Tensor:
    """Read one image file.

    Args:
        path: the file.
        channels: 3 for RGB, 1 for grey (ITU-R BT.601 luma).
        size: one side, or (height, width): the centre is cropped to that aspect ratio and resized (bilinear,
            antialiased), which is the same as resizing the short side and cropping the centre. None keeps the size.

    Returns:
        float32 tensor C x H x W in [0, 1].

    Raises:
        DataError: the file is missing, damaged, or no image of a known format.
        InputError: ``size`` or ``channels`` is out of range.
    """
    return to_tensor(decode(path, channels, check_form(size, channels)))


def image_channels(path: FilePath) -> int:
    """Return 1 if the image file at ``path`` is grey (with or without transparency), else 3.

    Raises:
        DataError: the file is missing, or no image of a known format.
    """
    try:
        with open_regular(path) as file, Image.open(file, formats=FORMATS) as image:
            return 1 if image.mode in _GREY_MODES or image.mode.startswith("I;16") else 3
    except Exception as error:
        raise _unreadable(path, error) from error


def decode(path: FilePath, channels: int, size: Sides | None, data: bytes | None = None) -> Pixels:
    """Read an image file as an array H x W x C: uint8 in 0..255, or float32 in [0, 1] from more than 8 bits.

    ``size`` is H, W; the rest is as in :func:`load_image`. Where ``data`` is given, it is the file's content, and
    ``path`` only what messages call it.

    Raises:
        BadImage: the image cannot be used.
        SourceError: it does not fit into the memory that is left.
    """
    # Pillow's decoders raise nearly every kind of exception on damaged files (OSError, SyntaxError, struct.error,
    # ValueError, ...), and for the person who has such a file they all mean the same.
    try:
        opened = open_regular(path) if data is None else io.BytesIO(data)
        with opened as file, Image.open(file, formats=FORMATS) as image:
            check_pixels(path, image)
            return convert(path, image, channels, size)
    except BadImage:
        raise
    except MemoryError as error:
        raise SourceError(f"there is not enough memory left to decode the image {path}: use fewer workers") from error
    except Exception as error:
        raise _unreadable(path, error, data) from error


def convert(name: FilePath, image: Image.Image, channels: int, size: Sides | None) -> Pixels:
    """Turn an image that Pillow has opened into what :func:`decode` gives; the image may be changed.

    ``name`` is what a DataError about its grey values calls it.
    """
    ImageOps.exif_transpose(image, in_place=True)
    image.load()
    if image.mode == "F" or image.mode.startswith("I"):
        return _deep_grey(name, image, channels, size)
    return _array(_fit(_flat(image, "RGB" if channels == 3 else "L"), size), channels, np.uint8)


def to_tensor(pixels: Pixels) -> Tensor:
    """Turn what :func:`decode` gives into a float32 tensor C x H x W in [0, 1]."""
    # Decoded arrays may be read-only views of Pillow's memory, which torch must not get hold of: so a copy.
    image = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1).contiguous()
    return image.div_(255) if pixels.dtype == np.uint8 else image


def fill(image: Tensor, pixels: Pixels) -> None:
    """Write what :func:`decode` gives into a float32 tensor C x H x W, as :func:`to_tensor` would make it."""
    # By numpy: in a thread of a reader's, torch would begin a team of threads of its own.
    if pixels.dtype == np.uint8:
        np.divide(pixels.transpose(2, 0, 1), np.float32(255), out=image.numpy())
    else:
        image.numpy()[:] = pixels.transpose(2, 0, 1)


def check_pixels(path: FilePath, image: Image.Image) -> None:
    """Raise :class:`BadImage` where an opened image has more pixels than Pillow's ``Image.MAX_IMAGE_PIXELS``."""
    # Pillow only warns from here up to twice as many pixels; a small file that unpacks to gigabytes is refused.
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        pixels = f"{image.width} x {image.height} pixels, more than the {limit:,} allowed"
        raise BadImage(
            f"the image {path} has {pixels}: scale it down or remove it", "too large", f"it has {pixels}: scale it down"
        )


def _bands(image: Image.Image) -> Iterator[tuple[slice, Image.Image]]:
    """The image in bands of about a million pixels, so that what is worked out of it need not be held as a whole."""
    rows = max(1, _BAND // image.width)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        yield slice(top, bottom), image.crop((0, top, image.width, bottom))


def _flat(image: Image.Image, mode: str) -> Image.Image:
    """Convert an 8-bit image of any mode to RGB or L, on white where it is transparent."""
    if not image.has_transparency_data:
        return image if image.mode == mode else image.convert(mode)
    flat = Image.new(mode, image.size)
    for rows, band in _bands(image):
        white = Image.new("RGBA", band.size, (255, 255, 255, 255))
        flat.paste(Image.alpha_composite(white, band.convert("RGBA")).convert(mode), (0, rows.start))
    return flat


def _array(image: Image.Image, channels: int, dtype: type[np.generic]) -> NDArray[Any]:
    """The image as an array H x W x C."""
    pixels = np.empty((image.height, image.width, channels), dtype)
    for rows, band in _bands(image):
        pixels[rows] = np.asarray(band).reshape(-1, image.width, channels)
    return pixels


def _fit(image: Image.Image, size: Sides | None) -> Image.Image:
    if size is None or (image.height, image.width) == size:
        return image
    top, left, height, width = crop_box(image.height, image.width, size)
    # Only the part that remains is resized: a 1 x 100,000 picture must not become 224 x 22,400,000 on the way.
    return image.resize((size[1], size[0]), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))


def _deep_grey(name: FilePath, image: Image.Image, channels: int, size: Sides | None) -> NDArray[np.float32]:
    """Read a grey image of 16-bit or 32-bit integers or floats as float32 H x W x C in [0, 1]."""
    flat = Image.new("F", image.size)
    for rows, band in _bands(image):
        values = np.asarray(band).astype(np.float32)
        if image.mode != "F":
            # Mode "I" has 32 bits, but is also how 16-bit files come out of some versions of Pillow.
            values /= 65535
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            wrong = "grey values outside the range of a picture: save it with 8 or 16 bits a pixel"
            raise BadImage(f"the image {name} has {wrong}", "out of range", f"it has {wrong}")
        flat.paste(Image.fromarray(values), (0, rows.start))
    pixels = _array(_fit(flat, size), 1, np.float32)
    return np.broadcast_to(pixels.clip(0, 1, out=pixels), (*pixels.shape[:2], channels))


def _unreadable(path: FilePath, error: Exception, data: bytes | None = None) -> BadImage:
    if isinstance(error, FileNotFoundError):
        return BadImage(f"there is no image file {path}: check the path", "missing", "there is no such file")
    words = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
    if isinstance(error, UnidentifiedImageError):
        if len(data) == 0 if data is not None else _is_empty(path):
            kind, words, reason = "empty", "empty", "the file is empty"
        else:
            kind, words = "not an image", "not a JPEG, PNG, WebP, BMP, GIF or TIFF file"
            reason = words
    elif isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        kind, reason = "too large", f"it has far more pixels than the {Image.MAX_IMAGE_PIXELS:,} allowed: scale it down"
    elif isinstance(error, OSError) and error.strerror:
        kind, reason = "unreadable", f"it cannot be read ({words})"
    else:
        kind, reason = "damaged", f"it is damaged or cut short ({words or type(error).__name__})"
    return BadImage(f"cannot read the image {path} ({words}): repair, replace or remove it", kind, reason)


def _is_empty(path: FilePath) -> bool:
    try:
        return Path(path).stat().st_size == 0
    except OSError:
        return False
