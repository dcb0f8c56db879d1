"""Linear bound propagation: what a net's outputs can be while the image stays in a ball (CROWN).

Intervals go forward; linear bounds go backward (Zhang et al., NeurIPS 2018): a linear head on the output is carried to
the pixels, through each ReLU by the line below or above it that the sign of its coefficient asks for, and the linear
function that arrives there is least at a corner of the box or at the dual norm of the ball. The lines rest on bounds
of what enters each ReLU, found in the same way, for those that are not already on one side of 0. The slope of the line
below is free from 0 to 1, and a few steps along its gradient tighten each head (Xu et al., ICLR 2021).

The net is read as the graph of its tensor operations, so that it does not matter how its code is written: convolution,
linear layers, batch normalisation, averages, sums, reshapes, ReLU and maxima over places are known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nndefense.attacks.registry import NORMS
from nndefense.certificates.operations import Affine, Bend, Box, Lines, ReluLines, Step
from nndefense.certificates.recording import read_steps
from nndefense.errors import InputError, check_choice
from nndefense.modes import evaluating

# Numbers in the largest tensor of a block.
_ROOM = 1 << 21
# Heads of an image that are worth a block of their own.
_MANY = 64
# Numbers that heads on all neurons of an image may carry backward: it is minutes on one core.
_MOST = 1 << 30
# Float32's rounding is far below.
_SAME = 1e-4
_RATE = 0.1
# Steps on slopes after which it is looked at what they gained, and what all of them may gain, in multiples of so much a
# step.
_TRIED, _HOPE = 2, 2.0


@dataclass(frozen=True)
class Ball:
    """The images of [0, 1] within ``eps`` of N images: what heads are least over.

    Attributes:
        center, low, high: N x C x H x W, float64: the images, and the box around their balls.
        eps: the radius.
        norm: ``linf`` or ``l2``.
    """

    center: Tensor
    low: Tensor
    high: Tensor
    eps: float
    norm: str

    @classmethod
    def of(cls, images: Tensor, eps: float, norm: str) -> Ball:
        """The balls of one radius around images N x C x H x W in [0, 1]."""
        check_choice("norm", norm, NORMS[:2])
        if not 0 <= eps < math.inf:
            raise InputError(f"eps is {eps}, but must be at least 0 and finite")
        center = images.double()
        return cls(center, (center - eps).clamp_min(0), (center + eps).clamp_max(1), eps, norm)

    def least(self, slope: Tensor, owner: Tensor) -> Tensor:
        """Lower bounds H of ``slope . x`` (H x C x H x W) over the balls ``owner`` (H); exact for ``linf``."""
        slope, low, high = slope.flatten(1), self.low.flatten(1)[owner], self.high.flatten(1)[owner]
        found = (slope * torch.where(slope > 0, low, high)).sum(1)
        if self.norm == "l2":
            round_ = (slope * self.center.flatten(1)[owner]).sum(1) - self.eps * slope.norm(dim=1)
            found = torch.maximum(found, round_)
        return found


class LinearBounds:
    """A net that can be bounded: images N x C x H x W -> vectors N x F, as steps that are affine, ReLU or a maximum."""

    def __init__(self, net: Callable[[Tensor], Tensor], example: Tensor) -> None:
        """
        Args:
            net: an image's output must depend on that image alone; it is held in evaluation mode while it is read.
            example: one or more images that it takes.

        Raises:
            InputError: a net that cannot be read, or with an operation that is not known.
        """
        self.steps = read_steps(net, example)
        with evaluating(*([net] if isinstance(net, nn.Module) else [])), torch.no_grad():
            expected = net(example[:2]).double()
        found = self(example[:2])
        if found.shape != expected.shape or not bool(((found - expected).abs() <= _SAME * expected.abs().max()).all()):
            raise InputError(
                "linear bounds need a net that answers for each image alone and always in the same way, and this one "
                "answers otherwise when it is run again"
            )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """The net's own answer N x F, in float64."""
        points = [Box(images.double(), images.double())]
        for step in self.steps:
            points.append(step.interval(*(points[source] for source in step.sources)))
        return points[-1].low

    def over(self, images: Tensor, eps: float, norm: str = "linf") -> Bounded:
        """The bounds of everything inside the net while each of the images moves by ``eps`` within [0, 1].

        Raises:
            InputError: another norm, or an eps that is none.
        """
        return Bounded(self.steps, Ball.of(images, eps, norm))

    def check_size(self) -> None:
        """Raise :class:`InputError` for a net that would take minutes an image."""
        sizes = [step.shape.numel() for step in self.steps]
        bent = [step.sources[0] for step in self.steps if isinstance(step, Bend) and step.sources[0]]
        # What enters the first bend has, or nearly has, an exact interval.
        if sum(sizes[source - 1] * sum(sizes[:source]) for source in bent[1:]) > _MOST:
            raise InputError(
                "linear bounds would take minutes an image on a net of this size: index an earlier layer (nndefense "
                "index build --layer), or use a smaller net; this one has up to "
                f"{max(sizes[n - 1] for n in bent):,} ReLUs a layer"
            )


