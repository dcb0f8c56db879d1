"""One step of a training: loss, gradient, sum over the processes, optimiser, moving average, figures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nndefense.errors import InputError
from nndefense.models import Classifier
from nndefense.models.state import tensors_in
from nndefense.training.batch import BatchAttack, Objective, Outcome
from nndefense.training.batches import StepShare
from nndefense.training.launcher import Team
from nndefense.training.progress import Sums, flat_state, part_of, restore_flat_state
from nndefense.training.settings import TrainingSettings

# In the first steps a long memory would hold mostly the weights of the start.
_YOUNG = 10
_MODEL = "model."
_AVERAGE = "average."
# What objectives call the accuracy where they know it of a part of the images only.
_ACCURACIES = {"clean_accuracy": "accuracy"}
_FIRST_CUDA_WITH_BFLOAT16 = 8


class Precision:
    """How a step computes its loss and follows its gradient: in 16 bits, where that is safe.

    * The weights, the optimiser's state and the moving average are float32 always: one step changes a weight by less
      than 16 bits resolve. Sums (the softmax, the loss, the norms) stay in float32 by autocast's own rules.
    * ``bfloat16`` has the exponents of float32, so neither the gradients of the weights nor the far smaller ones of
      the images underflow. It works on CPUs, and is fast only on those that multiply it natively.
    * ``float16`` ends at 6e-8. The loss is scaled for the weights' gradients (Micikevicius et al., ICLR 2018, section
      3.2), and the attack scales its own. A CPU has no fast float16: it is switched off there.
    * Evaluation (validation, robust checks, the accuracy that is reported) is done in float32: 16-bit logits tie, and
      a net that rounds its gradients away looks more robust than it is.

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


