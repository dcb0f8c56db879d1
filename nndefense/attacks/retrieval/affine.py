"""Whether a feature is affine in the pixels, and which affine function it is; found by probing alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nndefense.errors import InputError

_PIECE = 1024
# Rounding in float32 leaves some 1e-6 of a feature's size; a kink in a single unit of a net some 1e-2.
_AFFINE = 1e-4


@dataclass(frozen=True)
class AffineFeature:
    """``f(x) = matrix x + offset`` of flattened images, float64.

    Attributes:
        matrix, offset: F x d and F, on the CPU.
        error: the largest length of ``f(x) - (matrix x + offset)`` that was seen.
    """

    matrix: Tensor
    offset: Tensor
    error: float

    def __call__(self, images: Tensor) -> Tensor:
        """Images N x C x H x W -> N x F, float64, on the CPU."""
        return images.cpu().flatten(1).double() @ self.matrix.T + self.offset


@torch.no_grad()
def affine_feature(features: Callable[[Tensor], Tensor], images: Tensor) -> AffineFeature:
    """Find the affine function that a feature is.

    It is fitted by least squares to the feature of random images, which averages the rounding of float32 away, and
    compared with the feature on others: random ones, black-and-white ones, single bright pixels, those given, their
    negatives and mixtures. That is a check and not a proof: a unit that bends on none of them is not seen.

    Args:
        features: images N x C x H x W in [0, 1] -> vectors N x F.
        images: at least one; those that matter.

    Raises:
        InputError: the feature is not affine.
    """
    shape, d = images.shape[1:], images.shape[1:].numel()
    generator = torch.Generator().manual_seed(0)

    def drawn(count: int) -> Tensor:
        return torch.rand((count, *shape), generator=generator)

    def ask(asked: Tensor) -> Tensor:
        return torch.cat([features(part.to(images)).cpu().double() for part in torch.split(asked, _PIECE)])

    probes = drawn(4 * (d + 1))
    # Centred, so that the offset is found as well as the slopes.
    system = torch.nn.functional.pad(probes.flatten(1).double() - 0.5, (0, 1), value=1.0)
    solution = torch.linalg.lstsq(system, ask(probes)).solution
    matrix = solution[:-1].T.contiguous()
    offset = solution[-1] - 0.5 * matrix.sum(1)
    some = images[:: max(len(images) // 256, 1)].cpu()
    single = torch.eye(d)[:: max(d // 256, 1)].view(-1, *shape)
    mixed = some + drawn(len(some)) * (drawn(len(some)).round() - some)
    checks = torch.cat([drawn(256), drawn(256).round(), single, 0 * single[:1], some, 1 - some, mixed])
    found = ask(checks)
    error = (found - (checks.flatten(1).double() @ matrix.T + offset)).norm(dim=1)
    if not bool((error <= _AFFINE * found.norm(dim=1).max()).all()):
        raise InputError(
            "the exact accuracy needs a feature that is affine in the pixels (pixels, or a first convolution before "
            f"its non-linearity), but this one departs from that by {float(error.max() / found.norm(dim=1).max()):.1g} "
            "of its size: take such a layer (nndefense index build --layer)"
        )
    return AffineFeature(matrix, offset, float(error.max()))
