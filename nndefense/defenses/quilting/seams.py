"""The minimum-error boundary cut between a patch and what lies there already, by dynamic programming."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# Where a seam cannot go; far above any sum of errors, and small enough that such sums stay finite.
_BARRED = 1e9


def boundary_cut(errors: Tensor, left: Tensor, top: Tensor, *, widest: int | None = None) -> tuple[Tensor, Tensor]:
    """Cut patches along the L-shaped seam of least error (Efros and Freeman, SIGGRAPH 2001, section 2.1).

    What lies there already covers the first ``left`` columns and the first ``top`` rows of a patch. The seam has two
    arms that meet at a pixel (a, b) of the corner: one goes down from there, one pixel in each of the rows a, a + 1,
    ... and within the ``left`` columns; the other goes right, one pixel in each of the columns b, b + 1, ... and within
    the ``top`` rows. Each arm moves by at most one pixel sideways a step. The new patch shows on the seam and beyond
    it. The cut has the least sum of errors over all such seams. Without an overlap on one side, the other's seam is a
    straight arm through the whole patch.

    Efros and Freeman let the arms meet on the corner's diagonal; here they meet anywhere in the corner, which contains
    their seams and never costs more.

    Args:
        errors: ... x p x p, at least 0: the squared difference of the two at each pixel, looked at only where they
            overlap.
        left, top: whole numbers from 0 to p - 1, of a shape that broadcasts to that of the leading dimensions.
        widest: the largest of these numbers, where it is known, which spares a GPU a wait.

    Returns:
        Whether the new patch shows, ... x p x p, and the sum of errors on the seam, ... .
    """
    side = errors.shape[-1]
    if widest is None:
        widest = int(max(left.max(), top.max()))
    # At least one column: where there is no overlap, the arm runs along the edge at no cost.
    band = max(widest, 1)
    # The second arm is the first one of the transposed patch.
    arms = torch.stack([_barred(errors, left, band), _barred(errors.transpose(-1, -2), top, band)])
    reach, turns = _reach(arms)
    met = reach[0][..., :band, :] + reach[1][..., :band, :].transpose(-1, -2)
    # The meeting pixel is counted once; where one side has no overlap, that side's arm has counted nothing.
    met = met - torch.minimum(arms[0][..., :band, :], arms[1][..., :band, :].transpose(-1, -2))
    cost, meeting = met.flatten(-2).min(-1)
    a, b = meeting // band, meeting % band
    # Each arm begins in its row (column) of the meeting pixel; before it, its limit is that pixel.
    begin, path = torch.stack([a, b]), torch.stack([b, a])
    paths = [path]
    for row in range(1, side):
        turned = path + turns[row - 1].gather(-1, path[..., None])[..., 0]
        path = torch.where(begin < row, turned, path)
        paths.append(path)
    limits = torch.stack(paths, -1)
    place = torch.arange(side, device=errors.device)
    return (place >= limits[0][..., None]) & (place[:, None] >= limits[1][..., None, :]), cost


def _barred(errors: Tensor, overlap: Tensor, band: int) -> Tensor:
    """The costs of an arm in the first ``band`` columns: ... x p x band."""
    columns = torch.arange(band, device=errors.device)
    barrier = (columns >= overlap.clamp_min(1)[..., None]) * _BARRED
    counts = (overlap > 0)[..., None, None]
    return errors[..., :band] * counts + barrier[..., None, :].to(errors)


def _reach(costs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The least cost from each pixel to the last row, ... x p x band, and where the next row's pixel lies from each.

    The steps are p - 1 tensors ... x band with -1, 0 or 1, from row r to row r + 1.
    """
    rows = [costs[..., -1, :]]
    turns: list[Tensor] = []
    for row in range(costs.shape[-2] - 2, -1, -1):
        below = functional.pad(rows[-1], (1, 1), value=4 * _BARRED * costs.shape[-2])
        best, turn = below.unfold(-1, 3, 1).min(-1)
        rows.append(costs[..., row, :] + best)
        turns.append(turn - 1)
    return torch.stack(rows[::-1], -2), turns[::-1]
