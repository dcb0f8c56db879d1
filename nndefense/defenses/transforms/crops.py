"""Square crops of an image, brought back to its size, at random places or on a grid; the defence that averages them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nndefense.attacks.checks import at_least, fraction
from nndefense.defenses.transformed import TransformDefense
from nndefense.errors import InputError
from nndefense.models import Classifier
from nndefense.modes import EvaluationOnly

#: 90 of 224 pixels (Guo et al., ICLR 2018, section 4).
CROP_SIZE = 90 / 224


def resized_crops(images: Tensor, corners: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut a window out of each image and stretch it to the image's size, bilinearly; differentiable.

    Sampling is that of ``interpolate(window, align_corners=False)``: nothing outside the window is looked at.

    Args:
        images: N x C x H x W.
        corners: the windows' upper left pixels as (row, column), int64, N x 2.
        size: rows and columns of a window.

    Returns:
        N x C x H x W.
    """
    height, width = images.shape[2:]
    rows, row_shares = _taps(corners[:, 0], size[0], height, images)
    columns, column_shares = _taps(corners[:, 1], size[1], width, images)
    # Two rows, then two columns of each: what bilinear sampling on a grid of straight lines comes to.
    picked = rows[:, :, None, :, None].expand(-1, -1, images.shape[1], -1, width)
    upper, lower = (images.gather(2, picked[:, side]) for side in (0, 1))
    bands = torch.lerp(upper, lower, row_shares[:, None, :, None])
    picked = columns[:, :, None, None, :].expand(-1, -1, images.shape[1], height, -1)
    left, right = (bands.gather(3, picked[:, side]) for side in (0, 1))
    return torch.lerp(left, right, column_shares[:, None, None, :])


def _taps(first: Tensor, length: int, wanted: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The two pixels that each of ``wanted`` samples lies between, N x 2 x wanted, and the second's share."""
    places = (torch.arange(wanted, device=like.device, dtype=like.dtype) + 0.5) * (length / wanted) - 0.5
    places = places.clamp(0, length - 1)
    below = places.floor().clamp_max(max(length - 2, 0))
    pair = torch.stack([below, (below + 1).clamp_max(length - 1)]).long()
    return first[:, None, None] + pair, (places - below).expand(len(first), -1)


def window(images: Tensor, size: float) -> tuple[int, int]:
    """Rows and columns of a crop of this share of the side; at least one pixel."""
    rows, columns = (max(1, round(size * side)) for side in images.shape[2:])
    return rows, columns


class RandomCrop(EvaluationOnly):
    """One crop per image, each at its own place drawn uniformly, resized to the image (Guo et al., ICLR 2018).

    Differentiable.

    Args:
        size: side of the crop as a share of the image's, in (0, 1].

    Raises:
        InputError: a size that cannot be used.
    """

    def __init__(self, size: float = CROP_SIZE) -> None:
        super().__init__()
        fraction("size", size)
        self.size = size

    def draw(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A place for each of N ``images`` by ``generator``, as shares of the free rows and columns: N x 2 in [0, 1),
        float64.
        """
        return torch.rand(len(images), 2, generator=generator, dtype=torch.float64).to(images.device)

    def forward(self, images: Tensor, drawn: Tensor | None = None) -> Tensor:
        """``images`` N x C x H x W and places ``drawn`` by :meth:`draw` (here by default) -> a crop of each, of the
        same shape.
        """
        places = self.draw(images) if drawn is None else drawn
        rows, columns = window(images, self.size)
        free = torch.tensor([images.shape[2] - rows + 1, images.shape[3] - columns + 1], device=images.device)
        return resized_crops(images, (places * free).long(), (rows, columns))


class GridCrops(EvaluationOnly):
    """The crops on a grid of places that reaches from border to border, one after another (AID's 9-crop variant).

    Differentiable and without chance.

    Args:
        size: side of the crop as a share of the image's, in (0, 1].
        crops: their number, a square: 9 for a grid of 3 x 3.

    Raises:
        InputError: settings that cannot be used.
    """

    def __init__(self, size: float = CROP_SIZE, crops: int = 9) -> None:
        super().__init__()
        fraction("size", size)
        crops = at_least("crops", crops)
        if math.isqrt(crops) ** 2 != crops:
            raise InputError(f"crops is {crops}, but a grid needs a square number, such as 9 or 16")
        self.size, self.crops = size, crops

    def forward(self, images: Tensor) -> Tensor:
        """``images`` N x C x H x W -> all crops of the first, then of the second...: N * crops x C x H x W."""
        rows, columns = window(images, self.size)
        side = math.isqrt(self.crops)
        down, across = (
            torch.linspace(0, free, side, dtype=torch.float64, device=images.device).round().long()
            if side > 1
            else torch.tensor([free // 2], device=images.device)
            for free in (images.shape[2] - rows, images.shape[3] - columns)
        )
        places = torch.cartesian_prod(down, across).repeat(len(images), 1)
        return resized_crops(images.repeat_interleave(self.crops, 0), places, (rows, columns))


class GridCropEnsemble(TransformDefense):
    """The average of a classifier's probabilities over crops on a grid; without chance, and differentiable.

    Args:
        classifier: any classifier.
        size: side of the crops as a share of the image's, in (0, 1].
        crops: their number, a square.

    Raises:
        InputError: settings that cannot be used.
    """

    def __init__(self, classifier: Classifier, *, size: float = CROP_SIZE, crops: int = 9) -> None:
        super().__init__(classifier, GridCrops(size, crops), differentiable=True, random=False, views=crops)


def crop_ensemble(
    classifier: Classifier,
    *,
    crops: int | None = None,
    size: float = CROP_SIZE,
    grid: bool = False,
    attack_draws: int | None = None,
    seed: int | None = None,
) -> TransformDefense:
    """Average the classifier over crops of the image (Guo et al., ICLR 2018, section 4).

    30 crops of 90 / 224 of the side at random places, each resized to the image's size, softmax averaged. Athalye et
    al. (2018) leave the crops at 90 pixels, which only a net without fixed input size can take; not offered.
    ``grid`` gives the variant of the authors' code: 9 crops on a grid of 3 x 3.

    Args:
        classifier: any classifier.
        crops: their number; by default 30, or 9 on the grid.
        size: side of a crop as a share of the image's, in (0, 1].
        grid: crops on a grid instead of at random places.
        attack_draws: crops per step of an attack (EOT); by default as many as the defence takes, and 10 at least.
        seed: of the places; None draws a secret one.

    Raises:
        InputError: settings that cannot be used.
    """
    count = at_least("crops", (9 if grid else 30) if crops is None else crops)
    if grid:
        return GridCropEnsemble(classifier, size=size, crops=count)
    options: dict[str, Any] = {"draws": count, "attack_draws": attack_draws, "seed": seed}
    return TransformDefense(classifier, RandomCrop(size), differentiable=True, random=True, **options)
