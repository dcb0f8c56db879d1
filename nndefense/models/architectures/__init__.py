"""The architectures that can be trained here, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from nndefense.models.architectures import embedded
from nndefense.models.architectures.attentive import DIMENSION, AttentiveNet
from nndefense.models.architectures.plain import MadryMNIST, MaxoutCNN, MaxoutNet, SmallCNN, Softmax, StridedCNN
from nndefense.models.architectures.residual import CifarResNet18, WideResNet

InputShape = tuple[int, int, int]


@dataclass(frozen=True)
class Architecture:
    """How to build a net.

    Attributes:
        build: from (C, H, W) and the number of classes K to a net with fresh weights.
        smallest: the least height and width that the net takes.
        fixed_size: whether a built net takes only images of that height and width.
        side: the height and width that it was made for, to which photos of different sizes are brought.
        summary: one line for people.
    """

    build: Callable[[InputShape, int], nn.Module]
    smallest: int
    fixed_size: bool
    side: int
    summary: str


def _wide_resnet(depth: int, factor: int, millions: str) -> Architecture:
    return Architecture(
        build=lambda shape, count: WideResNet(shape, count, depth=depth, factor=factor),
        smallest=4,
        fixed_size=False,
        side=32,
        summary=f"pre-activation wide residual net of depth {depth} and width factor {factor}, {millions} M weights",
    )


#: Every architecture that can be trained here, by name.
ARCHITECTURES: dict[str, Architecture] = {
    "small-cnn": Architecture(SmallCNN, 4, False, 32, "three convolution blocks, for images of 8 to 32 pixels"),
    "madry-mnist": Architecture(MadryMNIST, 4, True, 28, "two 5x5 convolutions and a wide linear layer, for MNIST"),
    "strided-cnn": Architecture(StridedCNN, 4, True, 28, "two strided 4x4 convolutions, a tenth of madry-mnist's work"),
    "cifar-resnet18": Architecture(
        CifarResNet18, 4, False, 32, "ResNet-18 with a 3x3 stem for CIFAR-10, 11.2 M weights"
    ),
    "softmax": Architecture(Softmax, 1, True, 28, "softmax regression: one linear layer over the pixels"),
    "maxout": Architecture(MaxoutNet, 1, True, 28, "two layers of 240 maxout units of 5 pieces, for MNIST"),
    "maxout-cnn": Architecture(MaxoutCNN, 5, True, 32, "three maxout convolutions and a maxout layer, for CIFAR-10"),
    "maxout-cnn-narrow": Architecture(
        lambda shape, count: MaxoutCNN(shape, count, width=0.25), 5, True, 32, "maxout-cnn with a quarter of its units"
    ),
    # Five units of 16, 32 and 64 filters: the narrow net of Madry et al. (2018).
    "wrn-34-1": _wide_resnet(34, 1, "0.5"),
    "wrn-40-2": _wide_resnet(40, 2, "2.2"),
    "wrn-28-10": _wide_resnet(28, 10, "36.5"),
    "wrn-34-10": _wide_resnet(34, 10, "46.2"),
}

#: What an architecture with attention over retrieved neighbours is called: this before the name of its feature net.
ATTENTIVE = "ra-"
#: And one with an embedding to retrieve by.
EMBEDDED = "nn-"


def _attentive(name: str) -> Architecture:
    base = ARCHITECTURES[name]
    return Architecture(
        build=lambda shape, count: AttentiveNet(base.build(shape, DIMENSION), DIMENSION, count),
        smallest=base.smallest,
        fixed_size=base.fixed_size,
        side=base.side,
        summary=f"RA-CNN with {name} for its features, to be trained with a database by nndefense racnn train",
    )


def _embedded(name: str) -> Architecture:
    base = ARCHITECTURES[name]
    return Architecture(
        build=lambda shape, count: embedded.EmbeddedNet(base.build(shape, embedded.DIMENSION), count),
        smallest=base.smallest,
        fixed_size=base.fixed_size,
        side=base.side,
        summary=f"{name} with an embedding of length {embedded.DIMENSION} to retrieve by, for the objectives retrieval",
    )


_plain = tuple(ARCHITECTURES)
ARCHITECTURES |= {f"{ATTENTIVE}{name}": _attentive(name) for name in _plain}
ARCHITECTURES |= {f"{EMBEDDED}{name}": _embedded(name) for name in _plain}
#: All names in a few words, for messages.
KNOWN = f"{', '.join(_plain)}, or one of them after {ATTENTIVE} or {EMBEDDED}"
