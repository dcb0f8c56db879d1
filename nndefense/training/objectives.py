"""What a training minimises."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn
from torch.nn import functional as F


class Objective(Protocol):
    """A loss of a model on a batch.

    Any function with these first three arguments, or an object that is called like one. It may draw from torch's
    default random generators: a training seeds them anew for every epoch. A training that is resumed must have an
    objective of the same :func:`objective_name`.
    """

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, /) -> Tensor:
        """Return a scalar to minimise, for images N x C x H x W in [0, 1] and int64 labels N."""
        ...


def standard(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy (in nats) of the model's logits on the images as they are."""
    return F.cross_entropy(model(images), labels)


def objective_name(objective: Objective) -> str:
    """The text that identifies an objective: its attribute ``description``, else its name, else its ``repr``."""
    described = getattr(objective, "description", None) or getattr(objective, "__qualname__", None)
    return str(described or repr(objective))