class WeightAverage:
    """A second set of weights that follows the first: ``average += (1 - decay) * (weights - average)`` a step.

    Polyak averaging with an exponential window (Tarvainen and Valpola, NeurIPS 2017, section 2, without the teacher's
    loss). In step t (from 1) the decay is at most (1 + t) / (10 + t), so that the average forgets the random start.
    The running statistics of batch normalisation are averaged as the weights are; whole numbers are copied.

    Args:
        net: whose weights are averaged; the average starts as a copy of them.
        decay: in (0, 1).
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.decay = decay
        self.net = net
        self.tensors = {name: tensor.detach().clone() for name, tensor in tensors_in(net).items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the net's weights after its step number ``step`` (from 1)."""
        decay = min(self.decay, (1 + step) / (_YOUNG + step))
        current = tensors_in(self.net)
        floats = [name for name, tensor in self.tensors.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([self.tensors[name] for name in floats], [current[name] for name in floats], 1 - decay)
        for name in self.tensors.keys() - floats:
            self.tensors[name].copy_(current[name])

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a saved average: the same names as those of the net's ``state_dict``."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Lend the net the averaged weights; afterwards it has its own again."""
        with torch.no_grad():
            own = {name: tensor.detach().clone() for name, tensor in tensors_in(self.net).items()}
            copy_weights(self.net, self.tensors)
        try:
            yield
        finally:
            copy_weights(self.net, own)


@torch.no_grad()
def copy_weights(net: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Overwrite the values of a net's weights and buffers, where they are."""
    for name, tensor in tensors_in(net).items():
        tensor.copy_(tensors[name])


@dataclass
class Stepper:
    """What a step needs, and all the tensors that it changes.

    Nothing in it waits for a GPU, except the optimiser's step in float16.

    Attributes:
        classifier: on the team's device.
        objective, attack, settings, team: of the training.

    Raises:
        InputError: the classifier has no weights to train.
    """

    classifier: Classifier
    objective: Objective
    attack: BatchAttack | None
    settings: TrainingSettings
    team: Team

    def __post_init__(self) -> None:
        classifier, settings, team = self.classifier, self.settings, self.team
        self.weights = [weight for weight in classifier.parameters() if weight.requires_grad]
        if not self.weights:
            raise InputError("the classifier has no weights to train: they are all frozen")
        self.solver = _optimizer(self.weights, settings)
        self.precision = Precision(settings.precision, team.device)
        self.average = None if settings.ema is None else WeightAverage(classifier, settings.ema)
        # Batches come in two sizes at most: a graph for each is faster than one for any.
        self.model: nn.Module = torch.compile(classifier, dynamic=False) if settings.compile else classifier  # type: ignore[assignment]

    def __call__(self, share: StepShare, rate: float, number: int, sums: Sums) -> None:
        """Make step ``number`` (from 1) of the training with the learning rate ``rate``, and add its figures."""
        for group in self.solver.param_groups:
            group["lr"] = rate
        self.model.train()
        self.solver.zero_grad(set_to_none=True)
        with self.precision.forward():
            outcome = self.objective(self.model, share.batch, self.attack)
        if not isinstance(outcome, Outcome):
            raise InputError(f"an objective returns an Outcome, not {type(outcome).__name__}: see training.Outcome")
        own = len(share.batch.images)
        # The processes' shares differ by an image, but an average over processes weighs them alike.
        factor = own * self.team.size / share.images
        self.precision.backward(outcome.loss if factor == 1 else outcome.loss * factor)
        figures = _figures(outcome, share)
        names, totals = list(figures), list(figures.values())
        if self.team.size > 1:
            joined = torch.stack([total.to(torch.float32) for total, _ in totals])
            joined = self.team.join_step(self.classifier, self.weights, joined)
            totals = [(total, count) for total, (_, count) in zip(joined.unbind(), totals, strict=True)]
        self.precision.step(self.solver, self.weights, self.settings.clip_norm)
        if self.average is not None:
            self.average.update(number)
        for name, (total, count) in zip(names, totals, strict=True):
            sums.add(name, total, count)
        sums.images += share.images

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of a checkpoint, by name."""
        found = {f"{_MODEL}{name}": tensor for name, tensor in tensors_in(self.classifier).items()}
        if self.average is not None:
            found |= {f"{_AVERAGE}{name}": tensor for name, tensor in self.average.tensors.items()}
        return found | flat_state(self.solver)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from the tensors that :meth:`tensors` returned."""
        # What is no tensor is not in a checkpoint.
        self.classifier.load_state_dict(self.classifier.state_dict() | part_of(tensors, _MODEL))
        if self.average is not None:
            self.average.load(part_of(tensors, _AVERAGE))
        restore_flat_state(self.solver, tensors)

    def settle(self, best: Mapping[str, Tensor] | None) -> None:
        """Give the classifier its final weights: the best ones, else the averaged ones, else those of the last step."""
        if best is not None:
            copy_weights(self.classifier, best)
        elif self.average is not None:
            copy_weights(self.classifier, self.average.tensors)


def _figures(outcome: Outcome, share: StepShare) -> dict[str, tuple[Tensor, int]]:
    """Sums over this process's images, each with the number of images of all processes that it will stand for."""
    batch, own = share.batch, len(share.batch.images)
    found = {_ACCURACIES.get(name, name): (value.detach() * own, share.images) for name, value in outcome.parts.items()}
    found["loss"] = (outcome.loss.detach() * own, share.images)
    for name, logits in (("accuracy", outcome.clean), ("robust_accuracy", outcome.robust)):
        if logits is not None and len(logits) == own:
            # Pseudo-labels may be wrong, and labelled images come first.
            right = (logits.argmax(1) == batch.labels)[: share.own_labelled].sum()
            found[name] = (right, share.labelled)
    return found


def _optimizer(weights: list[nn.Parameter], settings: TrainingSettings) -> torch.optim.Optimizer:
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            weights, settings.lr, settings.momentum, weight_decay=settings.weight_decay, nesterov=settings.nesterov
        )
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    return kind(weights, lr=settings.lr, weight_decay=settings.weight_decay)
