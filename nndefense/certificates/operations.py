"""A net as a list of tensor operations that linear bounds can pass: affine ones, ReLU, and maxima over places.

Each has its interval, and carries heads, linear functions of its output, to its sources. Around ReLU and maxima there
are lines for that; there are N boxes and H heads, each of which has the box of its owner.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_NOWHERE = -1e30
Call = Callable[..., Tensor]
Pull = Callable[[Tensor], Sequence[Tensor]]


class Box(NamedTuple):
    """Least and largest values, N x S each."""

    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class Step(ABC):
    """An operation on the outputs of earlier steps.

    Attributes:
        sources: their numbers, from 1; the images themselves are 0.
        shape: S, that of its output for one image.
    """

    sources: tuple[int, ...]
    shape: torch.Size

    @abstractmethod
    def interval(self, *boxes: Box) -> Box:
        """The box of the output over boxes of the sources."""


@dataclass(frozen=True)
class Affine(Step):
    """Affine in its sources together.

    Attributes:
        call: the sources -> the output.
        size: how far each source moves -> how far the output moves.
        adjoint: heads H x S -> heads on each source.
        diagonal: each output depends on one coordinate of a source, and no two on the same.
        offset: 1 x S, the output where all sources are 0.
    """

    call: Call
    size: Call
    adjoint: Pull
    diagonal: bool
    offset: Tensor

    def interval(self, *boxes: Box) -> Box:
        """The box of the output over boxes of the sources."""
        middle = self.call(*((box.low + box.high) / 2 for box in boxes))
        reach = self.size(*((box.high - box.low) / 2 for box in boxes))
        return Box(middle - reach, middle + reach)


class Lines(ABC):
    """Linear bounds of a step that is not affine, from below and from above."""

    @abstractmethod
    def pull(self, heads: Tensor, owner: Tensor, slopes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Heads on the output -> heads on its source and a constant each, that together are never more.

        Args:
            heads: H x S.
            owner: H, the numbers of the boxes; or 1, that of all.
            slopes: H x S, of the lines from below where these may have any from 0 to 1.
        """


@dataclass(frozen=True)
class Bend(Step):
    """What is not affine."""

    @abstractmethod
    def open(self, box: Box) -> Tensor:
        """Where in the source, N x its shape, a tighter box would make for tighter lines."""

    @abstractmethod
    def lines(self, box: Box) -> Lines:
        """The lines over a box of the source."""


@dataclass(frozen=True)
class Relu(Bend):
    """ReLU."""

    def interval(self, *boxes: Box) -> Box:
        """The box of the output over that of the source."""
        (box,) = boxes
        return Box(box.low.clamp_min(0), box.high.clamp_min(0))

    def open(self, box: Box) -> Tensor:
        """Where the source is on both sides of 0."""
        return (box.low < 0) & (box.high > 0)

    def lines(self, box: Box) -> ReluLines:
        """From above the chord; from below, of 0 and the identity the one that cuts off less."""
        bent = self.open(box)
        width = torch.where(bent, box.high - box.low, 1.0)
        above = torch.where(bent, box.high / width, (box.low >= 0).to(width))
        below = torch.where(bent, (box.high > -box.low).to(width), above)
        return ReluLines(bent, below, above, torch.where(bent, -above * box.low, 0.0))


@dataclass(frozen=True)
class ReluLines(Lines):
    """``below x <= relu(x) <= above x + level``, each N x S; ``below`` is free where the ReLU is ``bent``."""

    bent: Tensor
    below: Tensor
    above: Tensor
    level: Tensor

    def pull(self, heads: Tensor, owner: Tensor, slopes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As :meth:`Lines.pull`."""
        below = self.below[owner] if slopes is None else torch.where(self.bent[owner], slopes, self.below[owner])
        constant = (heads.clamp_max(0) * self.level[owner]).flatten(1).sum(1)
        return heads * torch.where(heads > 0, below, self.above[owner]), constant


@dataclass(frozen=True)
class Maximum(Bend):
    """Maxima over windows of places, in each of C channels.

    Attributes:
        windows: k x W, numbers of the P places, and P where a window reaches over the edge.
        source: the shape of the source; its last axes are the places.
        channels: C.
    """

    windows: Tensor
    source: torch.Size
    channels: int

    def _seen(self, values: Tensor) -> Tensor:
        """N x the source's shape -> N x C x k x W."""
        flat = F.pad(values.reshape(len(values), self.channels, -1), (0, 1), value=_NOWHERE)
        return flat[:, :, self.windows]

    def interval(self, *boxes: Box) -> Box:
        """The box of the output over that of the source."""
        (box,) = boxes
        low, high = (self._seen(part).amax(2).reshape(-1, *self.shape) for part in box)
        return Box(low, high)

    def open(self, box: Box) -> Tensor:
        """Where several places of a window may hold its maximum."""
        low, high = self._seen(box.low), self._seen(box.high)
        live = high > low.amax(2, keepdim=True)
        live &= live.sum(2, keepdim=True) > 1
        found = torch.zeros_like(F.pad(box.low.reshape(len(live), self.channels, -1), (0, 1)))
        found = found.index_add(2, self.windows.flatten(), live.flatten(2).to(found))
        return (found[..., :-1] > 0).view_as(box.low)

    def lines(self, box: Box) -> MaximumLines:
        """From below the place with the highest middle. From above the lower of two planes: with m the highest lower
        end, ``m + sum_i max(x_i - m, 0)`` with the chord of each, and the highest upper end.
        """
        low, high = self._seen(box.low), self._seen(box.high)
        floor, top = low.amax(2), high.amax(2)
        excess = (high - floor[:, :, None]).clamp_min(0)
        slope = excess / torch.where(excess > 0, high - low, 1.0)
        sloped = excess.sum(2) / 2 <= top - floor
        slope = torch.where(sloped[:, :, None], slope, 0.0)
        level = torch.where(sloped, floor - (slope * low).sum(2), top)
        first = (low + high).argmax(2)
        picked = self.windows.T[torch.arange(self.windows.shape[1], device=first.device), first]
        return MaximumLines(self, picked, slope, level)


@dataclass(frozen=True)
class MaximumLines(Lines):
    """``x[picked] <= max <= sum_k above x + level``: N x C x W, N x C x k x W and N x C x W."""

    step: Maximum
    picked: Tensor
    above: Tensor
    level: Tensor

    def pull(self, heads: Tensor, owner: Tensor, slopes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As :meth:`Lines.pull`."""
        windows, source = self.step.windows, self.step.source
        flat = heads.reshape(len(heads), self.step.channels, -1)
        down = flat.clamp_max(0)
        spread = (down[:, :, None] * self.above[owner]).flatten(2)
        zeros = heads.new_zeros(len(heads), self.step.channels, source.numel() // self.step.channels + 1)
        pulled = zeros.index_add(2, windows.flatten(), spread).scatter_add(
            2, self.picked[owner].expand_as(flat), flat.clamp_min(0)
        )
        constant = (down * self.level[owner]).flatten(1).sum(1)
        return pulled[..., :-1].reshape(len(heads), *source), constant
