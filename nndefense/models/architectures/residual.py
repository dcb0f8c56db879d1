"""Residual nets for images of CIFAR's size: ResNet-18 and the wide ones with pre-activation."""

from __future__ import annotations

from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; ReLU after the sum."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        self.relu2 = nn.ReLU()

    def forward(self, maps: Tensor) -> Tensor:
        """Return N x width maps, at 1 / stride of the resolution."""
        inner = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(maps)))))
        result: Tensor = self.relu2(inner + self.shortcut(maps))
        return result


class CifarResNet18(nn.Module):
    """ResNet-18 (He et al., CVPR 2016) as it is used on CIFAR-10: a 3x3 stem without pooling.

    Stem of 64 filters, then ``layer1`` to ``layer4`` of two blocks each, 64 to 512 filters, and a linear layer.
    """

    def __init__(self, input_shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(input_shape[0], 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.layer1 = _basic_stage(64, 64, 1)
        self.layer2 = _basic_stage(64, 128, 2)
        self.layer3 = _basic_stage(128, 256, 2)
        self.layer4 = _basic_stage(256, 512, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(512, classes)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits N x K."""
        maps = self.relu(self.bn1(self.conv1(images)))
        maps = self.layer4(self.layer3(self.layer2(self.layer1(maps))))
        logits: Tensor = self.fc(self.flatten(self.avgpool(maps)))
        return logits


def _basic_stage(channels: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(BasicBlock(channels, width, stride), BasicBlock(width, width, 1))


class PreActivationBlock(nn.Module):
    """Batch normalisation and ReLU before each of two 3x3 convolutions.

    Where the width or the resolution changes, the shortcut is a 1x1 convolution of the activated input.
    """

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or channels != width:
            self.shortcut = nn.Conv2d(channels, width, 1, stride, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        """Return N x width maps, at 1 / stride of the resolution."""
        active = self.relu1(self.bn1(maps))
        inner = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        result: Tensor = inner + (maps if self.shortcut is None else self.shortcut(active))
        return result


class WideResNet(nn.Module):
    """A wide residual net with pre-activation (Zagoruyko and Komodakis, BMVC 2016).

    Stem of 16 filters, ``block1`` to ``block3`` of (depth - 4) / 6 residual blocks each, and a linear layer.

    The blocks have 16, 32 and 64 times ``factor`` filters; their outputs are sums before activation. ``relu`` is the
    last activated map.
    """

    def __init__(self, input_shape: tuple[int, int, int], classes: int, *, depth: int, factor: int) -> None:
        super().__init__()
        count = (depth - 4) // 6
        self.conv1 = nn.Conv2d(input_shape[0], 16, 3, padding=1, bias=False)
        self.block1 = _wide_stage(16, 16 * factor, count, 1)
        self.block2 = _wide_stage(16 * factor, 32 * factor, count, 2)
        self.block3 = _wide_stage(32 * factor, 64 * factor, count, 2)
        self.bn = nn.BatchNorm2d(64 * factor)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(64 * factor, classes)
        _initialise(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits N x K."""
        maps = self.block3(self.block2(self.block1(self.conv1(images))))
        logits: Tensor = self.fc(self.flatten(self.avgpool(self.relu(self.bn(maps)))))
        return logits


def _wide_stage(channels: int, width: int, count: int, stride: int) -> nn.Sequential:
    first = PreActivationBlock(channels, width, stride)
    return nn.Sequential(first, *(PreActivationBlock(width, width, 1) for _ in range(count - 1)))


def _initialise(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
