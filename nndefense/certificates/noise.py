"""Gaussian noise on images that does not depend on which images stand in a batch, and a pipeline's answers under it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

# Draws that come from one seed: each image's first 100 draws are the same, however many follow.
BLOCK = 32


def noisy_images(
    images: Tensor, sigma: float, draws: int, *, seed: int, purpose: str, batch_size: int
) -> Iterator[tuple[slice, int, Tensor]]:
    """Copies of images under Gaussian noise, clipped to [0, 1] as a part of the classifier behind them.

    The noise of an image is drawn from a seed that is made of its pixels, ``seed`` and ``purpose``: it does not depend
    on the image's place, its batch or the device, and different purposes share none.

    Args:
        images: N x C x H x W in [0, 1].
        sigma: standard deviation, in pixels of [0, 1].
        draws: of each image.
        seed, purpose: which noise.
        batch_size: copies at a time, at most; memory grows with it alone, but that 32 copies of an image are drawn.

    Yields:
        The images that a batch is of, how many draws of each, and the copies: (images x draws) x C x H x W, the draws
        of an image one after another.
    """
    together = max(batch_size // BLOCK, 1)
    for first in range(0, len(images), together):
        part = images[first : first + together]
        names = [hashlib.sha256(one.detach().cpu().float().contiguous().numpy().tobytes()).hexdigest() for one in part]
        for block in range(-(-draws // BLOCK)):
            count = min(BLOCK, draws - block * BLOCK)
            noise = torch.stack([_drawn(name, part.shape[1:], block, seed, purpose)[:count] for name in names])
            copies = part[:, None] + sigma * noise.to(part)
            copies = copies.clamp_(0, 1)
            step = count if together > 1 else batch_size
            for start in range(0, count, step):
                piece = copies[:, start : start + step]
                yield slice(first, first + len(part)), piece.shape[1], piece.flatten(0, 1)


def _drawn(name: str, shape: torch.Size, block: int, seed: int, purpose: str) -> Tensor:
    digest = hashlib.sha256(f"{purpose} noise {block} of {name} under {seed}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randn((BLOCK, *shape), generator=generator)
