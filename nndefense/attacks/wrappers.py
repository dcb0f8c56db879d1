"""What a defence declares about itself so that attacks see through it: EOT for randomness, BPDA for lost gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nndefense.attacks.checks import at_least
from nndefense.attacks.losses import Loss
from nndefense.errors import InputError

AVERAGES = ("probabilities", "gradients")


class Eot(nn.Module):
    """Expectation over transformation (Athalye et al., ICML 2018b, section 2): a random model, averaged.

    Called, it returns log-probabilities N x K: the log of the mean of the softmax over ``samples`` draws. Gradient
    attacks of this package raise the loss of that mean (``average="probabilities"``), or the mean of the losses of the
    draws, which is the average of their gradients (``average="gradients"``).

    Args:
        model: images N x C x H x W in [0, 1] -> logits N x K, drawing afresh at each call from torch's generators.
        samples: draws per call, at least 1; 20 to 30 are usual for random crops and the like.
        average: ``probabilities`` or ``gradients``.
        generator: where the seed of each call comes from; torch's global generators are set from it and put back
            afterwards. None leaves the draws to the global generators.

    Raises:
        InputError: settings that cannot be used.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        samples: int,
        *,
        average: str = "probabilities",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        at_least("samples", samples)
        if average not in AVERAGES:
            raise InputError(f"average is {average!r}, but must be one of {', '.join(AVERAGES)}")
        self.model, self.samples, self.average, self.generator = model, samples, average, generator
        #: What one call costs, in forward passes of the innermost model.
        self.passes: int = samples * int(getattr(model, "passes", 1))
        adopt_mode(self, model)

    def forward(self, x: Tensor) -> Tensor:
        """Log of the mean probability: N x C x H x W -> N x K."""
        return self._log_mean(self._draws(x))

    def expected_loss(self, x: Tensor, y: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
        """Log of the mean probability, N x K, and the loss N that a gradient attack raises."""
        draws = self._draws(x)
        logits = self._log_mean(draws)
        if self.average == "probabilities":
            return logits, loss(logits, y)
        return logits, torch.stack([loss(draw, y) for draw in draws]).mean(0)

    def _draws(self, x: Tensor) -> list[Tensor]:
        with self._seeded(x.device):
            return [self.model(x) for _ in range(self.samples)]

    @staticmethod
    def _log_mean(draws: list[Tensor]) -> Tensor:
        stacked = torch.stack([draw.log_softmax(1) for draw in draws])
        return stacked.logsumexp(0) - torch.log(torch.tensor(float(len(draws)))).to(stacked)

    def _seeded(self, device: torch.device) -> AbstractContextManager[None]:
        chance = self.generator
        seed = None if chance is None else int(torch.randint(2**62, (), generator=chance, device=chance.device))
        return seeded(seed, device)


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Draw from generators of this seed, if there is one; the global state is the same afterwards."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class Bpda(nn.Module):
    """Backward pass differentiable approximation (Athalye et al., ICML 2018, section 4.1).

    The value is exactly that of ``forward``; the gradient is that of ``backward`` at the same images. Use it around
    the part of a defence that has no useful gradient, for instance ``Bpda(jpeg)`` in front of a classifier.

    Args:
        forward: what the defence computes; it needs no gradient.
        backward: a differentiable stand-in whose output has the same shape; None is the identity, which suits
            transformations that give back nearly the same image.
    """

    def __init__(self, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.true, self.substitute = forward, backward
        adopt_mode(self, forward, backward)

    def forward(self, x: Tensor) -> Tensor:
        """The true value, with the substitute's gradient.

        Raises:
            InputError: true value and substitute differ in shape.
        """
        with torch.no_grad():
            value = self.true(x)
        if not torch.is_grad_enabled():
            return value
        stand_in = x if self.substitute is None else self.substitute(x)
        if value.shape != stand_in.shape:
            raise InputError(
                f"Bpda's forward gives shape {tuple(value.shape)} and its backward {tuple(stand_in.shape)}, "
                "but they must be equal: pass a substitute with the same output"
            )
        swapped: Tensor = _Swap.apply(value, stand_in)
        return swapped


class _Swap(torch.autograd.Function):
    """The first tensor's value with a gradient to the second."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, stand_in: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


def adopt_mode(wrapper: nn.Module, *parts: object) -> None:
    """Set a fresh wrapper to training mode only if a part of it is: a wrapper has no mode of its own."""
    wrapper.training = any(part.training for part in parts if isinstance(part, nn.Module))
