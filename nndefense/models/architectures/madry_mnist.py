"""The MNIST net of Madry et al. (ICLR 2018), section 5."""

from __future__ import annotations

from torch import Tensor, nn


class MadryMNIST(nn.Module):
    """Two 5x5 convolutions of 32 and 64 filters, each with 2x2 max pooling, then 1024 hidden units.

    The convolutions keep the size, and pooling rounds up, as SAME padding does; so 28 x 28 images give 7 x 7 maps
    and 8 x 8 images 2 x 2 maps. The linear layer fixes height and width.
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
