"""What a model declares of itself to attacks (EOT: randomness, BPDA: lost gradients), and how its mode is held."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nndefense.attacks.checks import at_least
from nndefense.attacks.losses import Loss, Model
from nndefense.errors import InputError, check_choice

AVERAGES = ("probabilities", "gradients")
MODES = ("eval", "train")


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
        samples = at_least("samples", samples)
        check_choice("average", average, AVERAGES)
        self.model, self.samples, self.average, self.generator = model, samples, average, generator
        #: What one call costs, in forward passes of the innermost model.
        self.passes: int = samples * int(getattr(model, "passes", 1))
        adopt_mode(self, model)

    def forward(self, x: Tensor) -> Tensor:
        """Log of the mean probability: N x C x H x W -> N x K."""
        return self._log_mean(self._draws(x))

    def expected_loss(self, x: Tensor, y: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
        """Log of the mean probability of images ``x``, N x K, and the ``loss`` N, for labels ``y``, that a gradient
        attack raises.
        """
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
        """The true value at ``x``, with the substitute's gradient.

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


class Around(nn.Module):
    """A model around another, which declares to attacks what that declares, by the subclass's own functions.

    Args:
        model: images N x C x H x W in [0, 1] -> logits N x K.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.passes: int = int(getattr(model, "passes", 1))
        if hasattr(model, "expected_loss"):
            self.expected_loss = self._expected_loss
        if hasattr(model, "predictions"):
            self.predictions = self._predictions
            self.softened = bool(getattr(model, "softened", False))
        adopt_mode(self, model)

    def _expected_loss(self, x: Tensor, y: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
        """The model's own expected loss: what :class:`Eot` declares."""
        raise NotImplementedError

    def _predictions(self, x: Tensor, progress: float | None = None) -> Tensor:
        """Single answers of a random defence: what :func:`nndefense.attacks.eot_pgd` asks for."""
        raise NotImplementedError


def adopt_mode(wrapper: nn.Module, *parts: object) -> None:
    """Set a fresh wrapper to training mode only if a part of it is: a wrapper has no mode of its own."""
    wrapper.training = any(part.training for part in parts if isinstance(part, nn.Module))


@contextmanager
def attacked_in(model: Model, mode: str = "eval") -> Iterator[None]:
    """Hold a net still for an attack, and give it back as it was, whatever happens inside.

    Inside, no parameter requires a gradient, so that no graph to the weights is built; the net is in evaluation mode,
    or in training mode with copies in the place of its buffers. Afterwards every module has its own mode again, every
    parameter its own ``requires_grad``, and every buffer (such as the statistics of batch normalisation) is untouched.

    Args:
        model: a module; a callable that is none is left as it is.
        mode: ``eval``, or ``train`` for batch statistics and dropout.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Put aside, not overwritten: the graph of an earlier pass may still need them as they are.
    kept = model.modules() if mode != "eval" else ()
    buffers = [(module, name, buffer) for module in kept for name, buffer in module.named_buffers(recurse=False)]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        for module, name, buffer in buffers:
            setattr(module, name, buffer.clone())
        model.train(mode == "train")
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module, name, buffer in buffers:
            setattr(module, name, buffer)
        for parameter in learning:
            parameter.requires_grad_(True)
