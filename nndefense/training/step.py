"""One step of a training: loss, gradient, sum over the processes, optimiser, moving average, figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nndefense.errors import InputError
from nndefense.models import Classifier
from nndefense.training.batch import Attack, Objective, Outcome
from nndefense.training.batches import StepShare
from nndefense.training.ema import WeightAverage, copy_weights
from nndefense.training.launcher import Team
from nndefense.training.precision import Precision
from nndefense.training.progress import flat_state, part_of, restore_flat_state
from nndefense.training.settings import TrainingSettings
from nndefense.training.state import Sums

_MODEL = "model."
_AVERAGE = "average."
# What objectives call the accuracy where they know it of a part of the images only.
_ACCURACIES = {"clean_accuracy": "accuracy"}


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
    attack: Attack | None
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
        found = {f"{_MODEL}{name}": tensor for name, tensor in self.classifier.state_dict().items()}
        if self.average is not None:
            found |= {f"{_AVERAGE}{name}": tensor for name, tensor in self.average.tensors.items()}
        return found | flat_state(self.solver)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from the tensors that :meth:`tensors` returned."""
        self.classifier.load_state_dict(part_of(tensors, _MODEL))
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
