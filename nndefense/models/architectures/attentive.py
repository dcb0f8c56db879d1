"""The trained part of RA-CNN (Zhao and Cho, CVPR 2019): features, attention over neighbours, classifier.

An image x and its K neighbours x'_1..x'_K go through the same feature net phi. With a trained matrix U,

    b_k = phi(x'_k)^T U phi(x),    a = softmax(b),    P(x) = sum_k a_k phi(x'_k),    output g(P(x)).

The weights a_k are above 0 and sum to 1, so P(x) lies in the convex hull of the neighbours' features wherever x is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

#: Length of the feature vectors phi(x). The paper's is unknown.
DIMENSION = 128


def attention_scores(query: Tensor, neighbors: Tensor, matrix: Tensor) -> Tensor:
    """``b_k = phi(x'_k)^T U phi(x)``: features N x d, neighbours N x K x d and U d x d -> N x K."""
    return torch.bmm(neighbors, (query @ matrix.T).unsqueeze(2)).squeeze(2)


def projected(weights: Tensor, neighbors: Tensor) -> Tensor:
    """``sum_k a_k phi(x'_k)``: weights N x ... x K and neighbours N x K x d -> N x ... x d."""
    return torch.einsum("n...k,nkd->n...d", weights, neighbors)


class AttentiveNet(nn.Module):
    """phi, U and g.

    As a plain net it answers ``g(phi(x))``: an image on its own, which is its own convex hull. The retrieval belongs
    to whoever has a database, and asks :meth:`features` and :meth:`answer`.

    U begins as the identity divided by the root of d, so that images attend to what is like them; g is two linear
    layers with a ReLU between. The paper's are unknown.

    Attributes:
        phi: images -> N x d.
        matrix: U, d x d.
        g: N x d -> logits N x classes.
    """

    def __init__(self, phi: nn.Module, dimension: int, classes: int) -> None:
        super().__init__()
        self.phi = phi
        self.matrix = nn.Parameter(torch.eye(dimension) / math.sqrt(dimension))
        self.g = nn.Sequential(nn.Linear(dimension, dimension), nn.ReLU(), nn.Linear(dimension, classes))

    @property
    def dimension(self) -> int:
        """d, the length of a feature vector."""
        return len(self.matrix)

    def forward(self, images: Tensor) -> Tensor:
        """Logits N x K of images on their own."""
        logits: Tensor = self.g(self.phi(images))
        return logits

    def features(self, images: Tensor) -> Tensor:
        """``phi(x)``: normalised images N x C x H x W -> N x d."""
        found: Tensor = self.phi(images)
        return found

    def attention(self, query: Tensor, neighbors: Tensor) -> Tensor:
        """``a = softmax(b)``: features N x d and their neighbours' N x K x d -> N x K, every row sums to 1."""
        return attention_scores(query, neighbors, self.matrix).softmax(1)

    def answer(self, query: Tensor, neighbors: Tensor) -> Tensor:
        """``g(P(x))``: features N x d and their neighbours' N x K x d -> logits N x classes."""
        logits: Tensor = self.g(projected(self.attention(query, neighbors), neighbors))
        return logits
