"""Total variation minimisation as a transformation: drop pixels at random, and redraw them as plainly as possible."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nndefense.attacks.checks import at_least
from nndefense.defenses.transforms.tv_problem import check_terms
from nndefense.defenses.transforms.tv_solver import minimize_total_variation
from nndefense.errors import InputError

MASKS = ("pixel", "entry")


class TotalVariation(nn.Module):
    """Total variation minimisation (Guo et al., ICLR 2018, section 4).

    Each pixel is kept with probability ``keep``, all of its channels or none (Athalye et al. 2018; ``mask="entry"``
    draws for each channel apart, as the authors' code does). The mask is drawn and handed to the solver as such: black
    pixels that were kept are never taken for dropped ones, nor the reverse. The image is the minimiser of
    ``1/2 |m (z - x)|_2^2 + weight TV(z)``, to a proved share of its objective; the other readings of the paper are
    options, see :mod:`nndefense.defenses.transforms.tv_problem`. The weight .03 is the authors'.

    Draws from torch's default generator of the images' device. There is no useful gradient: attack it with BPDA, and
    average over masks (EOT).

    Args:
        weight: of the total variation, positive.
        keep: share of pixels that are kept, in (0, 1]; 1 draws no mask.
        mask: ``pixel`` or ``entry``.
        kind: ``isotropic``, ``anisotropic`` or ``lines``.
        data: ``squared`` or ``norm``.
        tolerance: greatest gap as a share of the objective.
        max_iterations: of the solver; an image that needs more is given back as it is then, with a warning.
        warm_start: begin each solution at the last one for a batch of the same shape, which helps when images
            change little from call to call, as under attack; the mask differs all the same. What comes out is within
            the same tolerance, but depends on what was asked before, so it is off unless asked for.

    Raises:
        InputError: settings that cannot be used.
    """

    def __init__(
        self,
        weight: float = 0.03,
        *,
        keep: float = 0.5,
        mask: str = "pixel",
        kind: str = "isotropic",
        data: str = "squared",
        tolerance: float = 1e-3,
        max_iterations: int = 2000,
        warm_start: bool = False,
    ) -> None:
        super().__init__()
        check_terms(kind, data, weight)
        at_least("max_iterations", max_iterations)
        if not 0 < keep <= 1:
            raise InputError(f"keep is {keep}, but must lie in (0, 1]: it is the share of pixels that stay")
        if mask not in MASKS:
            raise InputError(f"mask is {mask!r}, but must be one of {', '.join(MASKS)}")
        if not 1e-6 <= tolerance < 1:
            raise InputError(f"tolerance is {tolerance}, but must be from 1e-6 to 1")
        self.weight, self.keep, self.mask, self.kind, self.data = weight, keep, mask, kind, data
        self.tolerance, self.max_iterations, self.warm_start = tolerance, max_iterations, warm_start
        self._last: Tensor | None = None
        self.eval()

    def draw(self, images: Tensor) -> Tensor:
        """A mask of kept pixels for these images: booleans N x 1 x H x W, or N x C x H x W with ``mask="entry"``."""
        count, channels, height, width = images.shape
        shape = (count, channels if self.mask == "entry" else 1, height, width)
        return torch.rand(shape, device=images.device) < self.keep

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images N x C x H x W in [0, 1] -> images of the same shape in [0, 1]."""
        keep = None if self.keep == 1 else self.draw(images)
        last = self._last
        warm = last is not None and last.shape == images.shape and last.device == images.device
        start = last.to(images.dtype) if warm and last is not None else None
        if start is not None and keep is not None:
            start = torch.where(keep, images, start)
        found = minimize_total_variation(
            images,
            self.weight,
            keep=keep,
            kind=self.kind,
            data=self.data,
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
            start=start,
        ).images
        if self.warm_start:
            self._last = found
        return found

    def extra_repr(self) -> str:
        """The settings, for people."""
        return (
            f"weight={self.weight}, keep={self.keep}, mask={self.mask}, kind={self.kind}, data={self.data}, "
            f"tolerance={self.tolerance:g}"
        )
