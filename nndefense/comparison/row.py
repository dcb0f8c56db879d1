"""One row of a comparison: a defence and what its attackers hold in their hands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nndefense.attacks.retrieval import RetrievalSurface
from nndefense.comparison.recipe import RowSpec
from nndefense.models import Classifier
from nndefense.pipeline.materials import Materials


@dataclass(frozen=True)
class Row:
    """A defence of the comparison.

    Attributes:
        spec: what it was to be.
        model: images N x C x H x W in [0, 1] -> scores N x classes of the comparison's classifier; None where it is
            not there.
        reason: why not, for people; empty where it is.
        facts: what is to be known of it, as plain values.
        white: what an attacker who knows the defence differentiates; None where that is nothing beyond the gray box.
        surface: for the attacks on retrieval, or None.
        database, database_rows: fingerprint and number of rows of its database, or None.
    """

    spec: RowSpec
    model: nn.Module | None = None
    reason: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    white: nn.Module | None = None
    surface: RetrievalSurface | None = None
    database: str | None = None
    database_rows: int | None = None


class InClassesOf(nn.Module):
    """A net's answer in the class numbers of another: images -> log-probabilities N x classes of the other."""

    def __init__(self, net: nn.Module, numbers: Tensor, count: int) -> None:
        """
        Args:
            net: images -> logits N x K.
            numbers: for each of its K classes the other's class number.
            count: of the other's classes; those that the net does not know get a probability of 0.
        """
        super().__init__()
        self.net, self.count = net, count
        self.numbers: Tensor
        self.register_buffer("numbers", numbers)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Images N x C x H x W in [0, 1] -> N x count."""
        found = self.net(images).log_softmax(1)
        # A finite floor: losses subtract these numbers from one another.
        out = torch.full((len(found), self.count), -1e4, dtype=found.dtype, device=found.device)
        return out.index_copy(1, self.numbers, found)


def in_classes_of(materials: Materials, net: Classifier) -> nn.Module:
    """A net that was trained on the comparison's images, answering in the classes of the comparison's classifier."""
    classifier = materials.classifier
    if net.classes == classifier.classes:
        return net
    numbers = classifier.label_map(net.classes)
    return InClassesOf(net, numbers.to(materials.device), len(classifier.classes))
