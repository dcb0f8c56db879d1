"""PGD on a CPU with freed memory kept for the next pass (nndefense.memory) against PGD without, in turns in one run.

Printed is the ratio of the least processor times of one thread, since what else a machine does only ever adds to a
time.

Usage: python benchmarks/memory.py [--rounds N]
"""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext
from inspect import unwrap

import torch
from torch import Tensor, nn

from nndefense.attacks import pgd
from nndefense.memory import reused_memory
from nndefense.models import build_classifier, load_classifier

TEN = [str(number) for number in range(10)]


def main() -> None:
    """Time both on every net."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    # As it is without the context that it opens itself for large batches.
    attack = unwrap(pgd)
    for name, net, images in cases():
        net.eval()
        labels = torch.arange(len(images)) % 10
        times: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(rounds):
            for kept, taken in times.items():
                with reused_memory() if kept else nullcontext():
                    # The first pass asks for the memory.
                    attack(net, images, labels, eps=0.03, steps=1)
                    begun = time.process_time()
                    attack(net, images, labels, eps=0.03, steps=3)
                    taken.append(time.process_time() - begun)
        plain, kept_time = min(times[False]), min(times[True])
        print(f"{name}: {plain:.2f} s without, {kept_time:.2f} s with, ratio {kept_time / plain:.2f}", flush=True)


def cases() -> list[tuple[str, nn.Module, Tensor]]:
    """A net for photographs, whose maps are larger than what glibc keeps, and two whose are not."""
    return [
        (
            "MobileNetV2, 25 of 3 x 224 x 224",
            load_classifier("torchvision:mobilenet_v2:none"),
            torch.rand(25, 3, 224, 224),
        ),
        ("ResNet-18, 50 of 3 x 32 x 32", built("cifar-resnet18", (3, 32, 32)), torch.rand(50, 3, 32, 32)),
        ("small-cnn, 128 of 1 x 28 x 28", built("small-cnn", (1, 28, 28)), torch.rand(128, 1, 28, 28)),
    ]


def built(arch: str, shape: tuple[int, int, int]) -> nn.Module:
    """A net with random weights."""
    return build_classifier(arch, input_shape=shape, classes=TEN, seed=0)


if __name__ == "__main__":
    main()
