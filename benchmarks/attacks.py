"""One PGD step against a bare loop of forward pass and input gradient, and against other libraries where installed.

All are timed in one run, round after round and in random order within a round. Printed are the ratio of the least
times, since what else a machine does only ever adds to a time, and the median over rounds of each round's ratio to the
bare loop, with its quartiles, which tell how much the machine was shared.
foolbox comes with the development packages; torchattacks and ART need the environment of oracle/run.py.

Usage: python benchmarks/attacks.py [--threads N] [--repeats N] [--out FILE]
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import logging
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nndefense.attacks import pgd

STEPS = 10
EPS, STEP = {"linf": 8 / 255, "l2": 0.5}, {"linf": 2 / 255, "l2": 0.1}
Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]


def main() -> None:
    """Time every library on every net, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # One thread's processor time does not see what else the machine does.
    alone = options.device == "cpu" and options.threads == 1
    clock = time.process_time if alone else time.perf_counter
    logging.getLogger("art").setLevel(logging.ERROR)
    rows = []
    for name, net, images in cases():
        net, images = net.to(options.device).eval(), images.to(options.device)
        labels = (torch.arange(len(images)) % 10).to(options.device)
        # A step on photographs takes so long that few rounds will do.
        large = images.shape[-1] > 100
        for norm in ("linf",) if large else tuple(EPS):
            attacks = {"bare loop": bare(norm), "nndefense": ours(norm), **others(norm, options.device)}
            repeats = max(3, options.repeats // 5) if large else options.repeats
            rows += timed(f"{name}, {norm}", attacks, net, images, labels, repeats, clock)
    width = max(len(row["what"]) for row in rows)
    for row in rows:
        spread = f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f}) of rounds"
        said = f"{row['step_ms']:>9.3f} ms a step  ratio {row['least']:.3f} of least times, {spread}"
        print(f"{row['what']:<{width}}  {row['library']:<13}{said}")
    if options.out:
        packages = {row["library"]: None for row in rows if row["library"] in ("torchattacks", "foolbox", "ART")}
        found = {
            "torch": torch.__version__,
            "versions": {name: release(name) for name in packages},
            "threads": options.threads,
            "device": options.device,
            "machine": platform.machine(),
            "clock": clock.__name__,
            "steps": STEPS,
            "repeats": options.repeats,
            "rows": rows,
        }
        options.out.write_text(json.dumps(found, indent=2) + "\n")


def cases() -> list[tuple[str, nn.Module, Tensor]]:
    """A linear net, where a step is nearly all overhead, and three where the passes are nearly everything."""
    torch.manual_seed(0)
    small = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 49, 10),
    )  # fmt: skip
    models = importlib.import_module("torchvision.models")
    resnet, mobile = models.resnet18(num_classes=10), models.mobilenet_v2(num_classes=10)
    return [
        ("a linear net, 8 of 1 x 28 x 28", nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), torch.rand(8, 1, 28, 28)),
        ("two convolutions, 64 of 1 x 28 x 28", small, torch.rand(64, 1, 28, 28)),
        ("ResNet-18, 8 of 3 x 32 x 32", resnet, torch.rand(8, 3, 32, 32)),
        ("MobileNetV2, 8 of 3 x 224 x 224", mobile, torch.rand(8, 3, 224, 224)),
    ]


def timed(
    what: str,
    attacks: dict[str, Attack],
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    repeats: int,
    clock: Callable[[], float],
) -> list[dict[str, Any]]:
    """Milliseconds a step of each library, and the ratio to the bare loop."""
    times: dict[str, list[float]] = {name: [] for name in attacks}
    chance = random.Random(0)
    for repeat in range(repeats + 1):
        # In random order: who always came after the same one would always find the cache as that one leaves it.
        for name in chance.sample(list(attacks), len(attacks)):
            attack = attacks[name]
            begun = clock()
            attack(net, x, y)
            if x.is_cuda:
                torch.cuda.synchronize()
            if repeat:  # the first round warms caches up
                times[name].append((clock() - begun) / STEPS * 1e3)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    # Each repeat's own ratio: what slows the machine down slows its neighbours in the same round as well.
    rows = []
    for name, taken in times.items():
        low, ratio, high = statistics.quantiles((a / b for a, b in zip(taken, times["bare loop"], strict=True)), n=4)
        least = min(taken) / min(times["bare loop"])
        rows.append(
            {"what": what, "library": name, "step_ms": medians[name]}
            | {"least": least, "ratio": ratio, "low": low, "high": high}
        )
    return rows


