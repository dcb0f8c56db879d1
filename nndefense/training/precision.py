"""Forward and backward passes in 16 bits, where that is safe.

What is safe, and what is not:

* The weights, the optimiser's state and the moving average are float32 always: one step changes a weight by less than
  16 bits resolve. Sums (the softmax, the loss, the norms) stay in float32 by autocast's own rules.
* ``bfloat16`` has the exponents of float32, so neither the gradients of the weights nor the far smaller ones of the
  images underflow. It works on CPUs, and is fast only on those that multiply it natively.
* ``float16`` ends at 6e-8. The loss is scaled for the weights' gradients (Micikevicius et al., ICLR 2018, section
  3.2), and the attack scales its own. A CPU has no fast float16: it is switched off there.
* Evaluation (validation, robust checks, the accuracy that is reported) is done in float32: 16-bit logits tie, and a
  net that rounds its gradients away looks more robust than it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_FIRST_CUDA_WITH_BFLOAT16 = 8


class Precision:
    """How a step computes its loss and follows its gradient.

    Attributes:
        name: the precision that is used.
        reason: why it is not the one that was asked for; None where it is.
    """

    def __init__(self, asked: str, device: torch.device) -> None:
        self.reason = unsafe(asked, device)
        self.name = asked if self.reason is None else "float32"
        self._device = device.type
        self._dtype = getattr(torch, self.name)
        self._scaler = torch.amp.GradScaler(device.type) if self.name == "float16" else None

    def forward(self) -> contextlib.AbstractContextManager[Any]:
        """The context for the objective."""
        if self.name == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self._device, dtype=self._dtype)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss`` to the weights' gradients."""
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]

    def step(self, solver: torch.optim.Optimizer, weights: Sequence[nn.Parameter], clip_norm: float | None) -> None:
        """Let the optimiser follow the gradients, shortened to ``clip_norm``.

        In float16 a step whose gradient overflowed is left out, and the scale halved.
        """
        if self._scaler is not None:
            self._scaler.unscale_(solver)
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(weights, clip_norm)
        if self._scaler is None:
            solver.step()
        else:
            self._scaler.step(solver)
            self._scaler.update()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as plain JSON values."""
        return {} if self._scaler is None else dict(self._scaler.state_dict())

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        if self._scaler is not None:
            self._scaler.load_state_dict(state)


def unsafe(name: str, device: torch.device) -> str | None:
    """Why a precision cannot be used on a device; None where it can."""
    if name == "float16" and device.type == "cpu":
        return "float16 is slower than float32 on a CPU, and its matrix products lose precision there"
    if name == "bfloat16" and device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        if major < _FIRST_CUDA_WITH_BFLOAT16:
            return "this GPU computes bfloat16 only by way of float32"
    return None
