"""Transformations that drop what the eye does not miss, and their defences: JPEG, and fewer bits per channel."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from nndefense.attacks.checks import at_least
from nndefense.defenses.transformed import TransformDefense
from nndefense.errors import InputError, check_choice
from nndefense.models import Classifier
from nndefense.modes import EvaluationOnly

SUBSAMPLING = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2}
MODES = ("round", "floor")


class Jpeg(EvaluationOnly):
    """Compress and decompress as JPEG (Guo et al., ICLR 2018, section 3; quality 75 as in their experiments).

    Pixels are rounded to 8 bits first; the code of Athalye et al. (2018) cuts them off instead, which is half a
    level darker and not offered. Pillow does the coding, on the CPU (torchvision's own coders are deprecated): its
    encoder is libjpeg(-turbo) with the usual tables, and quality and subsampling mean what they mean elsewhere.
    Results may differ by a level between versions of libjpeg. There is no gradient: attack it with BPDA.

    Args:
        quality: 1 to 95, as Pillow takes it.
        subsampling: of colour: ``4:2:0``, Pillow's default, ``4:2:2`` or ``4:4:4``.

    Raises:
        InputError: settings that cannot be used.
    """

    def __init__(self, quality: int = 75, subsampling: str = "4:2:0") -> None:
        super().__init__()
        quality = at_least("quality", quality)
        if quality > 95:
            raise InputError(f"quality is {quality}, but must be from 1 to 95: above it JPEG hardly compresses")
        check_choice("subsampling", subsampling, SUBSAMPLING)
        self.quality, self.subsampling = quality, subsampling

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """``images`` N x C x H x W in [0, 1], grey (C = 1) or colour (C = 3) -> the same shape, 8-bit values over 255.

        Raises:
            InputError: another number of channels, or more than 65,535 pixels along a side.
        """
        if images.dim() != 4 or images.shape[1] not in (1, 3):
            raise InputError(f"JPEG takes N x 1 or 3 x H x W, not {tuple(images.shape)}")
        if max(images.shape[2:]) > 65_535:
            raise InputError("JPEG takes at most 65,535 pixels along a side")
        pixels = (images * 255).round_().clamp_(0, 255).to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
        coded = [self._coded(one) for one in pixels]
        if not coded:
            return images.clone()
        back = torch.from_numpy(np.stack(coded)).to(images.device).permute(0, 3, 1, 2)
        return back.to(images.dtype).div_(255).contiguous()

    def _coded(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        picture = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))
        data = io.BytesIO()
        picture.save(data, format="JPEG", quality=self.quality, subsampling=SUBSAMPLING[self.subsampling])
        decoded = np.asarray(Image.open(data))
        return decoded.reshape(pixels.shape)

    def extra_repr(self) -> str:
        """The settings, for people."""
        return f"quality={self.quality}, subsampling={self.subsampling}"


class BitDepth(EvaluationOnly):
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
        bits = at_least("bits", bits)
        if bits > 8:
            raise InputError(f"bits is {bits}, but must be from 1 to 8")
        check_choice("mode", mode, MODES)
        self.bits, self.mode = bits, mode

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


def jpeg_compression(classifier: Classifier, *, quality: int = 75, subsampling: str = "4:2:0") -> TransformDefense:
    """JPEG before the classifier; attacked with BPDA. ``quality``, ``subsampling`` and errors as for
    :class:`~nndefense.defenses.transforms.Jpeg`.
    """
    return TransformDefense(classifier, Jpeg(quality, subsampling), differentiable=False, random=False)


def bit_depth_reduction(classifier: Classifier, *, bits: int = 3, mode: str = "round") -> TransformDefense:
    """Fewer bits before the classifier; attacked with BPDA. ``bits``, ``mode`` and errors as for
    :class:`~nndefense.defenses.transforms.BitDepth`.
    """
    return TransformDefense(classifier, BitDepth(bits, mode), differentiable=False, random=False)
