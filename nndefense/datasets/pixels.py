"""Digests of decoded pixels, by which exact duplicates are found whatever files they come from."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DIGEST_BYTES = 16


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
    for place, image in enumerate(images):
        digests[place] = pixel_digest(image.permute(1, 2, 0).contiguous().numpy())
    return digests


def pixel_digest(pixels: NDArray[np.uint8] | NDArray[np.float32]) -> NDArray[np.uint8]:
    """The digest of one image H x W x C, uint8 in 0..255 or float32 in [0, 1]: see :func:`pixel_digests`."""
    if pixels.dtype != np.uint8:
        values = torch.from_numpy(np.array(pixels, dtype=np.float32))
        levels = values.mul(255).round_().to(torch.uint8)
        whole = torch.equal(levels.to(torch.float32).div_(255), values)
        pixels = levels.numpy() if whole else values.numpy()
    kind = "8 bits" if pixels.dtype == np.uint8 else "float"
    shape = " x ".join(str(side) for side in pixels.shape)
    digest = hashlib.blake2b(f"{shape} {kind}\n".encode(), digest_size=DIGEST_BYTES)
    digest.update(np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder("<")).data)
    return np.frombuffer(digest.digest(), dtype=np.uint8)
