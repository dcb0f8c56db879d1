"""The one convention for images, and its check: float tensors N x C x H x W in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nndefense.errors import InputError


def check_images(images: Tensor, *, channels: int | None = None, name: str = "images") -> None:
    """Raise :class:`InputError` unless ``images`` is a float tensor N x C x H x W, finite and in [0, 1].

    Done once where a batch enters (an attack, a defence, a job), never inside a loop over steps.

    Args:
        images: the batch to check.
        channels: the number of channels C that is expected, where it is known.
        name: what the message calls the batch.
    """
    if not isinstance(images, Tensor):
        raise InputError(f"{name} must be a torch tensor N x C x H x W, not {type(images).__name__}")
    if not images.is_floating_point():
        raise InputError(
            f"{name} are {str(images.dtype).removeprefix('torch.')}, but must be floats in [0, 1]: divide by 255"
        )
    if images.dim() != 4:
        hint = ": add a batch dimension with images[None]" if images.dim() == 3 else ""
        raise InputError(f"{name} have shape {shape_text(images.shape)}, but must be N x C x H x W{hint}")
    if channels is not None and images.shape[1] != channels:
        raise InputError(channel_message(images.shape[1], channels, name))
    if images.numel() == 0:
        return
    lowest, highest = (bound.item() for bound in torch.aminmax(images.detach()))
    # A NaN anywhere makes both bounds NaN, so these two comparisons also find it.
    if not (lowest == lowest and highest == highest):
        raise InputError(f"{name} hold NaN pixels: remove those images or repair them")
    if lowest < 0 or highest > 1:
        raise InputError(
            f"{name} range from {lowest:.4g} to {highest:.4g}, but must lie in [0, 1]: divide 8-bit values by 255, "
            "and leave normalisation to the model"
        )


def channel_message(given: int, wanted: int, name: str = "images") -> str:
    """Say that images have the wrong number of channels, and how to mend it."""
    kinds = {1: "grey (1 channel)", 3: "colour (3 channels)"}
    remedy = {
        (1, 3): ": repeat the channel with images.expand(-1, 3, -1, -1), or load them as colour",
        (3, 1): ": load them as grey images",
    }.get((given, wanted), "")
    return (
        f"{name} are {kinds.get(given, f'of {given} channels')}, "
        f"but the classifier takes {kinds.get(wanted, f'{wanted} channels')}{remedy}"
    )


def shape_text(shape: Sequence[int]) -> str:
    """Write a shape as people read it: ``3 x 32 x 32``."""
    return " x ".join(str(int(side)) for side in shape) or "()"
