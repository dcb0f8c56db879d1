"""Decoding images that strangers send.

Only PNG, JPEG, WebP and GIF are read, the formats that browsers and telephones make. TIFF and BMP, which data sets may
have, are refused: libtiff is a family of two dozen codecs, and Pillow unpacks run-length BMP in Python.

The pixels are those that :func:`nndefense.datasets.load_image` gives for the same file, since both end in the same
conversion: turned by EXIF, transparent parts on white, CMYK and palettes as colours, 16-bit grey scaled by 65535;
16-bit colour is read with 8 bits, and of an animation the first frame.

Three things bound the time and memory of one image, none of which is enough alone:

* the container is walked before Pillow sees it (:mod:`nndefense.serving.pictures.containers`), with a bound on the
  steps, and only the first picture is kept: no texts, profiles, EXIF directories or further frames reach a decoder;
* width, height and the number of passes over the pixels are checked before any pixel is decoded;
* the decoder is fed 4096 bytes at a time, and a clock is read before each. Nothing needs to be killed, because what one
  mouthful can cost is bounded by the pixels. WebP alone is decoded in one go, which the pixels bound as well.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from PIL import Image
from torch import Tensor

from nndefense.datasets.derived import check_form
from nndefense.datasets.image_files import convert, to_tensor
from nndefense.errors import DataError
from nndefense.serving.pictures.containers import read_container
from nndefense.serving.pictures.limits import MEDIA_TYPES, Limits, Refused, refused
from nndefense.serving.pictures.picture import Picture, damaged

_MOUTHFUL = 4096
_PASSES = 16
"""How often the decoder may go over the largest picture allowed; more often over a smaller one."""
_ORIENTATION = 0x0112
_ALIASES = {"image/jpg": "image/jpeg", "image/pjpeg": "image/jpeg", "image/x-png": "image/png"}
_UNDECLARED = ("", "application/octet-stream", "binary/octet-stream")

Shape = tuple[int, int, int]


class _Late(Exception):
    """The time is over."""


class _TimedFile(io.BytesIO):
    """A file in memory that can be read until a point in time."""

    def __init__(self, data: bytes, deadline: float, clock: Callable[[], float]) -> None:
        super().__init__(data)
        self._deadline, self._clock = deadline, clock

    def read(self, size: int | None = -1, /) -> bytes:
        if self._clock() > self._deadline:
            raise _Late
        return super().read(size)


def decode(data: bytes, limits: Limits, shape: Shape, *, media_type: str | None = None) -> Tensor:
    """Decode one image.

    Args:
        data: the bytes of an image file.
        limits: what it may cost.
        shape: channels (1 or 3), height and width of the result; the centre is cropped and resized to it.
        media_type: the content type that the client declared, if any: it must be that of the format.

    Returns:
        float32 tensor C x H x W in [0, 1].

    Raises:
        Refused: the image is empty, damaged, of another format, too large, or takes too long.
    """
    return decode_all([(data, media_type)], limits, shape)[0]


def decode_all(
    images: Sequence[tuple[bytes, str | None]],
    limits: Limits,
    shape: Shape,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> list[Tensor]:
    """Decode the images of one request, in one thread; ``limits.decode_seconds`` is for all of them.

    All headers are looked at before the first pixel is decoded, so that what is refused costs little.

    Args:
        images: bytes and declared content type of each.
        limits, shape: as in :func:`decode`.
        clock: seconds, for tests.

    Returns:
        A tensor for each image, as from :func:`decode`.

    Raises:
        Refused: as from :func:`decode`, naming the first image that is at fault where there are several; or there are
            too many images, or too many pixels in all.
    """
    deadline = clock() + limits.decode_seconds
    if len(images) > limits.max_images:
        raise refused(
            "too_many_images",
            f"the request has {len(images)} images: send at most {limits.max_images} in one request",
        )
    named = len(images) > 1
    pictures = []
    pixels = 0
    for number, (data, media_type) in enumerate(images, 1):
        with _numbered(number, named):
            if clock() > deadline:
                raise _too_late()
            picture = inspect(data, limits, media_type=media_type)
        pictures.append(picture)
        pixels += picture.width * picture.height
    if pixels > limits.max_request_pixels:
        raise refused(
            "too_many_pixels",
            f"the images of the request have {pixels:,} pixels together, more than the {limits.max_request_pixels:,} "
            "allowed: scale them down or send fewer at once",
        )
    tensors = []
    for number, picture in enumerate(pictures, 1):
        with _numbered(number, named):
            tensors.append(_decode(picture, shape, deadline, clock))
    return tensors


def inspect(data: bytes, limits: Limits, *, media_type: str | None = None) -> Picture:
    """Return what ``data``, an image file of the ``media_type``, holds, and check the limits without decoding a pixel.

    Raises:
        Refused: as from :func:`decode`, for all that can be told from the file's structure.
    """
    if len(data) > limits.max_image_bytes:
        raise refused(
            "image_too_large",
            f"the image file has {len(data):,} bytes, more than the {limits.max_image_bytes:,} allowed: "
            "scale the image down or compress it",
        )
    declared = (media_type or "").split(";")[0].strip().lower()
    declared = _ALIASES.get(declared, declared)
    if declared not in MEDIA_TYPES and declared not in _UNDECLARED:
        raise refused(
            "unsupported_media_type",
            f"the declared content type is not one of {', '.join(MEDIA_TYPES)}: send the image as one of these",
        )
    picture = read_container(data)
    if declared in MEDIA_TYPES and MEDIA_TYPES[declared] != picture.format:
        raise refused(
            "type_mismatch",
            f"the image is declared as {declared} but is {picture.format}: declare it rightly or not at all",
        )
    if max(picture.width, picture.height) > limits.max_side or picture.width * picture.height > limits.max_pixels:
        raise refused(
            "too_many_pixels",
            f"the image has {picture.width:,} x {picture.height:,} pixels, more than the {limits.max_side:,} a side or "
            f"{limits.max_pixels:,} in all that are allowed: scale it down",
        )
    if picture.width * picture.height * picture.passes > _PASSES * limits.max_pixels:
        raise refused(
            "too_many_pixels",
            f"the JPEG image is stored in {picture.passes} scans, too many for its size: save it anew or scale it down",
        )
    return picture


_DATA_URL = re.compile(r"\s*data:([^,]{0,200}?);base64,", re.IGNORECASE)
_BLANKS = b" \t\r\n"


def from_base64(text: str, limits: Limits) -> tuple[bytes, str | None]:
    """Decode base64 (RFC 4648, the standard alphabet, padded), also in lines (RFC 2045) or as a data URL (RFC 2397).

    Returns:
        The bytes, and the content type that a data URL declares; None where there is none.

    Raises:
        Refused: ``invalid_base64``; ``image_too_large`` for what would be more than ``limits.max_image_bytes``.
    """
    url = _DATA_URL.match(text)
    try:
        # Of the whole text at once, since a text can be all blanks.
        plain = text[url.end() if url else 0 :].encode("ascii").translate(None, _BLANKS)
        if len(plain) // 4 * 3 - 2 > limits.max_image_bytes:
            raise refused(
                "image_too_large", f"an image has more than the {limits.max_image_bytes:,} bytes allowed: scale it down"
            )
        return base64.b64decode(plain, validate=True), (url[1].strip() or None) if url else None
    except (binascii.Error, UnicodeError):
        # The error's own words may repeat what was sent.
        raise invalid_base64() from None


def invalid_base64() -> Refused:
    """The error for text that is no base64."""
    return refused("invalid_base64", "an image is not valid base64: encode it with the standard alphabet and padding")


def _decode(picture: Picture, shape: Shape, deadline: float, clock: Callable[[], float]) -> Tensor:
    channels, height, width = shape
    size = check_form((height, width), channels)
    file = _TimedFile(picture.data, deadline, clock)
    # Pillow's decoders raise nearly every kind of exception on damaged files: for the sender they all mean the same.
    try:
        with Image.open(file, formats=(picture.format,)) as image:
            if image.size != (picture.width, picture.height):
                raise damaged("its header contradicts itself")
            image.decodermaxblock = _MOUTHFUL
            image.load()
            if picture.orientation != 1:
                image.getexif()[_ORIENTATION] = picture.orientation
            return to_tensor(convert("", image, channels, size))
    except Refused:
        raise
    except _Late:
        raise _too_late() from None
    except DataError:
        raise damaged("it has grey values outside the range of a picture") from None
    except MemoryError:
        raise
    except Exception:
        raise damaged("its content does not decode") from None


def _too_late() -> Refused:
    return refused("decode_timeout", "the images take too long to be decoded: scale them down, or send fewer at once")


@contextmanager
def _numbered(number: int, named: bool) -> Iterator[None]:
    """Say in a rejection which image of the request it is about."""
    try:
        yield
    except Refused as error:
        if not named:
            raise
        raise Refused(error.status, error.code, f"image {number} of the request: {error.detail}") from None
