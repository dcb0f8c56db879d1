"""The attack inside a training step: PGD on a net that is being trained, without touching it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from nndefense.attacks import LOSSES, NORMS, Model, check_labels, kl, norms
from nndefense.attacks.checks import at_least
from nndefense.attacks.losses import Loss
from nndefense.attacks.modes import attacked_in, check_mode
from nndefense.attacks.objective import loss_and_gradient
from nndefense.errors import InputError

STARTS = ("uniform", "gaussian", "none")

# Float16 has nothing below 6e-8, and the gradients of a net that is sure of itself are smaller.
_FLOAT16_SCALE = 256.0


@dataclass(frozen=True, kw_only=True)
class InnerAttack:
    """Projected gradient ascent for the inner maximisation of adversarial training (Madry et al., ICLR 2018, eq. 2.1).

    ``x_{t+1} = P(x_t + step_size * g)``, with g and P as in :func:`nndefense.attacks.pgd`, whose result it is from
    the same start. One path, all images to the last step, no checks inside the loop. Random draws come from torch's
    default generator of the images' device.

    * Madry et al.: ``start="uniform"``.
    * TRADES (Zhang et al., ICML 2019): ``start="gaussian"``, x + 0.001 N(0, I), which is not projected before the
      first step, as in the authors' code; called with ``loss="kl"``.
    * One fast step: :meth:`single_step`.

    Attributes:
        eps: the radius, at least 0, in units of the norm.
        norm: ``linf``, ``l2`` or ``normalized-l2`` (radius ``eps * ||x||_2``).
        steps: gradient steps, at least 1.
        step_size: in units of the norm; None for ``2.5 * eps / steps``.
        start: ``uniform`` in the ball, ``gaussian`` noise, or ``none`` for the image itself.
        start_scale: standard deviation of the gaussian noise, in pixels.
        mode: of the net during the attack, ``eval`` or ``train``; whichever, its state is the same afterwards.
        momentum: the decay factor of MI-FGSM (Dong et al., CVPR 2018), at least 0; 0 is plain PGD.

    Raises:
        InputError: a setting that makes no attack.
    """

    eps: float
    norm: str = "linf"
    steps: int = 10
    step_size: float | None = None
    start: str = "uniform"
    start_scale: float = 0.001
    mode: str = "eval"
    momentum: float = 0.0

    def __post_init__(self) -> None:
        """Raise :class:`InputError` for settings that make no attack."""
        if self.norm not in NORMS:
            raise InputError(f"norm is {self.norm!r}, but must be one of {', '.join(NORMS)}")
        if self.start not in STARTS:
            raise InputError(f"start is {self.start!r}, but must be one of {', '.join(STARTS)}")
        check_mode(self.mode)
        at_least("steps", self.steps)
        for name, value in (("eps", self.eps), ("start_scale", self.start_scale), ("momentum", self.momentum)):
            _check_number(name, value)
        if self.step_size is not None:
            _check_number("step_size", self.step_size)

    @classmethod
    def single_step(cls, eps: float, norm: str = "linf", mode: str = "eval") -> InnerAttack:
        """FGSM from a random start (Wong et al., ICLR 2020, algorithm 3): one step of 1.25 eps, projected.

        It costs a single gradient, and can fail by catastrophic overfitting: the net becomes robust to this step
        alone. Watch the accuracy under several steps.
        """
        return cls(eps=eps, norm=norm, steps=1, step_size=1.25 * eps, start="uniform", mode=mode)

    def __call__(self, model: Model, images: Tensor, y: Tensor, *, loss: str = "cross-entropy") -> Tensor:
        """Attack a batch.

        The gradient is taken with respect to the images alone; the parameters' gradients, every module's mode and
        every buffer are left as they were.

        Args:
            model: images N x C x H x W in [0, 1] -> logits N x K, in any mode.
            images: N x C x H x W in [0, 1]; their values are not checked.
            y: labels N; for ``kl`` the clean logits N x K.
            loss: what is raised: a name in :data:`nndefense.attacks.LOSSES`.

        Returns:
            Attacked images, detached: same shape, dtype and device, in [0, 1] and inside the ball.

        Raises:
            InputError: an unknown loss, labels that do not fit the images, a kl divergence from ``start="none"``,
                where its gradient is 0, or a model without a gradient.
        """
        raised = self._checked_loss(images, y, loss)
        x = images.detach()
        y = y.detach()
        unit = norms.length(x) if self.norm == "normalized-l2" else x.new_ones(len(x))
        radii = self.eps * unit
        stride = radii * (2.5 / self.steps) if self.step_size is None else self.step_size * unit
        stride, inside = norms.per_image(stride, x), norms.projector(x, radii, self.norm)
        attacked = x
        if self.start == "uniform":
            attacked = inside(x + norms.random_in_ball(x, radii, self.norm, None))
        elif self.start == "gaussian":
            attacked = x + self.start_scale * torch.randn_like(x)
        velocity: Tensor | None = None
        with attacked_in(model, self.mode):
            for _ in range(self.steps):
                _, _, gradient = loss_and_gradient(model, attacked, y, raised)
                if self.momentum:
                    gradient = norms.unit_l1(gradient)
                    velocity = gradient if velocity is None else self.momentum * velocity + gradient
                    gradient = velocity
                attacked = inside(torch.addcmul(attacked, stride, norms.steepest(gradient, self.norm)))
        return attacked

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values, for a record."""
        return {"name": "pgd", **asdict(self)}

    def _checked_loss(self, images: Tensor, y: Tensor, loss: str) -> Loss:
        if loss not in LOSSES:
            raise InputError(f"loss is {loss!r}, but must be one of {', '.join(LOSSES)}")
        raised = LOSSES[loss]
        if raised is kl:
            if self.start == "none":
                raise InputError(
                    "the gradient of the KL divergence is 0 at the clean image: start the attack elsewhere "
                    "(start='gaussian' or 'uniform')"
                )
            if y.dim() != 2 or len(y) != len(images) or not y.is_floating_point():
                raise InputError(f"the clean logits have shape {tuple(y.shape)}, but must be {len(images)} x K")
        else:
            check_labels(y, images)
        device = images.device.type
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
            # No step depends on the length of the gradient.
            return lambda logits, goal: raised(logits, goal) * _FLOAT16_SCALE
        return raised


def _check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise InputError(f"{name} is {value}, but must be a finite number and at least 0")
