"""Convolutional nets without shortcuts: a small one, and two that papers on robustness use on MNIST."""

from __future__ import annotations

from torch import Tensor, nn


class SmallCNN(nn.Module):
    """Three blocks of 3x3 convolution, batch normalisation and ReLU, max pooling between them, then a linear layer.

    It trains in seconds on a CPU. ``block1`` keeps the full resolution, ``block2`` has half of it and ``block3`` a
    quarter. Images of any height and width from 4 up, since the last map is averaged over its four quarters.
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
    return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())


class MadryMNIST(nn.Module):
    """The MNIST net of Madry et al. (ICLR 2018), section 5.

    Two 5x5 convolutions of 32 and 64 filters, each with 2x2 max pooling, then 1024 hidden units. The convolutions keep
    the size, and pooling rounds up, as SAME padding does; so 28 x 28 images give 7 x 7 maps and 8 x 8 images 2 x 2
    maps. The linear layer fixes height and width.
    """

    def __init__(self, input_shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, height, width = input_shape
        self.conv1 = nn.Conv2d(channels, 32, 5, padding=2)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2, ceil_mode=True)
        self.conv2 = nn.Conv2d(32, 64, 5, padding=2)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2, ceil_mode=True)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(64 * -(-height // 4) * -(-width // 4), 1024)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(1024, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits N x K."""
        maps = self.pool1(self.relu1(self.conv1(images)))
        maps = self.pool2(self.relu2(self.conv2(maps)))
        logits: Tensor = self.fc2(self.relu3(self.fc1(self.flatten(maps))))
        return logits


class StridedCNN(nn.Module):
    """The small MNIST net of Wong and Kolter (ICML 2018), which trains in minutes on a CPU even under attack.

    Two 4x4 convolutions of stride 2 with 16 and 32 filters, then 100 hidden units. Without normalisation or pooling
    a step costs a tenth of :class:`MadryMNIST`'s. 28 x 28 images give 7 x 7 maps; the linear layer fixes height and
    width.
    """

    def __init__(self, input_shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, height, width = input_shape
        self.conv1 = nn.Conv2d(channels, 16, 4, stride=2, padding=1)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(16, 32, 4, stride=2, padding=1)
        self.relu2 = nn.ReLU()
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(32 * (height // 2 // 2) * (width // 2 // 2), 100)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(100, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits N x K."""
        maps = self.relu2(self.conv2(self.relu1(self.conv1(images))))
        logits: Tensor = self.fc2(self.relu3(self.fc1(self.flatten(maps))))
        return logits
