"""The certificate of a retrieval defence on affine features: the exact search, at given budgets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nndefense.attacks.retrieval import RetrievalSurface, run_exact
from nndefense.certificates.record import Certified
from nndefense.errors import InputError


@torch.no_grad()
def certify_exact(
    surface: RetrievalSurface, images: Tensor, *, eps: Sequence[float], norm: str = "l2", limit: int = 10_000
) -> Certified:
    """Prove for each image and budget that no image within it is classified otherwise (:func:`run_exact`).

    Args:
        surface, norm, limit, and errors: as for :func:`~nndefense.attacks.retrieval.run_exact`.
        images: N x C x H x W in [0, 1].
        eps: the budgets; the radius of an image is the largest that is proven.
    """
    if not eps:
        raise InputError("the exact certificate decides at given budgets: give at least one eps (--eps)")
    prediction = surface.predict(images).argmax(1)
    radius = torch.zeros(len(images), dtype=torch.float64, device=images.device)
    standing = torch.arange(len(images), device=images.device)
    for budget in sorted(eps):
        if not len(standing):
            break
        found = run_exact(surface, images[standing], prediction[standing], eps=budget, norm=norm, limit=limit)
        standing = standing[found.certified]
        radius[standing] = budget
    return Certified(prediction, radius, norm)
