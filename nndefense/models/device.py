"""Where tensors live: the name a person gives, made into a torch device that is really there."""

from __future__ import annotations

import torch

from nndefense.errors import InputError


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """Return the device called ``name``: ``auto`` (a CUDA GPU if there is one, else the CPU), ``cpu``, ``cuda``, ...

    Raises:
        InputError: no such device, or it is not on this computer.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"there is no device {str(name)!r}: use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise InputError("no CUDA GPU can be used here: choose the device cpu or auto")
        if device.index is not None and device.index >= count:
            raise InputError(f"there is no device {device}: this computer has cuda:0 to cuda:{count - 1}")
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("no Apple GPU can be used here: choose the device cpu or auto")
    return device
