"""What an attack costs: forward passes, gradients and queries, counted in images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nndefense.attacks.losses import Loss
from nndefense.attacks.wrappers import adopt_mode


class Counted(nn.Module):
    """A model that counts what it is asked for; otherwise it is the same model.

    Attributes:
        forwards: images x forward passes; a pass of ``Eot`` over 20 draws counts 20 for each image.
        backwards: images x gradients with respect to them, in the same measure.
        queries: those of ``forwards`` that no gradient could follow, as a black box is asked.

    Args:
        model: images N x C x H x W in [0, 1] -> logits N x K.
    """

    def __init__(self, model: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.passes: int = int(getattr(model, "passes", 1))
        self.forwards = self.backwards = self.queries = 0
        if hasattr(model, "expected_loss"):
            self.expected_loss = self._expected_loss
        adopt_mode(self, model)

    def forward(self, x: Tensor) -> Tensor:
        """The model's logits, counted: N x C x H x W -> N x K."""
        return self.model(self._count(x))

    def _expected_loss(self, x: Tensor, y: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
        """The model's own expected loss, counted: what :class:`nndefense.attacks.Eot` declares."""
        found: tuple[Tensor, Tensor] = self.model.expected_loss(self._count(x), y, loss)  # type: ignore[attr-defined]
        return found

    def _count(self, x: Tensor) -> Tensor:
        cost = len(x) * self.passes
        self.forwards += cost
        if not (torch.is_grad_enabled() and x.requires_grad):
            self.queries += cost
            return x
        # A view, because a hook on it sees every gradient that goes through this call, and no other.
        seen = x.view_as(x)
        seen.register_hook(lambda _: self._count_gradient(cost))  # type: ignore[no-untyped-call]
        return seen

    def _count_gradient(self, cost: int) -> None:
        self.backwards += cost
