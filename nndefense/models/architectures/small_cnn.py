"""A small convolutional net that trains in seconds on a CPU."""

from __future__ import annotations

from torch import Tensor, nn


class SmallCNN(nn.Module):
    """Three blocks of 3x3 convolution, batch normalisation and ReLU, max pooling between them, then a linear layer.

    ``block1`` keeps the full resolution, ``block2`` has half of it and ``block3`` a quarter. Images of any height and
    width from 4 up, since the last map is averaged over its four quarters.
    """

    def __init__(self, input_shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        self.block1 = _block(input_shape[0], 32)
        self.pool1 = nn.MaxPool2d(2)
        self.block2 = _block(32, 64)
        self.pool2 = nn.MaxPool2d(2)
        self.block3 = _block(64, 128)
        self.pool3 = nn.AdaptiveAvgPool2d(2)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(128 * 2 * 2, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits N x K."""
        maps = self.block1(images)
        maps = self.block2(self.pool1(maps))
        maps = self.block3(self.pool2(maps))
        logits: Tensor = self.fc(self.flatten(self.pool3(maps)))
        return logits


def _block(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    )
