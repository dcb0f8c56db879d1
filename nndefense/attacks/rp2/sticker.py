"""A sticker: what it shows, where it may be, how it comes into a photo or is printed (Eykholt et al. 2018).

The non-printability score is that of Sharif et al. (CCS 2016) as used by RP2 (equation 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nndefense.attacks.rp2.views import warp
from nndefense.errors import InputError, check_choice
from nndefense.images import check_images, shape_text

#: What a sticker does to the pixels below it: takes their place, or is added to them.
Mode = Literal["replace", "add"]
#: The modes of a sticker by name.
MODES: tuple[Mode, ...] = ("replace", "add")
# The largest product of so many distances, each at most sqrt(3), is far inside the range of float64.
MOST_COLOURS = 1000

# Thirty colours of our own choice, not those of the paper's authors: what a common inkjet printer can be relied on to
# give on plain paper. Screen colours such as (0, 1, 0) are left out, ink is not (0, 0, 0), paper not (1, 1, 1).
# Six greys from ink to paper, and eight hues (the inks, their mixtures, and orange and brown), each at three depths.
_PALETTE = (
    (18, 18, 20), (60, 60, 62), (105, 105, 106), (150, 150, 150), (195, 195, 194), (242, 242, 240),
    (190, 30, 45), (220, 95, 95), (115, 25, 30),
    (225, 115, 35), (240, 165, 100), (140, 75, 30),
    (245, 220, 50), (250, 235, 150), (170, 145, 40),
    (40, 140, 70), (120, 190, 130), (20, 80, 45),
    (30, 155, 200), (130, 200, 225), (20, 90, 125),
    (45, 60, 140), (105, 120, 185), (28, 34, 80),
    (120, 50, 125), (170, 115, 175), (70, 30, 75),
    (200, 50, 120), (225, 130, 170), (120, 30, 70),
)  # fmt: skip


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
        check_choice("mode", self.mode, MODES)
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


def default_palette() -> Tensor:
    """The palette used where none is given: 30 x 3 RGB in [0, 1], float64."""
    return torch.tensor(_PALETTE, dtype=torch.float64) / 255


def check_palette(palette: Tensor) -> Tensor:
    """Return a palette in float64, P x 3 in [0, 1].

    Raises:
        InputError: another shape, too many colours, or values outside [0, 1].
    """
    palette = torch.as_tensor(palette)
    if palette.dim() != 2 or palette.shape[1] != 3 or not 1 <= len(palette) <= MOST_COLOURS:
        raise InputError(
            f"the palette has shape {shape_text(palette.shape)}, but must be P x 3: 1 to {MOST_COLOURS} RGB colours"
        )
    palette = palette.double()
    if not bool(((palette >= 0) & (palette <= 1)).all()):
        raise InputError("the palette's colours must be finite and lie in [0, 1]: divide 8-bit values by 255")
    return palette


def non_printability(colours: Tensor, palette: Tensor) -> Tensor:
    """The non-printability of each pixel: the product of its distances to every printable colour.

    A product, so that one near colour is enough. It is summed up in logarithms and in float64, where thirty factors
    neither underflow nor overflow; where a distance is 0 both the score and its gradient are exactly 0.

    Args:
        colours: ... x 3 x h x w; RGB, printable or not (a perturbation may be negative).
        palette: P x 3 in [0, 1].

    Returns:
        ... x h x w scores in float64, at least 0.
    """
    pixels = colours.movedim(-3, -1).double().unsqueeze(-2)
    squares = (pixels - palette.to(pixels)).square().sum(-1)
    printable = squares == 0
    logarithms = 0.5 * torch.where(printable, torch.ones_like(squares), squares).log().sum(-1)
    return torch.where(printable.any(-1), torch.zeros_like(logarithms), logarithms.exp())


def nearest_printable(colours: Tensor, palette: Tensor) -> Tensor:
    """Each pixel's nearest printable colour: ``colours`` 3 x h x w and a ``palette`` P x 3, both in [0, 1] -> 3 x h x w
    of the same dtype; its score is 0.
    """
    choices = palette.to(colours)
    pixels = colours.detach().movedim(-3, -1)
    nearest = torch.cdist(pixels.reshape(-1, 3).double(), choices.double()).argmin(1)
    return choices[nearest].view(pixels.shape).movedim(-1, -3).contiguous()
