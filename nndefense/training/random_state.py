"""Chance that depends on the seed, the epoch and the step alone, so that a training goes on as it would have."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch


def derived_seed(seed: int, epoch: int, purpose: str) -> int:
    """Return a seed in 0..2**63-1 that is unrelated for every other seed, epoch or purpose."""
    digest = hashlib.sha256(f"{seed} {epoch} {purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, epoch: int, purpose: str) -> torch.Generator:
    """Return a CPU generator with the derived seed."""
    result = torch.Generator()
    result.manual_seed(derived_seed(seed, epoch, purpose))
    return result


@contextlib.contextmanager
def kept(device: torch.device) -> Iterator[None]:
    """Give the default generators of the CPU and of ``device`` back their state afterwards."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        with torch.random.fork_rng(devices=[index]), torch.cuda.device(index):
            yield
    else:
        with torch.random.fork_rng(devices=[]):
            yield


def reseed(seed: int, epoch: int, purpose: str, device: torch.device) -> None:
    """Seed the default generators of the CPU and of ``device``; inside :func:`kept`.

    Done before every step, it makes whatever the step draws independent of how the training came there.
    """
    value = derived_seed(seed, epoch, purpose)
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        torch.cuda.manual_seed(value)
