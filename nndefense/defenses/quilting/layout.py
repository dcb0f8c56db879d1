"""Where the patches of a quilt lie and which can be laid at once; and the seams along which they are cut.

A seam is the minimum-error boundary cut between a patch and what lies there already, by dynamic programming.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from nndefense.errors import InputError

Array = NDArray[np.int64]
# Where a seam cannot go; far above any sum of errors, and small enough that such sums stay finite.
_BARRED = 1e9


@dataclass(frozen=True)
class Layout:
    """The P patches of a quilt in raster order.

    Attributes:
        height, width: of the image that the patches cover, every pixel of it.
        patch: side of a patch.
        pixels: P x patch^2, the place of each pixel of each patch in the image's height x width, row by row.
        left, top: P, how many columns and rows of a patch are covered by those laid before it.
        waves: numbers of patches. Patches of one wave share no pixel, and each needs only patches of earlier waves.
    """

    height: int
    width: int
    patch: int
    pixels: Tensor
    left: Tensor
    top: Tensor
    waves: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.left)

    @property
    def widest(self) -> int:
        """The widest overlap of all, in pixels."""
        return int(max(self.left.max(), self.top.max()))


def check_tiling(patch: int, overlap: int) -> None:
    """Raise :class:`InputError` unless patches of this side can be laid with this overlap."""
    if patch < 1:
        raise InputError(f"the side of a patch is {patch}, but must be at least 1 pixel")
    if not 0 <= overlap < patch:
        raise InputError(f"the overlap is {overlap}, but must be from 0 to {patch - 1}, less than the patch's {patch}")


def starts(side: int, patch: int, overlap: int) -> Array:
    """The first pixels of the patches along one side: every pixel is covered, and none beyond the side.

    Where the patches do not come out even, the last one moves back to end with the image, and so reaches farther over
    its neighbour. (The code of Guo et al. stops before it: three rows and columns of a 224-pixel image stay empty.)

    Raises:
        InputError: a side shorter than a patch, or an overlap that does not fit.
    """
    check_tiling(patch, overlap)
    if side < patch:
        raise InputError(
            f"an image of {side} pixels is smaller than a patch of {patch}: use larger images or smaller patches"
        )
    first = np.arange(0, side - patch + 1, patch - overlap, dtype=np.int64)
    return first if first[-1] == side - patch else np.append(first, side - patch)


@functools.lru_cache(maxsize=32)
def lay_out(height: int, width: int, patch: int, overlap: int) -> Layout:
    """Tile an image of ``height`` x ``width`` pixels with square patches of side ``patch``, that overlap by
    ``overlap`` pixels; see :func:`starts` for the borders and errors.
    """
    ys, xs = starts(height, patch, overlap), starts(width, patch, overlap)
    rows, columns = (grid.ravel() for grid in np.meshgrid(ys, xs, indexing="ij"))
    inside = (np.arange(patch)[:, None] * width + np.arange(patch)).ravel()
    before = [np.concatenate([[0], along[:-1] + patch - along[1:]]).clip(min=0) for along in (ys, xs)]
    top, left = (grid.ravel() for grid in np.meshgrid(before[0], before[1], indexing="ij"))
    levels = _levels(ys, xs, patch).ravel()
    waves = [np.flatnonzero(levels == level) for level in range(levels.max() + 1)]
    return Layout(
        height=height,
        width=width,
        patch=patch,
        pixels=torch.from_numpy((rows * width + columns)[:, None] + inside),
        left=torch.from_numpy(left),
        top=torch.from_numpy(top),
        waves=tuple(map(torch.from_numpy, waves)),
    )


def _levels(ys: Array, xs: Array, patch: int) -> Array:
    """The wave of each patch: one more than the latest wave of the patches that it meets and follows in raster order.

    With the usual small overlap that is its column plus twice its row: a diagonal of the image.
    """
    # From which to which column a patch meets others; rows above it likewise.
    first, last = (np.searchsorted(xs, xs - patch, side="right"), np.searchsorted(xs, xs + patch, side="left"))
    above = np.searchsorted(ys, ys - patch, side="right")
    levels = np.zeros((len(ys), len(xs)), dtype=np.int64)
    for i in range(len(ys)):
        upper = levels[above[i] : i].max(0, initial=-1)
        for j in range(len(xs)):
            met = max(upper[first[j] : last[j]].max(), levels[i, first[j] : j].max(initial=-1))
            levels[i, j] = met + 1
    return levels


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
