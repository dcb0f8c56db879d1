"""A net whose last features are made to be retrieved by: a learned projection, and a temperature for its distances."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

#: Length of the embeddings g(x).
DIMENSION = 64


class Standardised(nn.Linear):
    """A linear layer whose outputs have mean 0 and variance 1 each: over the batch in training, else as seen of late.

    Two images are then 2 d apart in the mean, squared, whatever the weights are: no training makes distances outgrow
    a temperature, and rows that were computed some steps ago have the scale of those of now.
    """

    def __init__(self, like: nn.Linear) -> None:
        super().__init__(like.in_features, like.out_features, bias=False)
        self.weight = like.weight
        self.norm = nn.BatchNorm1d(like.out_features, affine=False, dtype=like.weight.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """N x in -> N x out."""
        found: Tensor = super().forward(input)
        if self.training and len(found) > 1:
            return cast(Tensor, self.norm(found))
        # One image has no variance.
        return nn.functional.batch_norm(found, self.norm.running_mean, self.norm.running_var, eps=self.norm.eps)


class EmbeddedNet(nn.Module):
    """A net up to its last linear layer, which gives the embedding g(x); then a linear head.

    As a plain net it answers ``head(g(x))``. A retrieval compares images by ``exp(-|g(x) - g(x_j)|^2 / T)``; the rows
    x_j belong to whoever has them, and are no part of the net.

    Attributes:
        base: the net without its last linear layer.
        embedding: that layer, standardised: -> g(x), N x d.
        head: g(x) -> logits N x classes.
        log_temperature: log T, a scalar; T begins at the root of d, a sixteenth of the mean squared distance. Nothing
            but a training by retrieval changes it.
    """

    def __init__(self, base: nn.Module, classes: int) -> None:
        super().__init__()
        name, last = list(base.named_children())[-1]
        assert isinstance(last, nn.Linear)
        setattr(base, name, nn.Identity())
        self.base = base
        self.embedding = Standardised(last)
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
