"""What a printer can print: the palette, the non-printability score and the nearest printable colours.

The score is that of Sharif et al. (CCS 2016) as used by RP2 (Eykholt et al., CVPR 2018, section 3.3, equation 3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nndefense.errors import InputError
from nndefense.images import shape_text

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
    """Each pixel's nearest printable colour: 3 x h x w -> 3 x h x w, same dtype; its score is 0."""
    choices = palette.to(colours)
    pixels = colours.detach().movedim(-3, -1)
    nearest = torch.cdist(pixels.reshape(-1, 3).double(), choices.double()).argmin(1)
    return choices[nearest].view(pixels.shape).movedim(-1, -3).contiguous()
