"""One attack with its bill: images, successes, forward and backward passes, queries and seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nndefense.attacks.counting import Counted
from nndefense.attacks.objective import Model, fooled_by
from nndefense.attacks.standard_sequence import WorstCase

Attack = Callable[..., Tensor | WorstCase]


@dataclass(frozen=True)
class Result:
    """What an attack found and what it cost.

    Attributes:
        images: attacked images N x C x H x W in [0, 1].
        success: N booleans: the judge gives another class than the label, or the target class.
        forwards: images x forward passes in all, ``Eot`` draws counted singly.
        backwards: images x gradients in all.
        queries: those of ``forwards`` that were asked without a gradient.
        seconds: wall time of the attack, without the judgement.
        broken_by: for a sequence of attacks the one that broke each image; else None.
    """

    images: Tensor
    success: Tensor
    forwards: int
    backwards: int
    queries: int
    seconds: float
    broken_by: tuple[str, ...] | None = None

    @property
    def success_rate(self) -> float:
        """Share of all images on which the attack succeeded, in [0, 1]; NaN without images."""
        return float(self.success.double().mean())


def run(attack: Attack, model: Model, x: Tensor, y: Tensor, *, judge: Model | None = None, **settings: Any) -> Result:
    """Run an attack, count its cost, and judge the images that it made.

    Args:
        attack: a function (model, x, y, ...) -> images, as all in this package are.
        model: what the attack sees: images N x C x H x W in [0, 1] -> logits N x K.
        x: clean images, N x C x H x W in [0, 1].
        y: labels N, or target classes where ``settings`` holds ``targeted=True``.
        judge: the model that decides on success; by default ``model``. With another one this is a transfer attack
            from ``model`` as surrogate.
        settings: the attack's own keyword arguments.

    Returns:
        Images, successes and cost. The forward pass of the judgement is not counted.

    Raises:
        InputError: whatever the attack refuses.
    """
    counted = Counted(model)
    wait(x)
    begun = time.perf_counter()
    found = attack(counted, x, y, **settings)
    wait(x)
    seconds = time.perf_counter() - begun
    images, broken_by = (found.images, found.broken_by) if isinstance(found, WorstCase) else (found, None)
    with torch.no_grad():
        success = fooled_by((judge or model)(images), y, bool(settings.get("targeted", False)))
    return Result(images, success, counted.forwards, counted.backwards, counted.queries, seconds, broken_by)


def wait(x: Tensor) -> None:
    """Wait for the device of ``x``, so that seconds are those of finished work."""
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
