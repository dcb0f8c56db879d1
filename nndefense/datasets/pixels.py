"""Digests of decoded pixels, by which exact duplicates are found whatever files they come from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DIGEST_BYTES = 16
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
    if not images.numel():
        # Without pixels there is nothing to be 8-bit about, but a digest there is.
        for place, image in enumerate(images):
            digests[place] = pixel_digest(image.permute(1, 2, 0).contiguous().numpy())
        return digests
    size = max(1, _TOGETHER // images[0].numel())
    for first in range(0, len(images), size):
        values = images[first : first + size].permute(0, 2, 3, 1).contiguous()
        levels, whole = _levels(values)
        begun = {kind: _begun(values.shape[1:], kind) for kind in (np.uint8, np.float32)}
        pixels = {np.uint8: levels.numpy(), np.float32: _little(values.numpy())}
        for place, eight in enumerate(whole.tolist()):
            kind = np.uint8 if eight else np.float32
            digest = begun[kind].copy()
            digest.update(pixels[kind][place].data)
            digests[first + place] = np.frombuffer(digest.digest(), dtype=np.uint8)
    return digests


def pixel_digest(pixels: NDArray[np.uint8] | NDArray[np.float32]) -> NDArray[np.uint8]:
    """The digest of one image H x W x C, uint8 in 0..255 or float32 in [0, 1]: see :func:`pixel_digests`."""
    if pixels.dtype != np.uint8:
        values = torch.from_numpy(np.array(pixels, dtype=np.float32))[None]
        levels, whole = _levels(values)
        pixels = levels[0].numpy() if bool(whole) else values[0].numpy()
    digest = _begun(pixels.shape, pixels.dtype.type)
    digest.update(_little(np.ascontiguousarray(pixels)).data)
    return np.frombuffer(digest.digest(), dtype=np.uint8)


def _levels(values: Tensor) -> tuple[Tensor, Tensor]:
    """The pixels of N images in 8 bits, and for each image whether they are exactly its pixels."""
    levels = values.mul(255).round_().to(torch.uint8)
    return levels, (levels.to(torch.float32).div_(255) == values).flatten(1).all(1)


def _begun(shape: Sequence[int], kind: type) -> Any:
    """A digest that has taken in shape and kind."""
    text = " x ".join(str(side) for side in shape)
    return hashlib.blake2b(f"{text} {'8 bits' if kind is np.uint8 else 'float'}\n".encode(), digest_size=DIGEST_BYTES)


def _little(pixels: NDArray[Any]) -> NDArray[Any]:
    """The same numbers with their lowest byte first."""
    return pixels.astype(pixels.dtype.newbyteorder("<"), copy=False)
