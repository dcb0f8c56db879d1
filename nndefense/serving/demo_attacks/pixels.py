"""Pictures for the attacks of the page: 8 bits a channel, within the budget, as PNG; and differences made visible."""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from nndefense.attacks import distance

_LEVELS = 255
# Rounding of the size itself, relative and absolute.
_SLACK = 1e-6
_ATTEMPTS = 12
_NICE = (1, 2, 5)


def eight_bits(images: Tensor) -> Tensor:
    """Round images N x C x H x W in [0, 1] to multiples of 1/255, bit for bit what decoding their PNG gives."""
    return (images.float() * _LEVELS).round() / _LEVELS


def picture_within(images: Tensor, clean: Tensor, radii: Tensor, norm: str) -> Tensor:
    """Attacked images with 8 bits a channel that are still within their budget.

    Rounding may carry an image out of its ball by a little; its perturbation is then shrunk a little and rounded again,
    and in the end rounded towards the clean image, which no pixel survives farther away.

    Args:
        images: attacked, N x C x H x W in [0, 1].
        clean: the images they were made from, of the same shape, already with 8 bits.
        radii: N, in raw pixel units.
        norm: one of :data:`nndefense.attacks.NORMS`.

    Returns:
        N x C x H x W, multiples of 1/255.
    """
    rounded = eight_bits(images)
    share = torch.ones_like(radii)
    for _ in range(_ATTEMPTS):
        size = distance(clean, rounded, norm)
        over = size > radii * (1 + _SLACK) + _SLACK
        if not bool(over.any()):
            return rounded
        share = torch.where(over, share * (radii / size).clamp(max=1.0) * 0.995, share)
        rounded = eight_bits(clean + share.view(-1, 1, 1, 1) * (images - clean))
    towards = (clean * _LEVELS).round() + ((images - clean) * _LEVELS).trunc()
    over = distance(clean, rounded, norm) > radii * (1 + _SLACK) + _SLACK
    return torch.where(over.view(-1, 1, 1, 1), towards.clamp(0, _LEVELS) / _LEVELS, rounded)


def magnified(difference: Tensor) -> tuple[Tensor, int]:
    """Show a difference C x H x W in [-1, 1] on grey: ``0.5 + factor * difference`` in [0, 1].

    Returns:
        The picture, and the factor: the largest of 1, 2, 5, 10, 20, 50, ... up to 100 at which no pixel is clipped.
    """
    largest = float(difference.abs().max())
    room = 100.0 if largest == 0 else min(100.0, (0.5 + _SLACK) / largest)
    factor = 1
    if room >= 1:
        power = 10 ** math.floor(math.log10(room))
        factor = max(nice * power for nice in _NICE if nice * power <= room)
    return (0.5 + factor * difference).clamp(0, 1), factor


def png(pixels: NDArray[Any]) -> bytes:
    """Encode uint8 pixels H x W x C (C 1 or 3) as PNG, grey for one channel."""
    file = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(file, format="PNG")
    return file.getvalue()


def png_text(image: Tensor) -> str:
    """An image C x H x W in [0, 1] as a PNG in base64."""
    pixels = (image.detach().cpu() * _LEVELS).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return base64.b64encode(png(pixels)).decode("ascii")
