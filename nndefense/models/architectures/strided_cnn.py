"""The small MNIST net of Wong and Kolter (ICML 2018), which trains in minutes on a CPU even under attack."""

from __future__ import annotations

from torch import Tensor, nn


class StridedCNN(nn.Module):
    """Two 4x4 convolutions of stride 2 with 16 and 32 filters, then 100 hidden units.

    Without normalisation or pooling a step costs a tenth of :class:`MadryMNIST`'s. 28 x 28 images give 7 x 7 maps;
    the linear layer fixes height and width.
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
