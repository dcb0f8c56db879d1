"""Memory that is used again: fewer pages to map while the context is open, and all of them given back after it."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from nndefense import memory
from nndefense.attacks import pgd
from nndefense.errors import InputError
from nndefense.memory import reused_memory

BLOCKS = """
import resource, sys
import numpy as np
from contextlib import nullcontext
from nndefense.memory import reused_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

begun = resident()
with reused_memory() if sys.argv[1] == "reused" else nullcontext():
    with reused_memory() if sys.argv[1] == "reused" else nullcontext():
        np.ones(10 << 20)
    start = faults()
    for _ in range(8):
        np.ones(6 << 20)
    print(faults() - start)
print(resident() - begun)
"""


def run(how: str) -> tuple[int, int]:
    done = subprocess.run([sys.executable, "-c", BLOCKS, how], capture_output=True, text=True, check=True)
    faults, left = (int(line) for line in done.stdout.split())
    return faults, left


@pytest.mark.skipif(memory._glibc() is None, reason="only glibc can be told")
@pytest.mark.slow
def test_blocks_are_mapped_once_and_given_back() -> None:
    pages = 8 * (48 << 20) // resource.getpagesize()
    faults, left = run("reused")
    assert faults < pages / 20
    assert left < 40 << 20
    # The trial can fail: without the context every page is mapped anew (large pages make that 1/512 of so many).
    assert run("plain")[0] > 4 * faults


def test_nothing_is_changed_without_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    with reused_memory():
        pass


def test_an_error_closes_it() -> None:
    with pytest.raises(ZeroDivisionError), reused_memory():
        _ = 1 / 0
    assert memory._inside == 0


@pytest.mark.parametrize(("count", "kept"), [(200, True), (2, False)])
def test_attacks_on_large_batches_alone_keep_memory(count: int, kept: bool) -> None:
    inside = []

    def model(images: Tensor) -> Tensor:
        inside.append(memory._inside > 0)
        return images.flatten(1)[:, :10] * 1.0

    images = torch.full((count, 1, 28, 28), 0.5)
    labels = torch.zeros(count, dtype=torch.int64)
    pgd(model, images, labels, eps=0.1, steps=2)
    pgd(model, x=images, y=labels, eps=0.1, steps=2)
    assert set(inside) == {kept}
    with pytest.raises(InputError):
        pgd(model, images, labels, eps=0.1, steps=0)
    assert memory._inside == 0
