"""A sticker: what it shows, where it may be, and how it comes into a photo (Eykholt et al. 2018, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nndefense.attacks.rp2.homography import warp
from nndefense.errors import InputError
from nndefense.images import check_images, shape_text

Mode = Literal["replace", "add"]
MODES: tuple[Mode, ...] = ("replace", "add")


@dataclass(frozen=True)
class Sticker:
    """A perturbation in the canonical frame, bound to its mask.

    Attributes:
        delta: C x h x w. With ``replace`` the sticker's own colours in [0, 1], which hide what is under them; with
            ``add`` a change in [-limit, limit] that is added to the photo (the released code's road-sign attack).
        mask: 1 x h x w, 0 or 1, of delta's dtype: where the sticker may be.
        mode: ``replace`` or ``add``.
    """

    delta: Tensor
    mask: Tensor
    mode: Mode = "replace"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InputError(f"mode is {self.mode!r}, but must be one of {', '.join(MODES)}")
        if self.delta.dim() != 3 or self.mask.shape != (1, *self.delta.shape[1:]):
            raise InputError(
                f"a sticker of {shape_text(self.delta.shape)} (C x h x w) needs a mask 1 x h x w, "
                f"not {shape_text(self.mask.shape)}"
            )

    def on(self, photos: Tensor, matrices: Tensor, light: Tensor | None = None) -> Tensor:
        """Put the sticker on every photo, differentiable in delta; its gradient is exactly 0 outside the mask.

        ``x (1 - T M) + light * T(M s)`` with ``replace``, ``x + light * T(M d)`` with ``add``, cut to [0, 1]; T is
        the photo's homography.

        Args:
            photos: N x C x H x W in [0, 1].
            matrices: N x 3 x 3 homographies from the canonical frame to each photo's frame.
            light: N factors: how bright white paper is in each photo; 1 where not given.
        """
        n, size = len(photos), (photos.shape[2], photos.shape[3])
        # Colours are carried times their mask, so that no pixel from beside the mask mixes into an edge.
        shown = warp((self.mask * self.delta).expand(n, -1, -1, -1), matrices, size)
        if light is not None:
            shown = shown * light.to(photos).view(-1, 1, 1, 1)
        if self.mode == "add":
            return (photos + shown).clamp(0, 1)
        cover = warp(self.mask.expand(n, -1, -1, -1), matrices, size)
        return (photos * (1 - cover) + shown).clamp(0, 1)

    def printed(self, reference: Tensor | None = None) -> Tensor:
        """The colours to print, C x h x w: those of the sticker, or with ``add`` of reference + delta, in [0, 1].

        Args:
            reference: the object without the sticker in the canonical frame, C x h x w; needed with ``add``, where
                nothing (0) stands for it if it is not given.
        """
        if self.mode == "replace":
            return self.delta
        return (self.delta if reference is None else reference.to(self.delta) + self.delta).clamp(0, 1)


def check_mask(mask: Tensor) -> Tensor:
    """Return a mask of 0 and 1 as 1 x h x w, of its own floating dtype or float32.

    Raises:
        InputError: another shape, other values, or nothing in it.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 3 or mask.shape[0] != 1:
        shape = shape_text(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(f"the mask must be a tensor 1 x h x w, not {shape}")
    mask = mask if mask.is_floating_point() else mask.float()
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise InputError("the mask must hold 0 and 1 only: threshold it, for example (mask > 0.5)")
    if not bool(mask.any()):
        raise InputError("the mask is empty: mark at least one pixel with 1")
    return mask


def check_scene(photos: Tensor, matrices: Tensor | None, light: Tensor | None) -> tuple[Tensor, Tensor]:
    """Check photos, and return their homographies (N x 3 x 3, identities if None) and light (N, ones if None).

    Raises:
        InputError: photos, homographies or light that do not fit together.
    """
    check_images(photos, name="photos")
    n = len(photos)
    if n == 0:
        raise InputError("there are no photos: give at least one")
    if matrices is None:
        matrices = torch.eye(3, dtype=torch.float64).expand(n, 3, 3)
    if matrices.shape != (n, 3, 3) or not bool(torch.isfinite(matrices).all()):
        raise InputError(f"{n} photos need {n} finite homographies 3 x 3, not {shape_text(matrices.shape)}")
    light = torch.ones(n, dtype=torch.float64) if light is None else torch.as_tensor(light)
    if light.shape != (n,) or not bool(((light > 0) & torch.isfinite(light)).all()):
        raise InputError(f"{n} photos need {n} factors of light, each above 0")
    return matrices, light


def paper_white(photos: Tensor, matrices: Tensor, *, quantile: float = 0.95) -> Tensor:
    """Estimate how bright white paper would be in each photo, N factors in (0, 1].

    The quantile of the brightness inside the object's frame: it takes for granted that the object has something white,
    such as the letters of a sign. A sticker on a sign in the shade is as dark as the sign; without this factor it
    would glow in the dark.

    Args:
        photos: N x C x H x W in [0, 1].
        matrices: N x 3 x 3 homographies from the canonical frame to each photo's frame.
        quantile: of the pixels in the frame.
    """
    size = (photos.shape[2], photos.shape[3])
    seen = warp(photos, torch.linalg.inv(matrices), size, padding="border").mean(1).flatten(1)
    return torch.quantile(seen.double(), quantile, dim=1).clamp(1 / 255, 1)
