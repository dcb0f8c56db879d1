"""The exponential moving average of a net's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

# In the first steps a long memory would hold mostly the weights of the start.
_YOUNG = 10


class WeightAverage:
    """A second set of weights that follows the first: ``average += (1 - decay) * (weights - average)`` a step.

    Polyak averaging with an exponential window (Tarvainen and Valpola, NeurIPS 2017, section 2, without the teacher's
    loss). In step t (from 1) the decay is at most (1 + t) / (10 + t), so that the average forgets the random start.
    The running statistics of batch normalisation are averaged as the weights are; whole numbers are copied.

    Args:
        net: whose weights are averaged; the average starts as a copy of them.
        decay: in (0, 1).
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.decay = decay
        self.net = net
        self.tensors = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the net's weights after its step number ``step`` (from 1)."""
        decay = min(self.decay, (1 + step) / (_YOUNG + step))
        current = self.net.state_dict()
        floats = [name for name, tensor in self.tensors.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([self.tensors[name] for name in floats], [current[name] for name in floats], 1 - decay)
        for name in self.tensors.keys() - floats:
            self.tensors[name].copy_(current[name])

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a saved average: the same names as those of the net's ``state_dict``."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Lend the net the averaged weights; afterwards it has its own again."""
        with torch.no_grad():
            own = {name: tensor.detach().clone() for name, tensor in self.net.state_dict().items()}
            copy_weights(self.net, self.tensors)
        try:
            yield
        finally:
            copy_weights(self.net, own)


@torch.no_grad()
def copy_weights(net: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Overwrite the values of a net's weights and buffers, where they are."""
    for name, tensor in net.state_dict().items():
        tensor.copy_(tensors[name])
