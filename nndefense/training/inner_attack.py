"""The attack inside a training step: PGD on a net that is being trained, without touching it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from nndefense.attacks import LOSSES, NORMS, Model, check_labels, kl, norms
from nndefense.attacks.checks import at_least, not_negative
from nndefense.attacks.door import in_working_type, labels_of
from nndefense.attacks.losses import Loss, loss_and_gradient, negated
from nndefense.attacks.wrappers import MODES, attacked_in
from nndefense.errors import InputError, check_choice, make_plain

#: Where the attack in a training step begins, by name.
STARTS = ("uniform", "gaussian", "sign", "none")
#: The class that the attack in a training step moves away from or towards, by name.
TARGETS = ("label", "predicted", "least-likely")

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
    * One fast step: :meth:`single_step`; FGSM and R+FGSM without label leaking: :meth:`fgsm`, :meth:`r_fgsm`.
    * Adversarial logit pairing (Kannan et al. 2018): ``target="least-likely"``.

    Attributes:
        eps: the radius, at least 0, in units of the norm; at most 1 in linf.
        norm: ``linf``, ``l2`` or ``normalized-l2`` (radius ``eps * ||x||_2``).
        steps: gradient steps, at least 1.
        step_size: in units of the norm; None for ``2.5 * eps / steps``.
        start: ``uniform`` in the ball, ``gaussian`` noise, ``sign`` for noise of one size and random sign in every
            pixel (linf alone), or ``none`` for the image itself.
        start_scale: standard deviation of the gaussian noise, or size of the sign noise, in pixels.
        mode: of the net during the attack, ``eval`` or ``train``; whichever, its state is the same afterwards.
        momentum: the decay factor of MI-FGSM (Dong et al., CVPR 2018), at least 0; 0 is plain PGD.
        target: ``label`` steps away from the label that the attack is called with; ``predicted`` away from the class
            that the net itself gives the clean image, so that the label cannot leak into the attacked image (Kurakin
            et al., ICLR 2017); ``least-likely`` towards the class that it holds for the least likely. Both
            choose once, at the clean image; from another start that costs a forward pass.

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
    target: str = "label"

    def __post_init__(self) -> None:
        """Raise :class:`InputError` for settings that make no attack."""
        make_plain(self)
        check_choice("norm", self.norm, NORMS)
        check_choice("start", self.start, STARTS)
        if self.start == "sign" and self.norm != "linf":
            raise InputError(f"the start 'sign' is a corner of a cube: use it with linf, not with {self.norm}")
        check_choice("target", self.target, TARGETS)
        check_choice("mode", self.mode, MODES)
        at_least("steps", self.steps)
        for name, value in (("eps", self.eps), ("start_scale", self.start_scale), ("momentum", self.momentum)):
            not_negative(name, value)
        norms.check_eps(self.eps, self.norm)
        if self.step_size is not None:
            not_negative("step_size", self.step_size)

    @classmethod
    def single_step(cls, eps: float, norm: str = "linf", mode: str = "eval") -> InnerAttack:
        """FGSM from a random start (Wong et al., ICLR 2020, algorithm 3): one step of 1.25 eps, projected.

        It costs a single gradient, and can fail by catastrophic overfitting: the net becomes robust to this step
        alone. Watch the accuracy under several steps.
        """
        return cls(eps=eps, norm=norm, steps=1, step_size=1.25 * eps, start="uniform", mode=mode)

    @classmethod
    def fgsm(cls, eps: float, norm: str = "linf", mode: str = "eval", target: str = "predicted") -> InnerAttack:
        """One step of eps from the image, away from the predicted class; ``target="least-likely"`` is Step-LL.

        Both as in Kurakin et al. (ICLR 2017) and Tramer et al. (ICLR 2018).
        """
        return cls(eps=eps, norm=norm, steps=1, step_size=eps, start="none", mode=mode, target=target)

    @classmethod
    def r_fgsm(
        cls, eps: float, alpha: float | None = None, mode: str = "eval", target: str = "predicted"
    ) -> InnerAttack:
        """R+FGSM (Tramer et al., ICLR 2018): noise of size alpha and random sign, then a step of eps - alpha.

        ``x1 = clip(x + alpha sign(N(0, I)))``, ``x' = clip(x1 + (eps - alpha) sign(grad L(x1)))``, in linf. The class
        is that of x, not of x1.

        Args:
            eps: the radius.
            alpha: the noise, less than eps; by default eps / 6, the authors' 0.05 of their 0.3 on MNIST.
            mode, target: as for the class.

        Raises:
            InputError: alpha is not between 0 and eps.
        """
        not_negative("eps", eps)
        alpha = eps / 6 if alpha is None else alpha
        not_negative("alpha", alpha)
        if alpha > eps:
            raise InputError(f"the noise of R+FGSM is {alpha}, but must leave something of eps {eps} for the step")
        return cls(eps=eps, steps=1, step_size=eps - alpha, start="sign", start_scale=alpha, mode=mode, target=target)

    def __call__(self, model: Model, images: Tensor, y: Tensor, *, loss: str = "cross-entropy") -> Tensor:
        """Attack a batch.

        The gradient is taken with respect to the images alone; the parameters' gradients, every module's mode and
        every buffer are left as they were.

        Args:
            model: images N x C x H x W in [0, 1] -> logits N x K, in any mode.
            images: N x C x H x W in [0, 1]; their values are not checked.
            y: labels N, which only ``target="label"`` looks at; for ``kl`` the clean logits N x K.
            loss: what is raised: a name in :data:`nndefense.attacks.LOSSES`.

        Returns:
            Attacked images, detached: same shape, dtype and device, in [0, 1] and inside the ball.

        Raises:
            InputError: an unknown loss, labels that do not fit the images, a kl divergence from ``start="none"``,
                where its gradient is 0, or a model without a gradient.
        """
        y = labels_of(y)
        ball = (self.eps, self.norm)
        found: Tensor = in_working_type(lambda model, x: self._attacked(model, x, y, loss), model, images, ball)
        return found

    def _attacked(self, model: Model, images: Tensor, y: Tensor, loss: str) -> Tensor:
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
        elif self.start == "sign":
            attacked = inside(x + self.start_scale * torch.randn_like(x).sign())
        velocity: Tensor | None = None
        with attacked_in(model, self.mode):
            goal = self._goal(model, x, y)
            for _ in range(self.steps):
                if goal is None:
                    # The first pass is that of the clean image: it gives the class as well.
                    _, logits, gradient = loss_and_gradient(
                        model, attacked, y, lambda logits, _: raised(logits, self._chosen(logits.detach()))
                    )
                    goal = self._chosen(logits)
                else:
                    _, _, gradient = loss_and_gradient(model, attacked, goal, raised)
                if self.momentum:
                    gradient = norms.unit_l1(gradient)
                    velocity = gradient if velocity is None else self.momentum * velocity + gradient
                    gradient = velocity
                attacked = inside(torch.addcmul(attacked, stride, norms.steepest(gradient, self.norm)))
        return attacked

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values, for a record."""
        found = {"name": "pgd", **asdict(self)}
        if self.target == "label":
            # As in the records from before there was a choice, so that those trainings can be resumed.
            del found["target"]
        return found

    def _goal(self, model: Model, x: Tensor, y: Tensor) -> Tensor | None:
        """What the steps lead away from, or towards; None where the first of them will tell."""
        if self.target == "label":
            return y
        if self.start == "none":
            return None
        with torch.no_grad():
            return self._chosen(model(x))

    def _chosen(self, logits: Tensor) -> Tensor:
        """The classes N that clean logits N x K single out."""
        return logits.argmin(1) if self.target == "least-likely" else logits.argmax(1)

    def _checked_loss(self, images: Tensor, y: Tensor, loss: str) -> Loss:
        check_choice("loss", loss, LOSSES)
        raised = LOSSES[loss]
        if raised is kl and self.target != "label":
            raise InputError(f"a step on the KL divergence knows no classes: use the target 'label', not {self.target}")
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
        if self.target == "least-likely":
            raised = negated(raised)
        device = images.device.type
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
            # No step depends on the length of the gradient.
            return lambda logits, goal: raised(logits, goal) * _FLOAT16_SCALE
        return raised
