"""A net whose last features are made to be retrieved by: a learned projection, and a temperature for its distances."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

#: Length of the embeddings g(x).
DIMENSION = 64


class EmbeddedNet(nn.Module):
    """A net up to its last linear layer, which gives the embedding g(x); then a linear head.

    As a plain net it answers ``head(g(x))``. A retrieval compares images by ``exp(-|g(x) - g(x_j)|^2 / T)``; the rows
    x_j belong to whoever has them, and are no part of the net.

    Attributes:
        base: the net without its last linear layer.
        embedding: that layer: -> g(x), N x d.
        head: g(x) -> logits N x classes.
        log_temperature: log T, a scalar; T begins at the root of d, far above the distances of fresh embeddings, which
            then grow until classes are told apart. Nothing but a training by retrieval changes it.
    """

    def __init__(self, base: nn.Module, classes: int) -> None:
        super().__init__()
        name, last = list(base.named_children())[-1]
        assert isinstance(last, nn.Linear)
        setattr(base, name, nn.Identity())
        self.base = base
        self.embedding = last
        self.head = nn.Linear(last.out_features, classes)
        self.log_temperature = nn.Parameter(torch.tensor(0.5 * math.log(last.out_features)))

    @property
    def temperature(self) -> float:
        """T."""
        return float(self.log_temperature.detach().exp())

    def embed(self, images: Tensor) -> Tensor:
        """``g(x)``: normalised images N x C x H x W -> N x d."""
        found: Tensor = self.embedding(self.base(images))
        return found

    def forward(self, images: Tensor) -> Tensor:
        """Logits N x K of images on their own."""
        logits: Tensor = self.head(self.embed(images))
        return logits
