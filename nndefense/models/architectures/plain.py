"""Nets without shortcuts: a small one, and those that papers on robustness use, linear and maxout nets among them."""

from __future__ import annotations

import math

import torch
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


class Softmax(nn.Module):
    """Softmax regression: one linear layer over the pixels, the shallow net of Goodfellow et al. (ICLR 2015)."""

    def __init__(self, input_shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(math.prod(input_shape), classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits N x K."""
        logits: Tensor = self.fc(self.flatten(images))
        return logits


class Maxout(nn.Module):
    """N x (units * pieces) x ... -> N x units x ...: the largest of a unit's pieces (Goodfellow et al., ICML 2013)."""

    def __init__(self, units: int, pieces: int) -> None:
        super().__init__()
        self.units, self.pieces = units, pieces

    def forward(self, values: Tensor) -> Tensor:
        """Return the units."""
        return torch.unflatten(values, 1, (self.units, self.pieces)).amax(2)


class MaxoutNet(nn.Module):
    """Two layers of 240 maxout units of 5 linear pieces, for MNIST (Goodfellow et al., ICML 2013), with dropout.

    A fifth of the pixels and half of the units are dropped in training. The limits that the paper sets to the length of
    the weights are left out.
    """

    def __init__(self, input_shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.drop0 = nn.Dropout(0.2)
        self.fc1 = nn.Linear(math.prod(input_shape), 240 * 5)
        self.maxout1 = Maxout(240, 5)
        self.drop1 = nn.Dropout(0.5)
        self.fc2 = nn.Linear(240, 240 * 5)
        self.maxout2 = Maxout(240, 5)
        self.drop2 = nn.Dropout(0.5)
        self.fc3 = nn.Linear(240, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits N x K."""
        units = self.maxout1(self.fc1(self.drop0(self.flatten(images))))
        logits: Tensor = self.fc3(self.drop2(self.maxout2(self.fc2(self.drop1(units)))))
        return logits


class MaxoutCNN(nn.Module):
    """Three maxout convolutions and a maxout layer, as Goodfellow et al. (ICML 2013) have them for CIFAR-10.

    8x8, 8x8 and 5x5 kernels of 96, 192 and 192 units with 2 pieces, each with max pooling that halves the map, then
    500 units of 5 pieces; dropout of a fifth of the pixels and half of the units. ``width`` multiplies the numbers of
    units. The linear layer fixes height and width. The limits that the paper sets to the length of the weights are left
    out, and how maps are padded is not the paper's to the pixel.
    """

    def __init__(self, input_shape: tuple[int, int, int], classes: int, *, width: float = 1.0) -> None:
        super().__init__()
        channels, *sides = input_shape
        first, second, hidden = (round(width * units) for units in (96, 192, 500))
        # A dropped pixel is grey and not black: a net learns to need noise as strong as black pixels make, and is near
        # guessing on whole images. A buffer, so that it stands among the weights.
        self.grey: torch.Tensor
        self.register_buffer("grey", torch.tensor(0.5))
        self.drop0 = nn.Dropout(0.2)
        self.conv1 = nn.Conv2d(channels, 2 * first, 8, padding=4)
        self.maxout1 = Maxout(first, 2)
        self.pool1 = nn.MaxPool2d(4, 2, padding=1)
        self.drop1 = nn.Dropout(0.5)
        self.conv2 = nn.Conv2d(first, 2 * second, 8, padding=3)
        self.maxout2 = Maxout(second, 2)
        self.pool2 = nn.MaxPool2d(4, 2, padding=1)
        self.drop2 = nn.Dropout(0.5)
        self.conv3 = nn.Conv2d(second, 2 * second, 5, padding=3)
        self.maxout3 = Maxout(second, 2)
        self.pool3 = nn.MaxPool2d(2)
        self.drop3 = nn.Dropout(0.5)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(second * math.prod(map(_maxout_side, sides)), 5 * hidden)
        self.maxout4 = Maxout(hidden, 5)
        self.drop4 = nn.Dropout(0.5)
        self.fc2 = nn.Linear(hidden, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits N x K."""
        maps = self.pool1(self.maxout1(self.conv1(self.drop0(images - self.grey))))
        maps = self.pool2(self.maxout2(self.conv2(self.drop1(maps))))
        maps = self.pool3(self.maxout3(self.conv3(self.drop2(maps))))
        logits: Tensor = self.fc2(self.drop4(self.maxout4(self.fc1(self.flatten(self.drop3(maps))))))
        return logits


def _maxout_side(side: int) -> int:
    """The side of the last map of :class:`MaxoutCNN`."""
    for kernel, padding, pool, border in ((8, 4, 4, 1), (8, 3, 4, 1), (5, 3, 2, 0)):
        side = (side + 2 * padding - kernel + 1 + 2 * border - pool) // 2 + 1
    return side