def bare(norm: str) -> Attack:
    """Forward pass, input gradient, step and projection, and nothing else."""
    eps, size = EPS[norm], STEP[norm]

    def linf(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        x, low, high = images.clone(), (images - eps).clamp_(0, 1), (images + eps).clamp_(0, 1)
        for _ in range(STEPS):
            x.requires_grad_(True)
            (gradient,) = torch.autograd.grad(F.cross_entropy(net(x), labels, reduction="sum"), x)
            x = torch.clamp(x.detach() + size * gradient.sign(), low, high)
        return x

    def l2(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        x = images.clone()
        for _ in range(STEPS):
            x.requires_grad_(True)
            (gradient,) = torch.autograd.grad(F.cross_entropy(net(x), labels, reduction="sum"), x)
            delta = x.detach() + size * gradient / size_of(gradient) - images
            x = (images + delta * (eps / size_of(delta)).clamp_max(1)).clamp_(0, 1)
        return x

    return linf if norm == "linf" else l2


def size_of(images: Tensor) -> Tensor:
    """Length of each image, N x 1 x 1 x 1."""
    return images.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)


def ours(norm: str) -> Attack:
    """nndefense."""
    return lambda net, x, y: pgd(
        net, x, y, eps=EPS[norm], norm=norm, steps=STEPS, step_size=STEP[norm], random_start=False
    )


def others(norm: str, device: str) -> dict[str, Attack]:
    """The libraries that are installed here."""
    found: dict[str, Attack] = {}
    for name, (module, build) in {
        "torchattacks": ("torchattacks", _torchattacks),
        "foolbox": ("foolbox", _foolbox),
        "ART": ("art", _art),
    }.items():
        if importlib.util.find_spec(module) is None:
            print(f"{name} is not installed here")
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[name] = build(norm, device)
    return found


def _torchattacks(norm: str, device: str) -> Attack:
    library = importlib.import_module("torchattacks")
    kind = library.PGD if norm == "linf" else library.PGDL2
    return lambda net, x, y: kind(net, eps=EPS[norm], alpha=STEP[norm], steps=STEPS, random_start=False)(x, y)


def _foolbox(norm: str, device: str) -> Attack:
    library = importlib.import_module("foolbox")
    kind = library.attacks.LinfPGD if norm == "linf" else library.attacks.L2PGD
    attack = kind(abs_stepsize=STEP[norm], steps=STEPS, random_start=False)

    def run(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        found: Tensor = attack(library.PyTorchModel(net, bounds=(0, 1), device=device), x, y, epsilons=EPS[norm])[1]
        return found

    return run


def _art(norm: str, device: str) -> Attack:
    evasion = importlib.import_module("art.attacks.evasion")
    estimators = importlib.import_module("art.estimators.classification")
    settings = {"eps": EPS[norm], "eps_step": STEP[norm], "max_iter": STEPS, "num_random_init": 0, "verbose": False}

    def run(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        estimator = estimators.PyTorchClassifier(
            net, nn.CrossEntropyLoss(), tuple(x.shape[1:]), 10, clip_values=(0.0, 1.0), device_type=device
        )
        attack = evasion.ProjectedGradientDescentPyTorch(
            estimator, norm=np.inf if norm == "linf" else 2, batch_size=len(x), **settings
        )
        return torch.from_numpy(attack.generate(x.cpu().numpy(), y=np.eye(10)[y.cpu().numpy()]))

    return run


def release(name: str) -> str:
    """The version of a library by its usual name."""
    return version("adversarial-robustness-toolbox" if name == "ART" else name)


if __name__ == "__main__":
    main()
