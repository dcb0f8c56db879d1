"""Where a sticker works best: the l_1 search for vulnerable regions (Eykholt et al. 2018, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from nndefense.attacks.objective import Model
from nndefense.attacks.rp2.optimise import Settings, rp2
from nndefense.attacks.rp2.sticker import check_mask
from nndefense.errors import InputError

# Rectangles are looked for on a grid of at most so many cells a side: their number grows with the fourth power.
_GRID = 64


@dataclass(frozen=True)
class Found:
    """A mask, and the map that it was cut from.

    Attributes:
        mask: 1 x h x w of 0 and 1.
        saliency: h x w, at least 0: how much the l_1 perturbation changes each pixel.
        forwards: images shown to the model.
    """

    mask: Tensor
    saliency: Tensor
    forwards: int


def search_mask(
    model: Model,
    photos: Tensor,
    region: Tensor,
    target: int,
    *,
    area: float,
    rectangles: int | None = 4,
    matrices: Tensor | None = None,
    light: Tensor | None = None,
    settings: Settings | None = None,
) -> Found:
    """Find the regions in which a perturbation is worth most, and make a mask of them.

    The objective is optimised with the l_1 norm, which leaves most pixels alone, over the whole region and with
    ``add``, since only a change can be nothing; then :func:`cut_mask` keeps the most changed part.

    Args:
        model: images N x C x H x W in [0, 1] -> logits N x K.
        photos: of the object, N x C x H x W in [0, 1].
        region: 1 x h x w of 0 and 1 in the canonical frame: where a sticker may be at all, such as the whole sign.
        target: the class to be seen.
        area: of the mask, as a share of the region.
        rectangles: the largest number of rectangles; None for the single pixels that are changed most.
        matrices: N x 3 x 3 homographies from the canonical frame to each photo's; identities if not given.
        light: N factors: how bright white paper is in each photo; 1 if not given.
        settings: as for :func:`rp2`; mode, norm and score are set here.

    Raises:
        InputError: an input that cannot be used, or a search that changed nothing.
    """
    region = check_mask(region)
    chosen = replace(settings or Settings(), mode="add", norm=1, nps_weight=0.0)
    found = rp2(model, photos, region, target, matrices=matrices, light=light, settings=chosen)
    saliency = found.sticker.delta.square().sum(0).sqrt()
    mask = cut_mask(saliency, region, area=area, rectangles=rectangles)
    return Found(mask.to(found.sticker.mask), saliency, found.forwards)


def cut_mask(saliency: Tensor, region: Tensor, *, area: float, rectangles: int | None = 4) -> Tensor:
    """Keep the most salient part of a region.

    Rectangles are taken one after the other, each the one with the largest sum of ``saliency - tau``, where tau is a
    price for every pixel: the lowest for which all of them together stay within the area.

    Args:
        saliency: h x w, at least 0.
        region: 1 x h x w of 0 and 1; the mask stays inside it.
        area: of the mask, as a share of the region, in (0, 1].
        rectangles: the largest number of rectangles; None for single pixels.

    Returns:
        1 x h x w of 0 and 1, float32, on the CPU.

    Raises:
        InputError: an area out of its range or of less than a pixel, or a saliency of 0 everywhere.
    """
    inside = check_mask(region)[0].cpu().float()
    if saliency.shape != inside.shape:
        raise InputError(f"a saliency of {tuple(saliency.shape)} does not fit a region of {tuple(inside.shape)}")
    values = saliency.detach().cpu().float() * inside
    if not 0 < area <= 1 or (rectangles is not None and rectangles < 1):
        raise InputError("the area must be a share above 0 and at most 1, and there must be at least one rectangle")
    budget = int(area * float(inside.sum()))
    if budget < 1:
        raise InputError(f"an area of {area:g} of the region is less than one pixel: allow more")
    if not bool(torch.isfinite(values).all()) or not float(values.max()) > 0:
        raise InputError("the search changed no pixel: lower norm_weight")
    if rectangles is None:
        kept = torch.zeros_like(values).flatten()
        kept[values.flatten().topk(budget).indices] = 1
        return (kept.view_as(values) * (values > 0))[None]

    factor = -(-max(values.shape) // _GRID)
    coarse = F.avg_pool2d(values[None, None], factor, ceil_mode=True, count_include_pad=False)[0, 0].double().numpy()
    # Cells outside the region cost more than any rectangle can win.
    open_cells = F.max_pool2d(1 - inside[None, None], factor, ceil_mode=True)[0, 0].numpy() == 0
    wall = float(coarse.sum()) + 1.0
    lowest, highest, best = 0.0, float(coarse.max()), None
    for _ in range(16):
        price = (lowest + highest) / 2
        drawn = _rectangles(np.where(open_cells, coarse - price, -wall), rectangles, wall)
        full = np.kron(drawn, np.ones((factor, factor)))[: values.shape[0], : values.shape[1]]
        if full.sum() > budget:
            lowest = price
        else:
            highest = price
            best = full if best is None or full.sum() >= best.sum() else best
    if best is None or best.sum() == 0:
        raise InputError(f"no rectangle fits into {area:g} of the region: allow more, or single pixels")
    return torch.from_numpy(best).float()[None]


def _rectangles(gains: NDArray[np.float64], count: int, wall: float) -> NDArray[np.float64]:
    """The cells of at most ``count`` rectangles, greedily of the largest sums above 0: 0 or 1, the shape of gains."""
    gains, cells = gains.copy(), np.zeros_like(gains)
    for _ in range(count):
        total, (top, bottom, left, right) = _best_rectangle(gains)
        if total <= 0:
            break
        cells[top:bottom, left:right] = 1
        # Neither in the next rectangle nor touching it, so that there are as many stickers as rectangles.
        gains[max(top - 1, 0) : bottom + 1, max(left - 1, 0) : right + 1] = -wall
    return cells


def _best_rectangle(gains: NDArray[np.float64]) -> tuple[float, tuple[int, int, int, int]]:
    """The rectangle of the largest sum: for each pair of rows, the best run of the column sums (Kadane)."""
    height, width = gains.shape
    columns = np.vstack([np.zeros(width), np.cumsum(gains, 0)])
    best, place = -np.inf, (0, 0, 0, 0)
    for top in range(height):
        # All bottoms at once: (height - top) x (width + 1) running sums along the columns.
        sums = np.cumsum(columns[top + 1 :] - columns[top], 1)
        sums = np.hstack([np.zeros((len(sums), 1)), sums])
        lows = np.minimum.accumulate(sums[:, :-1], 1)
        runs = sums[:, 1:] - lows
        row, right = np.unravel_index(int(runs.argmax()), runs.shape)
        if runs[row, right] > best:
            left = int(sums[row, : right + 1].argmin())
            best, place = float(runs[row, right]), (top, top + int(row) + 1, left, int(right) + 1)
    return best, place
