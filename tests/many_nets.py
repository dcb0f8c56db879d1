"""Nets as people have them, for tests/test_takes_nets.py: small ones with random weights, for cats and dogs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import convnext, swin_transformer

SIDE = 32


# The same weights whenever a factory of this file is called: the file is run anew for each command.
torch.manual_seed(0)


def said(net: nn.Module, channels: int = 3) -> nn.Module:
    """The net with its input shape and classes as attributes."""
    net.input_shape, net.classes = (channels, SIDE, SIDE), ["cat", "dog"]  # type: ignore[assignment]
    return net


# -- torchvision's families -----------------------------------------------------------------------------------------


def resnet() -> nn.Module:
    return said(models.resnet18(num_classes=2))


def mobilenet() -> nn.Module:
    return said(models.mobilenet_v3_small(num_classes=2))


def efficientnet() -> nn.Module:
    return said(models.efficientnet_b0(num_classes=2))


def regnet() -> nn.Module:
    return said(models.regnet_y_400mf(num_classes=2))


def densenet() -> nn.Module:
    return said(models.DenseNet(8, (2, 2, 2, 2), 16, num_classes=2))


def convnext_() -> nn.Module:
    stages = [convnext.CNBlockConfig(16, 32, 1), convnext.CNBlockConfig(32, 64, 2), convnext.CNBlockConfig(64, None, 1)]
    return said(models.ConvNeXt(stages, num_classes=2))


def vit() -> nn.Module:
    return said(models.VisionTransformer(SIDE, 8, 4, 2, 32, 64, num_classes=2))


def swin() -> nn.Module:
    return said(models.SwinTransformer([4, 4], 24, [1, 1], [2, 4], [4, 4], num_classes=2))


def swin_v2() -> nn.Module:
    return said(
        models.SwinTransformer(
            [4, 4], 24, [1, 1], [2, 4], [4, 4], num_classes=2, block=swin_transformer.SwinTransformerBlockV2,
            downsample_layer=swin_transformer.PatchMergingV2,
        )
    )  # fmt: skip


def maxvit() -> nn.Module:
    return said(models.MaxVit((SIDE, SIDE), 16, 4, [16, 32], [1, 1], 8, 0.0, num_classes=2))


# -- what people put around a net, and what they turn it into ---------------------------------------------------------


def plain(channels: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 2),
    )  # fmt: skip


class Normalize(nn.Module):
    """What stands before many a net."""

    def forward(self, images: Tensor) -> Tensor:
        return (images - 0.45) / 0.225


class Around(nn.Module):
    """A class of one's own around a net."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.backbone = net

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.backbone(images * 2 - 1)
        return logits


class Pair(nn.Module):
    """A net with two outputs."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(images), images


def colour() -> nn.Module:
    return said(plain())


def unseeded() -> nn.Module:
    torch.seed()
    return said(plain())


def grey() -> nn.Module:
    return said(plain(1), channels=1)


def normalised() -> nn.Module:
    return said(nn.Sequential(Normalize(), plain()))


def around() -> nn.Module:
    return said(Around(plain()))


def parallel() -> nn.Module:
    return said(nn.DataParallel(plain()))


def compiled() -> nn.Module:
    return said(torch.compile(plain()))  # type: ignore[arg-type]


def traced() -> nn.Module:
    return torch.jit.trace(plain().eval(), torch.zeros(1, 3, SIDE, SIDE))  # type: ignore[no-any-return]


def scripted() -> nn.Module:
    return torch.jit.script(plain())  # type: ignore[no-any-return]


def program() -> torch.export.ExportedProgram:
    sizes = ({0: torch.export.Dim("count")},)
    return torch.export.export(plain().eval(), (torch.zeros(2, 3, SIDE, SIDE),), dynamic_shapes=sizes)


def exported() -> nn.Module:
    return said(program().module())


def unflattened() -> nn.Module:
    return said(torch.export.unflatten(program()))


def quantised() -> nn.Module:
    return said(torch.ao.quantization.quantize_dynamic(plain(), {nn.Linear}, dtype=torch.qint8))


def half() -> nn.Module:
    return said(plain().half())


def probabilities() -> nn.Module:
    return said(nn.Sequential(plain(), nn.Softmax(1)))


def pair() -> nn.Module:
    return said(Pair(plain()))


def one_output() -> nn.Module:
    return said(nn.Sequential(plain(), nn.Linear(2, 1)))


def restless() -> nn.Module:
    class Restless(Around):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(nn.functional.dropout(images, 0.5, training=True))

    return said(Restless(plain()))


def batch_statistics() -> nn.Module:
    net = plain()
    net[1] = nn.BatchNorm2d(8, track_running_stats=False)  # type: ignore[index]
    return said(net)
