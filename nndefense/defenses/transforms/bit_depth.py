"""Fewer bits per channel: a transformation that drops what small perturbations change."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nndefense.attacks.checks import at_least
from nndefense.errors import InputError

MODES = ("round", "floor")


class BitDepth(nn.Module):
    """Keep ``bits`` bits of every channel (Guo et al., ICLR 2018, section 3; Xu et al., NDSS 2018, section II.C).

    ``round``, the default, moves each value to the nearest of 2^bits levels from 0 to 1, as Xu et al. do.
    ``floor`` clears the low bits of the 8-bit value, as the code of Athalye et al. (2018) does: white becomes
    224 / 255 at 3 bits, so the image also gets darker. The gradient is 0 almost everywhere: attack it with BPDA.

    Args:
        bits: 1 to 8.
        mode: ``round`` or ``floor``.

    Raises:
        InputError: settings that cannot be used.
    """

    def __init__(self, bits: int = 3, mode: str = "round") -> None:
        super().__init__()
        at_least("bits", bits)
        if bits > 8:
            raise InputError(f"bits is {bits}, but must be from 1 to 8")
        if mode not in MODES:
            raise InputError(f"mode is {mode!r}, but must be one of {', '.join(MODES)}")
        self.bits, self.mode = bits, mode
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Images N x C x H x W in [0, 1] -> images of the same shape with 2^bits levels per channel."""
        if self.mode == "round":
            top = 2**self.bits - 1
            return torch.round(images * top).div_(top)
        low = 2 ** (8 - self.bits)
        # A hair more than the pixel, so that 8-bit values divided by 255 come back as they were.
        return torch.floor((images * 255 + 1e-3) / low).mul_(low / 255)

    def extra_repr(self) -> str:
        """The settings, for people."""
        return f"bits={self.bits}, mode={self.mode}"
