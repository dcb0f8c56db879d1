"""What excites a unit, and what a direction: Szegedy et al., Intriguing properties of neural networks (ICLR 2014)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nndefense.errors import InputError
from nndefense.theory.solve import Array, matrix_of

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Exciting:
    """The images that most excite each of R directions of a space of activations.

    Attributes:
        names: of the directions.
        chosen: R x count, image numbers, the most exciting first.
        shares: R, the share of the most frequent label among them: 1 where all have one label.
    """

    names: tuple[str, ...]
    chosen: Numbers
    shares: Array

    def to_json(self) -> dict[str, Any]:
        """How many, and the mean, 5 % and 95 % quantile of the shares."""
        low, high = np.quantile(self.shares, (0.05, 0.95))
        return {
            "directions": len(self.names),
            "share": float(self.shares.mean()),
            "low": float(low),
            "high": float(high),
        }


def exciting(
    activations: Array, labels: Numbers, *, count: int = 8, draws: int = 1000, seed: int = 0
) -> dict[str, Exciting]:
    """Find the images that most excite single units, random directions, and nothing (images drawn at random).

    An image x excites a direction v by ``phi(x) . v``, and a unit by its entry of phi(x). Directions are standard
    normal. Units that are the same for all images excite nothing and are left out.

    Args:
        activations: phi, N x D.
        labels: N.
        count: images for each direction, below N.
        draws: random directions, and random sets of images.
        seed: of both.

    Returns:
        ``units``, ``directions`` and ``chance``.

    Raises:
        InputError: too few images, activations that are not numbers, or that are the same for all images.
    """
    activations = matrix_of(activations, "activations")
    images = len(activations)
    if not 0 < count < images or draws < 1:
        raise InputError(f"{count} of {images} images cannot be the most exciting: give more images, or ask for fewer")
    live = np.flatnonzero(np.ptp(activations, axis=0) > 0)
    if not len(live):
        raise InputError("all units of the layer are the same for all images: choose another layer")
    generator = np.random.default_rng(seed)
    directions = generator.normal(size=(draws, activations.shape[1]))
    # A tie goes to the earlier image, and so to no machine's order of sorting.
    found = {
        "units": (tuple(f"unit {unit}" for unit in live), activations[:, live]),
        "directions": (tuple(f"direction {number}" for number in range(draws)), activations @ directions.T),
        "chance": (tuple(f"draw {number}" for number in range(draws)), generator.random((images, draws))),
    }
    return {
        kind: Exciting(names, chosen, _largest_shares(labels[chosen]))
        for kind, (names, chosen) in (
            (kind, (names, np.argsort(-size, axis=0, kind="stable")[:count].T)) for kind, (names, size) in found.items()
        )
    }


def _largest_shares(labels: Numbers) -> Array:
    return np.array([np.unique(row, return_counts=True)[1].max() / len(row) for row in labels])
