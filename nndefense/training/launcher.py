"""One training in several processes, on the GPUs of one or several computers.

The processes are started by ``torchrun``, and joined by Lightning Fabric. Accelerate would do as well; Fabric was
taken because all that it is asked for (read the launcher's environment, choose each process's device, set up the
process group) is a small, tested part of it that needs no configuration file, leaves model and optimiser as they are,
and pulls in nothing but its own utilities.

What is not left to it is the sum of the gradients. ``DistributedDataParallel`` expects one forward and one backward
pass through the wrapped net per step, and overlaps the sum with that backward pass. A robust objective makes many
passes, most of them for the gradient of the images alone, which the wrapper must not see; and against K attack steps
the overlap saves next to nothing. So one sum over one flat tensor follows the backward pass: gradients, the running
statistics of batch normalisation, and the figures for the log, all in one message.
"""

from __future__ import annotations

import atexit
import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nndefense.errors import InputError
from nndefense.models.state import tensors_in


@dataclass
class Team:
    """The processes that train one net together; by default there is one.

    Attributes:
        rank: number of this process, from 0; process 0 alone writes files and shows progress.
        size: how many they are.
        device: where this process computes.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, rows: Tensor) -> Tensor:
        """This process's part of a list, in order; the parts differ in length by one at most."""
        return rows if self.size == 1 else torch.tensor_split(rows, self.size)[self.rank]

    def sum(self, tensor: Tensor) -> Tensor:
        """Add a tensor over all processes, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def wait(self) -> None:
        """Go on when all processes are here."""
        self.sum(torch.zeros((), device=self.device)).item()

    @torch.no_grad()
    def agree(self, net: nn.Module) -> None:
        """Give every process the weights of the leading one, in case they were drawn at random."""
        if self.size > 1:
            for tensor in tensors_in(net).values():
                torch.distributed.broadcast(tensor, src=0)

    @torch.no_grad()
    def join_step(self, net: nn.Module, weights: Sequence[nn.Parameter], figures: Tensor) -> Tensor:
        """Average the gradients of ``weights`` and the running statistics of ``net``; return the sum of ``figures``.

        Args:
            net: the same everywhere but for the statistics that its last passes changed.
            weights: each process's have the gradient of its share of the batch.
            figures: a vector.
        """
        if self.size == 1:
            return figures
        for weight in weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        averaged = [weight.grad for weight in weights if weight.grad is not None] + running_statistics(net)
        flat = torch.cat([*(tensor.flatten().float() for tensor in averaged), figures.float()])
        self.sum(flat)
        start = 0
        for tensor in averaged:
            part = flat[start : start + tensor.numel()]
            tensor.copy_(part.view_as(tensor) / self.size)
            start += tensor.numel()
        return flat[start:].to(figures.dtype)


def running_statistics(net: nn.Module) -> list[Tensor]:
    """The tensors that a forward pass in training mode changes: means and variances of normalisation layers."""
    names = ("running_mean", "running_var")
    found = (getattr(module, name, None) for module in net.modules() for name in names)
    return [value for value in found if isinstance(value, Tensor)]


def join(device: torch.device) -> Team:
    """The team that this process belongs to: that of ``torchrun`` if it started it, else itself alone.

    Raises:
        InputError: started by ``torchrun``, but without Lightning Fabric.
    """
    size = _launched()
    if size == 1:
        return Team(device)
    try:
        fabric_module = importlib.import_module("lightning_fabric")
    except ImportError:
        raise InputError(
            f"a training in {size} processes needs Lightning Fabric: pip install lightning-fabric"
        ) from None
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    fabric = fabric_module.Fabric(
        accelerator="cuda" if device.type == "cuda" else "cpu", devices=local, num_nodes=size // local, strategy="ddp"
    )
    if not torch.distributed.is_initialized():
        atexit.register(_leave)
    fabric.launch()
    return Team(fabric.device, fabric.global_rank, fabric.world_size)


def leads() -> bool:
    """Whether this process is the one that writes and prints: always, unless ``torchrun`` started several."""
    return _launched() == 1 or os.environ.get("RANK", "0") == "0"


def _launched() -> int:
    """How many processes ``torchrun`` started; 1 where it did not start this one."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_WORLD_SIZE" in os.environ else 1


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
