"""Digests of decoded pixels, by which exact duplicates are found whatever files they come from."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

DIGEST_BYTES = 16
Digests = NDArray[np.uint8]
Pixels = NDArray[np.uint8] | NDArray[np.float32]
"""One image or several, uint8 in 0..255 or float32 in [0, 1]."""
_TOGETHER = 1 << 17
"""Pixels that are looked at in one go: a batch of small images costs no more than a large one."""


def pixel_digests(images: Tensor) -> NDArray[np.uint8]:
    """Hash each image's shape and pixels with blake2b.

    Images whose every value is k / 255 are hashed as 8-bit pixels H x W x C, others as float32 (little-endian), so that
    unlike images have unlike digests, and a picture has the same one from any kind of file that keeps its pixels.

    Args:
        images: float32 N x C x H x W in [0, 1].

    Returns:
        uint8 N x 16.
    """
    digests = np.empty((len(images), DIGEST_BYTES), dtype=np.uint8)
    whole = images.detach().cpu().numpy()
    size = max(1, _TOGETHER // max(1, math.prod(images.shape[1:])))
    for first in range(0, len(images), size):
        values = np.ascontiguousarray(whole[first : first + size].transpose(0, 2, 3, 1))
        levels, eight = _levels(values)
        if eight.all():
            _hash(levels, digests[first : first + size])
            continue
        for place in range(len(values)):
            chosen = levels if eight[place] else values
            _hash(chosen[place : place + 1], digests[first + place : first + place + 1])
    return digests


def pixel_digest(pixels: Pixels) -> NDArray[np.uint8]:
    """The digest of one image H x W x C, uint8 in 0..255 or float32 in [0, 1]: see :func:`pixel_digests`."""
    if pixels.dtype != np.uint8:
        values = np.array(pixels, dtype=np.float32)[None]
        levels, eight = _levels(values)
        pixels = levels[0] if eight[0] else values[0]
    digest = np.empty(DIGEST_BYTES, dtype=np.uint8)
    _hash(np.ascontiguousarray(pixels)[None], digest[None])
    return digest


def _levels(values: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """The pixels of N images in 8 bits, and for each image whether they are exactly its pixels.

    By numpy: in a thread of a reader's, torch would begin a team of threads of its own.
    """
    # NaN has no 8-bit value, and equals none.
    with np.errstate(invalid="ignore"):
        levels = np.rint(values * np.float32(255)).astype(np.uint8)
    return levels, (levels / np.float32(255) == values).reshape(len(values), -1).all(1)


def _hash(pixels: NDArray[Any], digests: NDArray[np.uint8]) -> None:
    """Fill in the digests of images N x H x W x C of one kind."""
    shape = " x ".join(str(side) for side in pixels.shape[1:])
    kind = "8 bits" if pixels.dtype == np.uint8 else "float"
    begun = hashlib.blake2b(f"{shape} {kind}\n".encode(), digest_size=DIGEST_BYTES)
    little = pixels.astype(pixels.dtype.newbyteorder("<"), copy=False)
    for place, image in enumerate(little):
        digest = begun.copy()
        digest.update(image.data)
        digests[place] = np.frombuffer(digest.digest(), dtype=np.uint8)
