"""Shifts and mirror images: drawn once for a batch, then applied to it and to whatever must move with it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Move = Callable[[Tensor], Tensor]


def drawn_shift(images: Tensor) -> Move:
    """Draw a shift by whole pixels for each image of n x C x H x W, up to 1/8 of the side each way.

    Drawn from torch's default generator of the images' device.

    Returns:
        A function that shifts any batch n x C x H x W on that device alike, filling with black.
    """
    n, channels, height, width = images.shape
    device = images.device
    down, right = height // 8, width // 8
    tops = torch.randint(2 * down + 1, (n, 1), device=device)
    lefts = torch.randint(2 * right + 1, (n, 1), device=device)
    rows = tops + torch.arange(height, device=device)
    columns = lefts + torch.arange(width, device=device)
    item = torch.arange(n, device=device)[:, None, None, None]
    channel = torch.arange(channels, device=device)[None, :, None, None]

    def shift(batch: Tensor) -> Tensor:
        padded = F.pad(batch, (right, right, down, down))
        return padded[item, channel, rows[:, None, :, None], columns[:, None, None, :]]

    return shift


def drawn_flip(images: Tensor) -> Move:
    """Draw with probability 1/2 for each image whether it is mirrored left to right; as :func:`drawn_shift`."""
    mirror = torch.rand(len(images), device=images.device) < 0.5
    return lambda batch: torch.where(mirror[:, None, None, None], batch.flip(3), batch)


def shifted(images: Tensor) -> Tensor:
    """Shift each image of n x C x H x W at random; see :func:`drawn_shift`."""
    return drawn_shift(images)(images)


def flipped(images: Tensor) -> Tensor:
    """Mirror each image of n x C x H x W at random; see :func:`drawn_flip`."""
    return drawn_flip(images)(images)
