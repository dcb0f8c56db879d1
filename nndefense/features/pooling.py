"""Poolings: a layer's output to one vector per image, each a pure differentiable function.

``avg``     spatial average, C numbers (Dubey et al. 2019, for the plain layers)
``max``     spatial maximum, C numbers
``gridG``   averages over a G x G grid, C*G*G numbers: keeps where things are, which early layers need
``rmac``    regional maxima (Tolias et al., ICLR 2016), C numbers
``flatten`` every entry
``cls``     the class token alone, C numbers (transformers that have one, such as ViT: Dosovitskiy et al., ICLR 2021)

Maps may have their channels first or last. Of tokens, those of the patches are pooled, on their grid where a pooling
needs places, and the class token only by ``cls`` and ``flatten``. A layer whose output is already N x D is passed on
unchanged by all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from nndefense.errors import InputError
from nndefense.features.layouts import OutputLayout

_GRID = re.compile(r"grid([1-9]\d?)")
_OVERLAP = 0.4
_RMAC_SCALES = 3
#: The poolings by name; G of ``grid<G>`` is the number of cells a side, at least 1.
POOLINGS = ("avg", "max", "grid<G>", "rmac", "flatten", "cls")


def check_pooling(pooling: str) -> None:
    """Raise :class:`InputError` for a name that :func:`pool` does not know."""
    if pooling == "grid<G>" or (pooling not in POOLINGS and not _GRID.fullmatch(pooling)):
        raise InputError(f"pooling is {pooling!r}, but must be one of {', '.join(POOLINGS)} (as grid4)")


def pool(activation: Tensor, pooling: str, layout: OutputLayout | None = None) -> Tensor:
    """Pool a layer's output: a map, tokens or vectors N x D -> N x D'.

    Args:
        activation: what the layer gave.
        pooling: by name.
        layout: which axis is which; None: N x C x H x W, or N x T x C without a class token.

    Raises:
        InputError: an unknown pooling, one that the layer's output does not allow, or an activation of another number
            of dimensions.
    """
    check_pooling(pooling)
    if activation.is_quantized:
        activation = activation.dequantize()
    if activation.dim() == 2:
        return activation
    if activation.dim() not in (3, 4):
        raise InputError(
            f"the layer's output has {activation.dim()} dimensions, but pooling needs a map, tokens or vectors: "
            "choose a convolutional or linear layer, or a block of a transformer"
        )
    layout = layout or OutputLayout(channels_last=activation.dim() == 3)
    arranged = layout.arranged(activation)
    if pooling == "flatten":
        return arranged.flatten(1)
    if pooling == "cls":
        if activation.dim() != 3 or not layout.prefix:
            raise InputError("the layer's output has no class token: choose another pooling, such as avg")
        return arranged[:, :, 0]
    if activation.dim() == 3:
        arranged = arranged[:, :, layout.prefix :]
        if pooling in ("avg", "max"):
            return arranged.mean(2) if pooling == "avg" else arranged.amax(2)
        side = layout.side(arranged.shape[2])
        if side is None:
            raise InputError(
                f"the layer's {arranged.shape[2]} tokens lie on no grid, which the pooling {pooling} needs: "
                "choose avg, max or flatten"
            )
        arranged = arranged.reshape(*arranged.shape[:2], *side)
    if pooling == "avg":
        return arranged.mean((2, 3))
    if pooling == "max":
        return arranged.amax((2, 3))
    if pooling == "rmac":
        return rmac(arranged)
    cells = int(pooling.removeprefix("grid"))
    height, width = arranged.shape[2:]
    # A grid finer than the map would only repeat entries.
    return F.adaptive_avg_pool2d(arranged, (min(cells, height), min(cells, width))).flatten(1)


def rmac(activation: Tensor) -> Tensor:
    """Regional maximum activations of convolutions: ``activation`` N x C x H x W -> N x C of length 1.

    At scale l = 1..3 square regions of side ``floor(2 * min(W, H) / (l + 1))`` overlap by about 40 %; each region's
    maxima per channel are l2-normalised, summed, and normalised again (Tolias et al., ICLR 2016, section 3.2).
    On a square map these are 1 + 4 + 9 regions; the original's whitening of each region is left out.
    """
    total = torch.zeros(activation.shape[:2], dtype=activation.dtype, device=activation.device)
    for top, left, side in rmac_regions(*activation.shape[2:]):
        region = activation[:, :, top : top + side, left : left + side].amax((2, 3))
        total = total + F.normalize(region, dim=1)
    return F.normalize(total, dim=1)


def rmac_regions(height: int, width: int) -> Iterator[tuple[int, int, int]]:
    """Yield the regions of R-MAC on an H x W map as (top, left, side)."""
    short, long = min(height, width), max(height, width)
    # The number of extra regions along the longer side whose overlap comes nearest to 40 %.
    extra = 0
    if long > short:
        overlaps = [(short - (long - short) / steps) / short for steps in range(1, 7)]
        extra = 1 + min(range(6), key=lambda i: abs(overlaps[i] - _OVERLAP))
    for scale in range(1, _RMAC_SCALES + 1):
        side = max(2 * short // (scale + 1), 1)
        rows = scale + (extra if height > width else 0)
        columns = scale + (extra if width > height else 0)
        for top in _starts(height, side, rows):
            for left in _starts(width, side, columns):
                yield top, left, side


def _starts(length: int, side: int, count: int) -> list[int]:
    """Where ``count`` windows of one side begin so that they cover the length evenly."""
    if count == 1:
        return [(length - side) // 2]
    return [int((length - side) * i / (count - 1)) for i in range(count)]