class Bounded:
    """A net over the balls around N images: lower bounds of heads on its output.

    Attributes:
        ball: the balls.
        low, high: N x F: the box of the output.
    """

    @torch.no_grad()
    def __init__(self, steps: Sequence[Step], ball: Ball) -> None:
        self.ball, self._steps = ball, steps
        self._boxes, self._lines = [Box(ball.low, ball.high)], dict[int, Lines]()
        # Steps whose coordinates move each on its own, and those whose intervals are therefore exact.
        alone = exact = {0} if ball.norm == "linf" else set[int]()
        for number, step in enumerate(steps, 1):
            if isinstance(step, Bend):
                (source,) = step.sources
                if source not in exact and not isinstance(steps[source - 1], Bend):
                    self._tighten(source, step.open(self._boxes[source]))
                self._lines[number] = step.lines(self._boxes[source])
            elif isinstance(step, Affine) and len(step.sources) == 1:
                alone = alone | {number} if step.diagonal and step.sources[0] in alone else alone
                near = exact if step.diagonal else alone
                exact = exact | {number} if step.sources[0] in near else exact
            self._boxes.append(step.interval(*(self._boxes[source] for source in step.sources)))
        self._tighten(len(steps), torch.ones_like(self._boxes[-1].low, dtype=torch.bool))
        self.low, self.high = self._boxes[-1]

    def _tighten(self, target: int, open_: Tensor) -> None:
        """Bound coordinates of a step (N x its shape, truth values) backward."""
        box = self._boxes[target]
        owner, place = open_.flatten(1).nonzero().unbind(1)
        low, high = (part.flatten(1).clone() for part in box)
        for part in self._blocks(owner):
            mine, where = owner[part], place[part]
            heads = low.new_zeros(len(mine), low.shape[1]).scatter_(1, where[:, None], 1.0)
            heads = heads.view(-1, *box.low.shape[1:])
            low[mine, where] = torch.maximum(low[mine, where], self._backward(target, heads, mine))
            high[mine, where] = torch.minimum(high[mine, where], -self._backward(target, -heads, mine))
        self._boxes[target] = Box(low.view_as(box.low), high.view_as(box.high))

    def _blocks(self, owner: Tensor, share: int = 1) -> list[slice]:
        """Heads that are carried at once; where an image has many, of that image alone, whose lines are not copied."""
        room = max(1, _ROOM // share // max(box.low[0].numel() for box in self._boxes))
        _, counts = torch.unique_consecutive(owner, return_counts=True)
        alone = len(owner) >= _MANY * len(counts)
        blocks, first = [], 0
        for count in counts.tolist() if alone else [len(owner)]:
            blocks += [slice(start, min(start + room, first + count)) for start in range(first, first + count, room)]
            first += count
        return blocks

    def least(self, heads: Tensor, owner: Tensor, *, steps: int = 0, need: Tensor | None = None) -> Tensor:
        """Lower bounds of linear heads on the output.

        Args:
            heads: H x F.
            owner: H, the number of the image that each is over.
            steps: of gradient ascent on the slopes, for each head its own; 0 takes them as they are.
            need: H, what is asked of each: one that is above it, or will not get there, is not raised any further.

        Returns:
            H, float64: ``heads . net(x)`` is at least this for every x in the ball.
        """
        heads, parts = heads.to(self.low), []
        for part in self._blocks(owner, 8 if steps else 1):
            asked = need[part] if need is not None else None
            parts.append(self._ascend(heads[part], owner[part], steps, asked))
        return torch.cat(parts) if parts else heads.new_zeros(0)

    def _ascend(self, heads: Tensor, owner: Tensor, steps: int, need: Tensor | None) -> Tensor:
        """The best bounds that a few steps on the slopes find; any slopes from 0 to 1 are sound."""
        with torch.no_grad():
            best = begun = self._backward(len(self._steps), heads, owner)
        if not steps:
            return best
        with torch.inference_mode(False), torch.enable_grad():
            slopes = {
                number: lines.below[owner].clone()
                for number, lines in self._lines.items()
                if isinstance(lines, ReluLines)
            }
            left = torch.arange(len(heads), device=heads.device)
            for done, count in ((0, min(_TRIED, steps)), (_TRIED, steps - _TRIED)):
                if need is not None:
                    reach = begun + (best - begun) * (_HOPE * steps / done) if done else need + 1
                    keep = ((best <= need) & (reach > need))[left]
                    left, slopes = left[keep], {number: slope[keep] for number, slope in slopes.items()}
                if slopes and len(left) and count > 0:
                    found = self._raise(heads[left], owner[left], slopes, count)
                    best = best.index_put((left,), torch.maximum(best[left], found))
        return best

    def _raise(self, heads: Tensor, owner: Tensor, slopes: dict[int, Tensor], steps: int) -> Tensor:
        """The best bounds met while slopes, which are moved, go up."""
        for slope in slopes.values():
            slope.requires_grad_()
        optimiser, best = torch.optim.Adam(slopes.values(), lr=_RATE), torch.full_like(heads[:, 0], -torch.inf)
        for step in range(steps + 1):
            with torch.set_grad_enabled(step < steps):
                found = self._backward(len(self._steps), heads, owner, slopes)
            best = torch.maximum(best, found.detach())
            if step == steps:
                break
            optimiser.zero_grad()
            torch.autograd.backward(-found.sum())
            optimiser.step()
            with torch.no_grad():
                for slope in slopes.values():
                    slope.clamp_(0, 1)
        for slope in slopes.values():
            slope.requires_grad_(False)
        return best

    def _backward(self, target: int, heads: Tensor, owner: Tensor, slopes: dict[int, Tensor] | None = None) -> Tensor:
        waiting, total = {target: heads}, heads.new_zeros(len(heads))
        if len(heads) and bool((owner == owner[0]).all()):
            # One box for all: no copies of it.
            owner = owner[:1]
        for number in range(target, 0, -1):
            head = waiting.pop(number, None)
            if head is None:
                continue
            step = self._steps[number - 1]
            if isinstance(step, Affine):
                parts, constant = step.adjoint(head), (head * step.offset).flatten(1).sum(1)
            else:
                pulled, constant = self._lines[number].pull(head, owner, (slopes or {}).get(number))
                parts = [pulled]
            total = total + constant
            for source, part in zip(step.sources, parts, strict=True):
                waiting[source] = waiting[source] + part if source in waiting else part
        return total + self.ball.least(waiting[0], owner) if 0 in waiting else total
