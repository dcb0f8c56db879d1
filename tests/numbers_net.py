"""A small net in NumPy, with its gradients by hand, beside the same in torch: for objectives written down again."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from nndefense.models import Classifier

Array = np.ndarray
SIDE, HIDDEN, CLASSES = 3, 5, 4


class Tanh(nn.Module):
    """Two layers with tanh between them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(SIDE * SIDE, HIDDEN), nn.Linear(HIDDEN, CLASSES)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data = 1.5 * torch.randn(parameter.shape, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.second(torch.tanh(self.first(x.flatten(1) - 0.5)))
        return logits


def tanh_net(seed: int = 3) -> Classifier:
    """A classifier in float64 for images 1 x 3 x 3 of 4 classes, in training mode."""
    shape = (1, SIDE, SIDE)
    net = Classifier(Tanh(seed), arch="tanh", input_shape=shape, classes=tuple("abcd"), fixed_size=True)
    return net.double().train()


class Numbers:
    """The same net in NumPy."""

    def __init__(self, model: Classifier) -> None:
        net = model.net
        assert isinstance(net, Tanh)
        self.a, self.b = (t.detach().numpy().copy() for t in (net.first.weight, net.first.bias))
        self.c, self.d = (t.detach().numpy().copy() for t in (net.second.weight, net.second.bias))

    def logits(self, x: Array) -> Array:
        return np.asarray(np.tanh((x.reshape(len(x), -1) - 0.5) @ self.a.T + self.b) @ self.c.T + self.d)

    def probabilities(self, x: Array) -> Array:
        e = np.exp(self.logits(x) - self.logits(x).max(1, keepdims=True))
        return np.asarray(e / e.sum(1, keepdims=True))

    def ce(self, x: Array, y: Array, smoothing: float = 0.0) -> Array:
        """Cross-entropy with the label's weight 1 - s + s / K and every other class's s / K."""
        target = (1 - smoothing) * np.eye(CLASSES)[y] + smoothing / CLASSES
        return np.asarray(-(target * np.log(self.probabilities(x))).sum(1))

    def slope(self, x: Array, y: Array) -> Array:
        """Gradient of the cross-entropy with respect to the images."""
        h = np.tanh((x.reshape(len(x), -1) - 0.5) @ self.a.T + self.b)
        back = ((self.probabilities(x) - np.eye(CLASSES)[y]) @ self.c * (1 - h**2)) @ self.a
        return np.asarray(back.reshape(x.shape))


def slopes(loss: object, parameters: list[Tensor], step: float = 1e-5) -> Tensor:
    """Central differences of a function without arguments, one weight at a time."""
    assert callable(loss)
    found = []
    with torch.no_grad():
        for parameter in parameters:
            flat = parameter.view(-1)
            for entry in range(parameter.numel()):
                kept = float(flat[entry])
                flat[entry] = kept + step
                above = float(loss())
                flat[entry] = kept - step
                below = float(loss())
                flat[entry] = kept
                found.append((above - below) / (2 * step))
    return torch.tensor(found, dtype=torch.float64)
