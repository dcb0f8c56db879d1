"""The checks that every attack makes once at its entry, never in its loop of steps."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nndefense.attacks import norms
from nndefense.errors import InputError, plain
from nndefense.images import check_images

_SUM_TOLERANCE = 1e-4


def check_model(model: Callable[[Tensor], Tensor]) -> None:
    """Raise :class:`InputError` if a module, or any part of it, is in training mode, or has weights without gradients.

    In training mode batch normalisation makes each image's attack depend on its batch and moves the model's running
    statistics, and dropout attacks another net at every step. A callable that is no module is taken as it is.
    """
    if not isinstance(model, nn.Module):
        return
    if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        raise InputError(
            "the model's weights were made under torch.inference_mode(), where nothing has a gradient: make or load "
            "the model outside it"
        )
    for name, module in model.named_modules():
        if module.training:
            part = f"its part {name!r}" if name else "it"
            raise InputError(
                f"the model is in training mode ({part}): call model.eval() first; "
                "if it is random on purpose, pass a function, lambda x: model(x), and average with Eot"
            )


def check_labels(y: Tensor, x: Tensor) -> None:
    """Raise :class:`InputError` unless ``y`` holds one class number per image of ``x``."""
    if not isinstance(y, Tensor):
        raise InputError(f"labels must be a torch tensor of class numbers, not {type(y).__name__}")
    if y.shape != x.shape[:1] or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        hint = ": if they are class numbers, give labels.long()" if y.is_floating_point() else ""
        raise InputError(
            f"labels have shape {tuple(y.shape)} and type {str(y.dtype).removeprefix('torch.')}, "
            f"but must be one class number per image ({len(x)}){hint}"
        )


def check_logits(logits: Tensor, y: Tensor) -> None:
    """Raise :class:`InputError` unless a model's output is N x K logits or log-probabilities that fit the labels.

    Args:
        logits: the model's first output.
        y: labels N.

    Raises:
        InputError: another shape, fewer than 2 classes, NaN or infinite values, probabilities instead of logits, or
            a label outside 0..K-1.
    """
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(y) or logits.shape[1] < 2:
        given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"the model returned {given}, but must return logits {len(y)} x K with K at least 2")
    if len(logits) == 0:
        return
    z = logits.detach()
    # One look at the device for all facts. A NaN anywhere makes both bounds NaN.
    facts = (*torch.aminmax(z), (z.sum(1) - 1).abs().max(), *torch.aminmax(y))
    least, most, off, low, high = torch.stack([fact.double() for fact in facts]).tolist()
    if not (math.isfinite(least) and math.isfinite(most)):
        raise InputError(
            "the model returned NaN or infinite logits: look for a division by 0, "
            "and write the log of a probability as p.clamp_min(1e-12).log()"
        )
    if least >= 0 and off <= _SUM_TOLERANCE:
        raise InputError(
            "the model returned probabilities (every row sums to 1), which hide gradients: "
            "remove its softmax, or return p.clamp_min(1e-12).log()"
        )
    if low < 0 or high >= z.shape[1]:
        raise InputError(
            f"labels range from {low:.0f} to {high:.0f}, but the model has the classes 0 to {z.shape[1] - 1}"
        )


def checked_inputs(
    model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, eps: float | Tensor | None = None, norm: str = "l2"
) -> Tensor:
    """Check model, images, labels and budget at the entry of an attack.

    Args:
        model, x, y, norm: as for :func:`nndefense.attacks.pgd`.
        eps: likewise; None where an attack has no budget.

    Returns:
        The radii N in raw pixel units; infinite where ``eps`` is None.

    Raises:
        InputError: whatever of these cannot be used.
    """
    check_model(model)
    check_images(x)
    check_labels(y, x)
    radii = norms.radius(x, 0.0 if eps is None else eps, norm)
    return torch.full_like(radii, torch.inf) if eps is None else radii


def at_least(name: str, value: int, least: int = 1) -> int:
    """Give a count as an int, whichever library's whole number it is.

    Raises:
        InputError: it is no whole number of at least ``least``; a truth value is none.
    """
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        raise InputError(f"{name} is {value}, but must be a whole number and at least {least}")
    return number


def not_negative(name: str, value: float) -> None:
    """Raise :class:`InputError` unless a setting is a finite number, and no truth value, of at least 0."""
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number) or number < 0:
        raise InputError(f"{name} is {value}, but must be a finite number and at least 0")


def fraction(name: str, value: float) -> None:
    """Raise :class:`InputError` unless a setting lies in (0, 1]."""
    if not 0 < value <= 1:
        raise InputError(f"{name} is {value}, but must lie in (0, 1]")
