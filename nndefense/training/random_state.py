"""Chance that depends on the seed and the epoch alone, so that a resumed training goes on as it would have."""

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
def seeded(seed: int, epoch: int, device: torch.device) -> Iterator[None]:
    """Seed the default generators of the CPU and of ``device``, and give them back their state afterwards."""
    value = derived_seed(seed, epoch, "default")
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        with torch.random.fork_rng(devices=[index]), torch.cuda.device(index):
            torch.default_generator.manual_seed(value)
            torch.cuda.manual_seed(value)
            yield
    else:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(value)
            yield
