"""Synthetic changes of a view: brightness, crop and scale, perspective (Eykholt et al. 2018, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nndefense.attacks.rp2.homography import frame, homography, warp
from nndefense.errors import InputError


@dataclass(frozen=True)
class Views:
    """Drawn view changes: from the photo's frame to the new one, and a factor on its brightness.

    Attributes:
        matrices: n x 3 x 3 homographies in float64.
        gains: n factors, float64.
    """

    matrices: Tensor
    gains: Tensor

    def __len__(self) -> int:
        """The number of views."""
        return len(self.gains)

    def __call__(self, images: Tensor) -> Tensor:
        """Show n images from their new views: n x C x H x W in [0, 1], differentiable in the images."""
        size = (images.shape[2], images.shape[3])
        # A view beyond the photo's edge shows its border, not black: a black frame would be a clue of its own.
        shown = warp(images, self.matrices, size, padding="border")
        return (shown * self.gains.to(images).view(-1, 1, 1, 1)).clamp(0, 1)


@dataclass(frozen=True)
class ViewChanges:
    """How far views may change. The released code's object attack has (.1, 2), .2 and .1.

    Attributes:
        brightness: the least and the largest factor on all pixels; uniform between them.
        crop: the largest share of the side that is cut off at each edge, uniform from 0; in [0, 0.5).
        perspective: standard deviation of each corner's shift, as a share of the side; a normal law cut off at a
            sixth of the side, so that the corners keep their order with any crop.

    Raises:
        InputError: a strength out of its range.
    """

    brightness: tuple[float, float] = (0.6, 1.4)
    crop: float = 0.1
    perspective: float = 0.03

    def __post_init__(self) -> None:
        low, high = self.brightness
        if not 0 < low <= high < float("inf"):
            raise InputError(f"brightness is {low:g} to {high:g}, but must be factors above 0, the lesser one first")
        if not 0 <= self.crop <= 0.3:
            raise InputError(f"crop is {self.crop:g}, but must be a share of the side from 0 to 0.3")
        if not 0 <= self.perspective <= 0.2:
            raise InputError(f"perspective is {self.perspective:g}, but must be a share of the side from 0 to 0.2")

    def draw(self, n: int, generator: torch.Generator) -> Views:
        """Draw n view changes; the same state of the generator gives the same ones on every device.

        Args:
            n: number of views.
            generator: on the CPU.
        """
        numbers = torch.rand(n, 5, generator=generator, dtype=torch.float64)
        # In frame coordinates the side is 2 long. Corners of the part that will fill the new view:
        left, top, right, bottom = (2 * self.crop * numbers[:, :4]).unbind(1)
        corners = frame(n).clone()
        corners[:, [0, 3], 0] += left[:, None]
        corners[:, [1, 2], 0] -= right[:, None]
        corners[:, [0, 1], 1] += top[:, None]
        corners[:, [2, 3], 1] -= bottom[:, None]
        shifts = torch.empty(n, 4, 2, dtype=torch.float64)
        torch.nn.init.trunc_normal_(shifts, std=1.0, a=-3.0, b=3.0, generator=generator)
        corners += (2 * self.perspective * shifts).clamp(-1 / 3, 1 / 3)
        low, high = self.brightness
        return Views(homography(corners, frame(n)), low + (high - low) * numbers[:, 4])


def as_photographed(n: int) -> Views:
    """n views that change nothing."""
    return Views(torch.eye(3, dtype=torch.float64).expand(n, 3, 3), torch.ones(n, dtype=torch.float64))


# The strengths of the released code's attack on objects, for those who want to compare with it.
RELEASED = ViewChanges(brightness=(0.1, 2.0), crop=0.2, perspective=0.1)
