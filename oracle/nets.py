"""Small nets trained on real images, the same at every run."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nndefense.datasets import open_dataset

TRAIN, EPOCHS = {"digits": 1297, "mnist": 10_000}, {"digits": 20, "mnist": 2}


def trained(name: str) -> nn.Module:
    """A net with two convolutions and one linear layer, trained on the first images of the set, in evaluation mode."""
    data = open_dataset(f"{name}:train")
    images, labels = data.batch(np.arange(min(TRAIN[name], len(data))))
    torch.manual_seed(0)
    side = images.shape[-1]
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16 * (side // 4) ** 2, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(EPOCHS[name]):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
    return net.eval().requires_grad_(False)


def test_images(name: str, count: int) -> tuple[Tensor, Tensor]:
    """The first test images and their labels."""
    data = open_dataset(f"{name}:test")
    return data.batch(np.arange(min(count, len(data))))
