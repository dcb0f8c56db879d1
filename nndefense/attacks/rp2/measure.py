"""How often a sticker works: the paper's ratio, on photos that it was not made with, and its interval."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nndefense.attacks.checks import at_least, check_model
from nndefense.attacks.door import widened
from nndefense.attacks.losses import Model
from nndefense.attacks.rp2.sticker import Sticker, check_scene
from nndefense.attacks.rp2.views import ViewChanges, as_photographed
from nndefense.errors import InputError
from nndefense.statistics import wilson_interval


@dataclass(frozen=True)
class Rate:
    """A targeted success rate (Eykholt et al. 2018, section 4.2, equation 4).

    Attributes:
        hits: views seen as the target with the sticker and classified correctly without it.
        views: views classified correctly without the sticker: the denominator.
        shown: all views.
        photos: photos with at least one view in the denominator; the views of one photo are not independent.
    """

    hits: int
    views: int
    shown: int
    photos: int

    @property
    def value(self) -> float | None:
        """hits / views, or None where no view is classified correctly without the sticker."""
        return self.hits / self.views if self.views else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % Wilson interval, as if every photo had been seen once.

        The views of one photo succeed and fail together, so photos are counted, not views: with several views a photo
        the interval is wider than it need be, never narrower.
        """
        return wilson_interval(self.hits / self.views * self.photos, self.photos) if self.views else None


@dataclass(frozen=True)
class Seen:
    """What the model saw, each views-a-photo x N: the class without and with the sticker, and its probability."""

    clean: Tensor
    attacked: Tensor
    clean_probability: Tensor
    attacked_probability: Tensor

    def rate(self, truth: int, target: int) -> Rate:
        """The paper's ratio for an object of class ``truth`` that is to become ``target``; errors as for
        :func:`success`.
        """
        return success(self.clean, self.attacked, truth, target)


def success(clean: Tensor, attacked: Tensor, truth: int, target: int) -> Rate:
    """The paper's ratio from predicted classes.

    Args:
        clean, attacked: class numbers of the views without and with the sticker: views-a-photo x N, or N where each
            photo was seen once.
        truth: the object's class.
        target: the class that it is to become.

    Raises:
        InputError: shapes that differ, or a target that is the truth.
    """
    if clean.shape != attacked.shape or clean.dim() not in (1, 2) or clean.numel() == 0:
        raise InputError(f"predictions {tuple(clean.shape)} and {tuple(attacked.shape)} are not of the same views")
    if truth == target:
        raise InputError(f"the target is class {target}, which is the object's own: choose another one")
    right = (clean == truth).reshape(-1, clean.shape[-1])
    hit = right & (attacked == target).reshape(right.shape)
    return Rate(int(hit.sum()), int(right.sum()), right.numel(), int(right.any(0).sum()))


@torch.no_grad()
def look(
    model: Model,
    photos: Tensor,
    sticker: Sticker,
    *,
    matrices: Tensor | None = None,
    light: Tensor | None = None,
    changes: ViewChanges | None = None,
    views: int = 1,
    seed: int = 0,
) -> Seen:
    """Show the model every photo without and with the sticker, in the same views.

    Args:
        model: images N x C x H x W in [0, 1] -> logits N x K.
        photos: N x C x H x W in [0, 1]; for an honest rate, none that the sticker was made with.
        sticker: the sticker.
        matrices, light: as for :func:`~nndefense.attacks.rp2.rp2`.
        changes: synthetic view changes, drawn anew for each photo and view; None for the photos as they are.
        views: views of each photo; 1 without ``changes``.
        seed: of the view changes.

    Raises:
        InputError: an input that cannot be used, or a model in training mode.
    """
    check_model(model)
    matrices, light = check_scene(photos, matrices, light)
    model, photos = widened(model, photos)
    views = at_least("views", views)
    generator = torch.Generator().manual_seed(seed)
    pasted = sticker.on(photos, matrices, light).to(photos)
    rows: list[list[Tensor]] = [[], [], [], []]
    for _ in range(views if changes else 1):
        view = changes.draw(len(photos), generator) if changes else as_photographed(len(photos))
        for place, images in enumerate((photos, pasted)):
            probability, predicted = model(view(images)).softmax(1).max(1)
            rows[place].append(predicted.cpu())
            rows[place + 2].append(probability.cpu())
    clean, attacked, sure, attacked_sure = (torch.stack(part) for part in rows)
    return Seen(clean, attacked, sure, attacked_sure)
