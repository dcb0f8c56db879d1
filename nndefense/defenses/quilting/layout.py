"""Where the patches of a quilt lie, how far each reaches over its neighbours, and which can be laid at once."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nndefense.errors import InputError

Array = NDArray[np.int64]


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
    """Tile an image with patches; see :func:`starts` for the borders and errors."""
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
