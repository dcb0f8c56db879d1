"""Rotations and translations (Engstrom et al., ICML 2019): worst of k random draws, and the worst of a grid.

Their "size" is an angle and a shift, not a norm. Pixels are interpolated bilinearly, and what comes in from outside is
black, as in the code of Raghunathan et al. (ICML 2020).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nndefense.attacks.checks import at_least, check_labels, check_model
from nndefense.attacks.door import any_type, in_working_type, labels_of
from nndefense.attacks.losses import LOSSES, Model, checked_logits
from nndefense.attacks.wrappers import MODES, attacked_in
from nndefense.errors import InputError, check_choice, make_plain
from nndefense.images import check_images

# Three pixels of MNIST's 28, printed as 0.1071.
SHIFT = 3 / 28
DEGREES = 30.0
CHOICES = ("first-wrong", "highest-loss")


def rotated_and_shifted(images: Tensor, degrees: Tensor, shifts: Tensor) -> Tensor:
    """Shift each image, then rotate it about the middle of the frame.

    Args:
        images: N x C x H x W in [0, 1].
        degrees: N angles; a positive one turns the picture counterclockwise.
        shifts: N x 2, to the left and upwards, in parts of the distance between the centres of the outermost pixels
            (31 pixels where a side has 32), which is what ``align_corners`` calls the side.

    Returns:
        N x C x H x W in [0, 1]; at angle 0 and shift 0 the same images, but for rounding.
    """
    n, height, width = len(images), images.shape[2], images.shape[3]
    angle = torch.deg2rad(degrees)
    # The sampler's coordinates run from -1 to 1 along either side, so a turn of a picture that is no square needs
    # the ratio of its sides.
    ratio = max(height - 1, 1) / max(width - 1, 1)
    theta = torch.empty(n, 2, 3, dtype=images.dtype, device=images.device)
    theta[:, 0, 0] = theta[:, 1, 1] = angle.cos()
    theta[:, 0, 1] = -angle.sin() * ratio
    theta[:, 1, 0] = angle.sin() / ratio
    theta[:, :, 2] = 2 * shifts
    grid = F.affine_grid(theta, list(images.shape), align_corners=True)
    moved: Tensor = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    return moved.clamp_(0, 1)


@dataclass(frozen=True, kw_only=True)
class SpatialAttack:
    """Worst of k random rotations and translations: an inner attack for training, called like a PGD one.

    Each image gets ``draws`` transformations, uniform within the limits, and keeps the first one that is misclassified,
    or else the first of all (Raghunathan et al.'s code); with ``choice="highest-loss"`` the one of highest loss
    (Engstrom et al.). ``draws=1`` is random augmentation and asks the model nothing; ``draws=10`` is
    worst-of-10. Random draws come from torch's default generator of the images' device.

    Attributes:
        draws: k, at least 1.
        degrees: the largest angle either way, 0 to 180.
        shift: the largest shift either way, 0 to 1; see :func:`rotated_and_shifted`.
        choice: ``first-wrong`` or ``highest-loss``.
        mode: of the net during the attack, ``eval`` or ``train``; whichever, its state is the same afterwards.

    Raises:
        InputError: a setting out of range.
    """

    draws: int = 10
    degrees: float = DEGREES
    shift: float = SHIFT
    choice: str = "first-wrong"
    mode: str = "eval"

    def __post_init__(self) -> None:
        """Raise :class:`InputError` for a setting out of range."""
        make_plain(self)
        at_least("draws", self.draws)
        check_limits(self.degrees, self.shift)
        check_choice("choice", self.choice, CHOICES)
        check_choice("mode", self.mode, MODES)

    @torch.no_grad()
    def __call__(self, model: Model, images: Tensor, y: Tensor, *, loss: str = "cross-entropy") -> Tensor:
        """Transform a batch: N x C x H x W -> N x C x H x W in [0, 1], detached.

        Args:
            model: images -> logits N x K, in any mode.
            images: N x C x H x W in [0, 1]; their values are not checked.
            y: labels N; for ``kl`` the clean logits N x K, whose classes take the place of the labels.
            loss: a name in :data:`nndefense.attacks.LOSSES`, for ``highest-loss``.

        Raises:
            InputError: an unknown loss, or labels that do not fit the images.
        """
        y = labels_of(y)
        found: Tensor = in_working_type(lambda model, x: self._worst(model, x, y, loss), model, images, None)
        return found

    def _worst(self, model: Model, images: Tensor, y: Tensor, loss: str) -> Tensor:
        labels = _labels(y, images, loss)
        first = kept = self._draw(images)
        if self.draws == 1:
            return first
        with attacked_in(model, self.mode):
            worst = self._badness(model(first), y, labels, loss)
            for _ in range(self.draws - 1):
                moved = self._draw(images)
                badness = self._badness(model(moved), y, labels, loss)
                better = badness > worst
                kept = torch.where(better[:, None, None, None], moved, kept)
                worst = torch.where(better, badness, worst)
        return kept

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values, for a record."""
        return {"name": "spatial", **asdict(self)}

    def _draw(self, images: Tensor) -> Tensor:
        chance = 2 * torch.rand(len(images), 3, dtype=images.dtype, device=images.device) - 1
        return rotated_and_shifted(images, self.degrees * chance[:, 0], self.shift * chance[:, 1:])

    def _badness(self, logits: Tensor, y: Tensor, labels: Tensor, loss: str) -> Tensor:
        """What each image keeps the first largest value of."""
        if self.choice == "highest-loss":
            return LOSSES[loss](logits, y)
        return (logits.argmax(1) != labels).to(logits.dtype)


@any_type
@torch.no_grad()
def spatial_grid(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    degrees: float = DEGREES,
    shift: float = SHIFT,
    rotations: int = 31,
    shifts: int = 5,
) -> Tensor:
    """The worst of a grid of rotations and translations (31 x 5 x 5 = 775 by default).

    Each image keeps the first transformation that is misclassified; one that withstands all is given back as it was.
    Only images that still stand are tried further.

    Args:
        model, x, y: as for :func:`nndefense.attacks.pgd`, and so are the errors.
        degrees: the largest angle either way, 0 to 180.
        shift: the largest shift either way, 0 to 1; see :func:`rotated_and_shifted`.
        rotations: how many angles, evenly spaced, both limits among them; 1 is angle 0 alone.
        shifts: how many shifts along either axis, likewise.

    Returns:
        The attacked images: same shape, dtype and device as ``x``, in [0, 1].
    """
    check_model(model)
    check_images(x)
    check_labels(y, x)
    check_limits(degrees, shift)
    at_least("rotations", rotations)
    at_least("shifts", shifts)
    result, standing = x.detach().clone(), torch.arange(len(x), device=x.device)
    for step, (angle, right, down) in enumerate(
        (a, b, c) for a in _spaced(degrees, rotations) for b in _spaced(shift, shifts) for c in _spaced(shift, shifts)
    ):
        if len(standing) == 0:
            break
        turn = torch.full((len(standing),), angle, dtype=x.dtype, device=x.device)
        moved = rotated_and_shifted(x[standing], turn, x.new_tensor([[right, down]]).expand(len(standing), 2))
        logits = model(moved) if step else checked_logits(model, moved, y)
        wrong = logits.argmax(1) != y[standing]
        result[standing[wrong]] = moved[wrong]
        standing = standing[~wrong]
    return result


def check_limits(degrees: float, shift: float) -> None:
    """Raise :class:`InputError` unless the largest angle lies in 0..180 and the largest shift in 0..1."""
    for name, value, most in (("degrees", degrees, 180), ("shift", shift, 1)):
        if not (isinstance(value, int | float) and math.isfinite(value) and 0 <= value <= most):
            raise InputError(f"{name} is {value}, but must lie between 0 and {most}")


def _spaced(limit: float, count: int) -> list[float]:
    if count == 1:
        return [0.0]
    return [limit * (2 * number / (count - 1) - 1) for number in range(count)]


def _labels(y: Tensor, images: Tensor, loss: str) -> Tensor:
    check_choice("loss", loss, LOSSES)
    if loss != "kl":
        check_labels(y, images)
        return y
    if y.dim() != 2 or len(y) != len(images):
        raise InputError(f"the clean logits have shape {tuple(y.shape)}, but must be {len(images)} x K")
    return y.argmax(1)
